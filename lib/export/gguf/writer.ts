/**
 * Writing GGUF files. (No package on npm writes tensors: @huggingface/gguf serializes the key-value part only.)
 *
 * LAYOUT   (version 3, little-endian)
 *   'GGUF' | u32 3 | u64 tensors | u64 entries
 *   entries: string key | u32 type | value         string: u64 bytes | UTF-8
 *   tensors: string name | u32 dimensions | u64 sizes, innermost first | u32 type | u64 offset from the beginning of the data
 *   padding to 32 | data, each tensor padded to 32
 * Source   https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; block formats: ggml-common.h
 */
import { writeFileAtomic } from '../../checkpoint/files';
import { EacMoeError } from '../../errors';

const VERSION = 3;
const ALIGNMENT = 32;

/** Number in the file; values and bytes of a block. */
export const GGML_TYPES = {
  F32: { id: 0, values: 1, bytes: 4 },
  F16: { id: 1, values: 1, bytes: 2 },
  Q4_0: { id: 2, values: 32, bytes: 18 },
  Q4_1: { id: 3, values: 32, bytes: 20 },
  Q5_0: { id: 6, values: 32, bytes: 22 },
  Q2_K: { id: 10, values: 256, bytes: 84 },
  Q3_K: { id: 11, values: 256, bytes: 110 },
  Q6_K: { id: 14, values: 256, bytes: 210 },
  IQ4_NL: { id: 20, values: 32, bytes: 18 },
  BF16: { id: 30, values: 1, bytes: 2 },
  Q2_0: { id: 42, values: 64, bytes: 18 },
} as const satisfies Record<string, { id: number; values: number; bytes: number }>;

export type GgmlTypeName = keyof typeof GGML_TYPES;

/** Whole numbers are written as u32, others as f32; `{ f32 }` and `{ i32 }` say it, and make arrays. */
export type GgufValue = string | boolean | number | string[] | { f32: number | number[] } | { i32: number[] };

export interface GgufTensor {
  name: string;
  type: GgmlTypeName;
  /** Innermost first: a matrix [out, in] is [in, out] here. */
  shape: readonly number[];
  /** The bytes, made when their turn comes; pieces may share memory. */
  data: () => Iterable<Uint8Array> | AsyncIterable<Uint8Array>;
}

/** Bytes of a tensor. Its rows (innermost dimension) must be whole blocks. */
export function ggmlBytes(type: GgmlTypeName, shape: readonly number[]): number {
  const { values, bytes } = GGML_TYPES[type];
  if (shape[0]! % values !== 0)
    throw new EacMoeError(
      'INTERNAL',
      `rows of ${shape[0]} values are not whole blocks of ${type} (${values} values)`,
    );
  return (shape.reduce((a, b) => a * b, 1) / values) * bytes;
}

const padding = (bytes: number) => (ALIGNMENT - (bytes % ALIGNMENT)) % ALIGNMENT;

const TYPE = { u32: 4, i32: 5, f32: 6, bool: 7, string: 8, array: 9 };

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
    if (typeof value === 'string') return this.u32(TYPE.string).string(value);
    if (typeof value === 'boolean') return this.u32(TYPE.bool).bytes(Buffer.of(value ? 1 : 0));
    if (typeof value === 'number')
      return Number.isInteger(value) ? this.u32(TYPE.u32).u32(value) : this.u32(TYPE.f32).f32(value);
    if (Array.isArray(value)) {
      this.u32(TYPE.array).u32(TYPE.string).u64(value.length);
      for (const text of value) this.string(text);
      return this;
    }
    if ('f32' in value && typeof value.f32 === 'number') return this.u32(TYPE.f32).f32(value.f32);
    const numbers = 'i32' in value ? Int32Array.from(value.i32) : Float32Array.from(value.f32 as number[]);
    this.u32(TYPE.array)
      .u32('i32' in value ? TYPE.i32 : TYPE.f32)
      .u64(numbers.length);
    return this.bytes(Buffer.from(numbers.buffer));
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

async function* chunks(head: Buffer, tensors: readonly GgufTensor[]): AsyncGenerator<Uint8Array> {
  yield head;
  for (const { name, type, shape, data } of tensors) {
    let bytes = 0;
    for await (const piece of data()) {
      bytes += piece.byteLength;
      yield piece;
    }
    const expected = ggmlBytes(type, shape);
    if (bytes !== expected)
      throw new EacMoeError(
        'INTERNAL',
        `tensor '${name}' has ${bytes} bytes; ${type} [${shape.join(', ')}] takes ${expected}`,
      );
    yield Buffer.alloc(padding(expected));
  }
}

/** Bytes of a whole file. */
export function ggufBytes(metadata: Record<string, GgufValue>, tensors: readonly GgufTensor[]): number {
  const sizes = tensors.map(({ type, shape }) => ggmlBytes(type, shape));
  return sizes.reduce((sum, n) => sum + n + padding(n), header(metadata, tensors).byteLength);
}

/** Writes the file, atomically, one piece of a tensor in memory at a time. Returns its bytes. */
export async function writeGguf(
  path: string,
  metadata: Record<string, GgufValue>,
  tensors: readonly GgufTensor[],
): Promise<number> {
  const size = ggufBytes(metadata, tensors);
  await writeFileAtomic(path, chunks(header(metadata, tensors), tensors), size);
  return size;
}
