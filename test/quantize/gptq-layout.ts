/** A reader of GPTQ checkpoints, version 2, written from the definition of the layout. */
import type { Checkpoint } from '../../lib/checkpoint/source';
import type { Tensor } from '../../types/native';

/** Codes of `bits` bits from columns of words: down each column runs one string of bits, the lowest first. [columns][count] */
function unpackColumns(words: Int32Array, columns: number, bits: number, count: number): number[][] {
  const unpack = (column: number, i: number) => {
    const [word, shift] = [(i * bits) >> 5, (i * bits) & 31];
    const low = words[word * columns + column]! >>> shift;
    const high = shift + bits > 32 ? words[(word + 1) * columns + column]! << (32 - shift) : 0;
    return (low | high) & ((1 << bits) - 1);
  };
  return Array.from({ length: columns }, (_, c) => Array.from({ length: count }, (_, i) => unpack(c, i)));
}

/** W [out, in] from the four tensors as they lie in the file, by the letter of the format. */
export function dequantize(checkpoint: Checkpoint, module: string, bits: number): Float32Array {
  const read = (part: string) => checkpoint.tensor(`${module}.${part}`);
  const [qweight, qzeros, scales, gIdx] = ['qweight', 'qzeros', 'scales', 'g_idx'].map(read) as Tensor[];
  const [groups, out] = scales!.shape as [number, number];
  const inputs = gIdx!.shape[0]!;
  const codes = unpackColumns(qweight!.toArray() as Int32Array, out, bits, inputs);
  const zeroWords = qzeros!.toArray() as Int32Array;
  const zeros = Array.from({ length: groups }, (_, g) => {
    const width = zeroWords.length / groups;
    return unpackColumns(zeroWords.slice(g * width, (g + 1) * width), 1, bits, out)[0]!;
  });
  const scale = scales!.toArray();
  const group = gIdx!.toArray();
  const w = new Float32Array(out * inputs);
  for (let r = 0; r < out; r++) {
    for (let c = 0; c < inputs; c++) {
      const g = group[c]!;
      w[r * inputs + c] = scale[g * out + r]! * (codes[r]![c]! - zeros[g]![r]!);
    }
  }
  return w;
}
