/**
 * Zero points of GPTQ files.
 *
 * LAYOUT   A row of qzeros is a little-endian bit string: value i in bits [i b, (i + 1) b), its words i32. Version 2 stores the true values,
 *          version 1 (checkpoint_format 'gptq') stores them minus one.
 * LIMITS   Version 1 has no place for zero point 0: some readers take all ones for it, others for 2^b. Both directions refuse it.
 */
import { EacMoeError } from '../errors';

/** GPTQ's checkpoint_format: 1 = 'gptq', 2 = 'gptq_v2'. */
export type GptqVersion = 1 | 2;

/** `count` values of `bits` bits from words [from, ...). */
export function unpackBits(words: Int32Array, from: number, bits: number, count: number): Uint8Array {
  const values = new Uint8Array(count);
  const mask = (1 << bits) - 1;
  for (let i = 0, at = 32 * from; i < count; i++, at += bits) {
    const shift = at & 31;
    let value = words[at >>> 5]! >>> shift;
    if (shift + bits > 32) value |= words[(at >>> 5) + 1]! << (32 - shift);
    values[i] = value & mask;
  }
  return values;
}

/** The inverse; the words' bits must be zero before. */
export function packBits(values: Uint8Array, words: Int32Array, from: number, bits: number): void {
  for (let i = 0, at = 32 * from; i < values.length; i++, at += bits) {
    const shift = at & 31;
    words[at >>> 5]! |= values[i]! << shift;
    if (shift + bits > 32) words[(at >>> 5) + 1]! |= values[i]! >>> (32 - shift);
  }
}

export interface PackedZeros {
  /** i32 [groups, words a row] */
  words: Int32Array;
  groups: number;
  out: number;
  bits: number;
}

/** u8 [groups, out], as stored. */
export function unpackZeros({ words, groups, out, bits }: PackedZeros): Uint8Array {
  const row = words.length / groups;
  const zeros = new Uint8Array(groups * out);
  for (let g = 0; g < groups; g++) zeros.set(unpackBits(words, g * row, bits, out), g * out);
  return zeros;
}

/**
 * The same zero points in the other version. `where` begins errors: file and tensor.
 *
 * @throws EacMoeError UNSUPPORTED_MODEL for a zero point that version 1 cannot tell
 */
export function convertZeros(packed: PackedZeros, to: GptqVersion, where: string): Int32Array {
  const { words, groups, bits, out } = packed;
  const stored = unpackZeros(packed);
  const [refused, step] = to === 1 ? [0, -1] : [2 ** bits - 1, 1];
  const at = stored.indexOf(refused);
  if (at >= 0) {
    const place = `output channel ${at % out}, group ${Math.floor(at / out)}`;
    throw new EacMoeError(
      'UNSUPPORTED_MODEL',
      to === 1
        ? `${where} has zero point 0 at ${place}, which version 1 of the GPTQ format cannot tell from ${2 ** bits}; write version 2, or quantize symmetrically`
        : `${where} stores ${refused} in version 1 of the GPTQ format at ${place}, which some programs mean as zero point 0 and others as ${2 ** bits}; re-save it with GPTQModel as gptq_v2`,
    );
  }
  const result = new Int32Array(words.length);
  const row = words.length / groups;
  for (let g = 0; g < groups; g++) {
    const values = stored.subarray(g * out, (g + 1) * out).map((z) => z + step);
    packBits(values, result, g * row, bits);
  }
  return result;
}
