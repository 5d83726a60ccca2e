/** Random GGUF tensors, for benchmarks of programs built on ggml. Block formats: ggml-common.h */
import { f16Bits } from '../../lib/export/gguf/blocks';
import { GGML_TYPES, ggmlBytes, type GgmlTypeName } from '../../lib/export/gguf/writer';
import { seededRandom } from '../../lib/model/random';

export { f16Bits as f16 } from '../../lib/export/gguf/blocks';
export {
  GGML_TYPES,
  ggmlBytes,
  writeGguf,
  type GgmlTypeName,
  type GgufTensor,
  type GgufValue,
} from '../../lib/export/gguf/writer';

/**
 * Where a block keeps its f16 factors: each with the one that gives random bits a standard deviation of about 1 (the minimum of Q2_K: a
 * mean of zero).
 */
const FACTORS: Partial<Record<GgmlTypeName, { at: number; value: number }[]>> = {
  // d (q - 8)
  Q4_0: [{ at: 0, value: 1 / 4.6 }],
  // 16 scales and minimums of 4 bit, 64 bytes of codes: d s q - dmin m
  Q2_K: [
    { at: 80, value: 1 / 14 },
    { at: 82, value: 1.5 / 14 },
  ],
  // 32 bytes of high bits, 64 of low bits, 12 of scales of 6 bit: d (s - 32) (q - 4)
  Q3_K: [{ at: 108, value: 1 / 42 }],
  // 128 + 64 bytes of codes, 16 scales of 8 bit: d s (q - 32)
  Q6_K: [{ at: 208, value: 1 / 1370 }],
  // d times one of 16 fixed values from -127 to 113
  IQ4_NL: [{ at: 0, value: 1 / 67 }],
};

/** Types that random tensors can have. */
export const RANDOM_TYPES = ['F16', ...Object.keys(FACTORS)] as GgmlTypeName[];

/** Random blocks to cut tensors from: large enough that no two rows of a matrix in use are equal, small enough to make quickly. */
const RING_BLOCKS = 2 ** 16 + 1;

/** Random blocks of quantized types whose values have a standard deviation of about `deviation`. */
export class RandomBlocks {
  readonly #rings = new Map<string, Uint8Array>();
  readonly #random: () => number;
  #place = 0;

  constructor(seed: number) {
    this.#random = seededRandom(seed);
  }

  /** `data` of a tensor. Each tensor begins at another place of the ring. */
  tensor(type: GgmlTypeName, shape: readonly number[], deviation: number): () => Iterable<Uint8Array> {
    const begin = (this.#place += 10_007);
    const ring = this.#ring(type, deviation);
    return function* () {
      const blockBytes = GGML_TYPES[type].bytes;
      let from = (begin % RING_BLOCKS) * blockBytes;
      for (let left = ggmlBytes(type, shape); left > 0;) {
        const piece = ring.subarray(from, from + left);
        yield piece;
        left -= piece.byteLength;
        from = 0;
      }
    };
  }

  #ring(type: GgmlTypeName, deviation: number): Uint8Array {
    const key = `${type} ${deviation}`;
    const known = this.#rings.get(key);
    if (known) return known;
    const ring = type === 'F16' ? this.#halves(deviation) : this.#blocks(type, deviation);
    this.#rings.set(key, ring);
    return ring;
  }

  #halves(deviation: number): Uint8Array {
    const sign = () => (this.#random() < 0.5 ? 0x8000 : 0);
    const size = () => f16Bits(deviation * Math.sqrt(3) * (1 - this.#random()));
    return new Uint8Array(Uint16Array.from({ length: RING_BLOCKS }, () => sign() | size()).buffer);
  }

  #blocks(type: GgmlTypeName, deviation: number): Uint8Array {
    const { bytes } = GGML_TYPES[type];
    const factors = FACTORS[type];
    if (!factors) throw new RangeError(`${type} has no random blocks; write its values`);
    const words = new Uint32Array(Math.ceil((RING_BLOCKS * bytes) / 4));
    for (let i = 0; i < words.length; i++) words[i] = this.#random() * 2 ** 32;
    const ring = new Uint8Array(words.buffer, 0, RING_BLOCKS * bytes);
    const view = new DataView(words.buffer);
    for (let block = 0; block < ring.byteLength; block += bytes) {
      for (const { at, value } of factors) view.setUint16(block + at, f16Bits(value * deviation), true);
    }
    return ring;
  }
}
