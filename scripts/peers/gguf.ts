/**
 * Writes GGUF files of random weights, for benchmarks of programs built on ggml.
 *
 * LAYOUT   (version 3, little-endian)
 *   'GGUF' | u32 3 | u64 tensors | u64 entries
 *   entries: string key | u32 type | value         string: u64 bytes | UTF-8
 *   tensors: string name | u32 dimensions | u64 sizes, innermost first | u32 type | u64 offset from the beginning of the data
 *   padding to 32 | data, each tensor padded to 32
 *   https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; block formats: ggml-common.h
 */
import { open } from 'node:fs/promises';
import { seededRandom } from '../../lib/model/random';

const VERSION = 3;
const ALIGNMENT = 32;

/**
 * Number in the file, values and bytes of a block, and where a block keeps its f16 factors: each with the one that gives random bits
 * a standard deviation of about 1 (the minimum of Q2_K: a mean of zero).
 */
export const GGML_TYPES = {
  F32: { id: 0, values: 1, bytes: 4, factors: [] },
  F16: { id: 1, values: 1, bytes: 2, factors: [] },
  // d (q - 8)
  Q4_0: { id: 2, values: 32, bytes: 18, factors: [{ at: 0, value: 1 / 4.6 }] },
  // 16 scales and minimums of 4 bit, 64 bytes of codes: d s q - dmin m
  Q2_K: {
    id: 10,
    values: 256,
    bytes: 84,
    factors: [
      { at: 80, value: 1 / 14 },
      { at: 82, value: 1.5 / 14 },
    ],
  },
  // 32 bytes of high bits, 64 of low bits, 12 of scales of 6 bit: d (s - 32) (q - 4)
  Q3_K: { id: 11, values: 256, bytes: 110, factors: [{ at: 108, value: 1 / 42 }] },
  // 128 + 64 bytes of codes, 16 scales of 8 bit: d s (q - 32)
  Q6_K: { id: 14, values: 256, bytes: 210, factors: [{ at: 208, value: 1 / 1370 }] },
  // d times one of 16 fixed values from -127 to 113
  IQ4_NL: { id: 20, values: 32, bytes: 18, factors: [{ at: 0, value: 1 / 67 }] },
} as const satisfies Record<string, GgmlType>;

interface GgmlType {
  id: number;
  values: number;
  bytes: number;
  factors: readonly { at: number; value: number }[];
}

export type GgmlTypeName = keyof typeof GGML_TYPES;
/** Integers are written as u32, other numbers as f32; wrap one in `{ f32 }` to have a whole number written as f32. */
export type GgufValue = string | boolean | number | { f32: number } | string[];

export interface GgufTensor {
  name: string;
  type: GgmlTypeName;
  /** Innermost first: a matrix [out, in] is [in, out] here. */
  shape: readonly number[];
  /** The bytes, made when their turn comes; pieces may share memory. */
  data: () => Iterable<Uint8Array>;
}

/** Bytes of a tensor. Its rows (innermost dimension) must be whole blocks. */
export function ggmlBytes(type: GgmlTypeName, shape: readonly number[]): number {
  const { values, bytes } = GGML_TYPES[type];
  if (shape[0]! % values !== 0)
    throw new RangeError(`rows of ${shape[0]} values are not whole blocks of ${type} (${values} values)`);
  return (shape.reduce((a, b) => a * b, 1) / values) * bytes;
}

const padding = (bytes: number) => (ALIGNMENT - (bytes % ALIGNMENT)) % ALIGNMENT;

class HeaderWriter {
  readonly #pieces: Buffer[] = [];

  u32(x: number): this {
    const b = Buffer.alloc(4);
    b.writeUInt32LE(x);
    return this.bytes(b);
  }

  u64(x: number): this {
    const b = Buffer.alloc(8);
    b.writeBigUInt64LE(BigInt(x));
    return this.bytes(b);
  }

  f32(x: number): this {
    const b = Buffer.alloc(4);
    b.writeFloatLE(x);
    return this.bytes(b);
  }

  bytes(b: Buffer): this {
    this.#pieces.push(b);
    return this;
  }

  string(text: string): this {
    const b = Buffer.from(text, 'utf8');
    return this.u64(b.byteLength).bytes(b);
  }

  /** The type's number, then the value. */
  value(value: GgufValue): this {
    if (typeof value === 'string') return this.u32(8).string(value);
    if (typeof value === 'boolean') return this.u32(7).bytes(Buffer.of(value ? 1 : 0));
    if (typeof value === 'object' && 'f32' in value) return this.u32(6).f32(value.f32);
    if (typeof value === 'number')
      return Number.isInteger(value) ? this.u32(4).u32(value) : this.u32(6).f32(value);
    this.u32(9).u32(8).u64(value.length);
    for (const text of value) this.string(text);
    return this;
  }

  padded(): Buffer {
    const all = Buffer.concat(this.#pieces);
    return Buffer.concat([all, Buffer.alloc(padding(all.byteLength))]);
  }
}

function header(metadata: Record<string, GgufValue>, tensors: readonly GgufTensor[]): Buffer {
  const w = new HeaderWriter().bytes(Buffer.from('GGUF')).u32(VERSION);
  const entries = Object.entries(metadata);
  w.u64(tensors.length).u64(entries.length);
  for (const [key, value] of entries) w.string(key).value(value);
  let offset = 0;
  for (const { name, type, shape } of tensors) {
    w.string(name).u32(shape.length);
    for (const size of shape) w.u64(size);
    w.u32(GGML_TYPES[type].id).u64(offset);
    const bytes = ggmlBytes(type, shape);
    offset += bytes + padding(bytes);
  }
  return w.padded();
}

/** Writes the file, one piece of a tensor in memory at a time. Returns its bytes. */
export async function writeGguf(
  path: string,
  metadata: Record<string, GgufValue>,
  tensors: readonly GgufTensor[],
): Promise<number> {
  const file = await open(path, 'w');
  let at = 0;
  const write = async (piece: Uint8Array) => {
    for (let done = 0; done < piece.byteLength;) {
      const { bytesWritten } = await file.write(piece, done, piece.byteLength - done, at + done);
      done += bytesWritten;
    }
    at += piece.byteLength;
  };
  try {
    await write(header(metadata, tensors));
    for (const { name, type, shape, data } of tensors) {
      const begin = at;
      for (const piece of data()) await write(piece);
      const expected = ggmlBytes(type, shape);
      if (at - begin !== expected)
        throw new RangeError(
          `tensor '${name}' has ${at - begin} bytes; ${type} [${shape.join(', ')}] takes ${expected}`,
        );
      await write(Buffer.alloc(padding(expected)));
    }
  } finally {
    await file.close();
  }
  return at;
}

/** The bits of the f16 number nearest to x, 0 < x < 65504. */
export function f16(x: number): number {
  if (x < 2 ** -14) return Math.round(x * 2 ** 24);
  const exponent = Math.floor(Math.log2(x));
  return Math.round((x / 2 ** exponent - 1) * 1024) + ((exponent + 15) << 10);
}

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
    const size = () => f16(deviation * Math.sqrt(3) * (1 - this.#random()));
    return new Uint8Array(Uint16Array.from({ length: RING_BLOCKS }, () => sign() | size()).buffer);
  }

  #blocks(type: GgmlTypeName, deviation: number): Uint8Array {
    const { bytes, factors } = GGML_TYPES[type];
    if (factors.length === 0) throw new RangeError(`${type} has no random blocks; write its values`);
    const words = new Uint32Array(Math.ceil((RING_BLOCKS * bytes) / 4));
    for (let i = 0; i < words.length; i++) words[i] = this.#random() * 2 ** 32;
    const ring = new Uint8Array(words.buffer, 0, RING_BLOCKS * bytes);
    const view = new DataView(words.buffer);
    for (let block = 0; block < ring.byteLength; block += bytes) {
      for (const { at, value } of factors) view.setUint16(block + at, f16(value * deviation), true);
    }
    return ring;
  }
}
