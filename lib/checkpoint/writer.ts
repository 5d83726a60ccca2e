/**
 * Writing safetensors files, atomically (see files.ts) and deterministically: equal entries give equal bytes.
 *
 * LAYOUT   The header is padded with spaces to a multiple of 8 bytes. Tensors whose size is a multiple of 8 bytes come first, in the
 *          order given, so each begins at a multiple of 8; the others follow by falling element size, so each is aligned to its elements.
 *          (The format allows no padding between tensors.)
 */
import type { Tensor } from '../../types/native';
import { EacMoeError } from '../errors';
import { elementBytes, fileDType, tensorBytes } from './dtypes';
import { writeFileAtomic } from './files';

/** Tensors are copied out of native memory in pieces of about this size. */
const PIECE_BYTES = 32 * 2 ** 20;

export type TensorData = Uint8Array | Tensor;

export interface TensorEntry {
  name: string;
  /** safetensors spelling; by default that of the tensor. */
  dtype?: string;
  /** By default that of the tensor. */
  shape?: readonly number[];
  /** Raw little-endian bytes, a tensor, or a function that gives one when its turn to be written comes (then give dtype and shape). */
  data: TensorData | (() => TensorData | Promise<TensorData>);
}

interface Placed {
  name: string;
  dtype: string;
  shape: readonly number[];
  bytes: number;
  data: TensorEntry['data'];
}

/** Not `instanceof`: bytes may come from another realm. */
function isBytes(data: TensorData): data is Uint8Array {
  return ArrayBuffer.isView(data);
}

function place(path: string, entry: TensorEntry): Placed {
  const { name, data } = entry;
  const tensor = typeof data === 'object' && !isBytes(data) ? data : undefined;
  const dtype = entry.dtype ?? (tensor && fileDType(tensor.dtype));
  const shape = entry.shape ?? tensor?.shape;
  const bytes = dtype === undefined || shape === undefined ? undefined : tensorBytes(dtype, shape);
  if (dtype === undefined || shape === undefined || bytes === undefined) {
    throw new EacMoeError(
      'INVALID_ARGUMENT',
      `${path}: tensor '${name}' needs a known dtype and a shape, found ${dtype} and ${shape}`,
    );
  }
  return { name, dtype, shape, bytes, data };
}

function order(entries: Placed[]): Placed[] {
  const whole = entries.filter((e) => e.bytes % 8 === 0);
  const rest = entries.filter((e) => e.bytes % 8 !== 0);
  // Array.prototype.sort is stable: equal sizes keep their order.
  return [...whole, ...rest.sort((a, b) => elementBytes(b.dtype)! - elementBytes(a.dtype)!)];
}

function encodeHeader(entries: Placed[], metadata: Record<string, string>): Uint8Array {
  // Pairs, not an object: names like '7' would move to the front of an object's keys.
  const items = Object.keys(metadata).length > 0 ? [`"__metadata__":${JSON.stringify(metadata)}`] : [];
  let at = 0;
  for (const { name, dtype, shape, bytes } of entries) {
    items.push(`${JSON.stringify(name)}:${JSON.stringify({ dtype, shape, data_offsets: [at, at + bytes] })}`);
    at += bytes;
  }
  const json = Buffer.from(`{${items.join(',')}}`, 'utf8');
  const header = Buffer.alloc(8 + Math.ceil(json.byteLength / 8) * 8, ' ');
  header.writeBigUInt64LE(BigInt(header.byteLength - 8));
  json.copy(header, 8);
  return header;
}

function* pieces(data: TensorData): Generator<Uint8Array> {
  if (isBytes(data)) {
    yield data;
    return;
  }
  const width = data.shape[data.shape.length - 1] ?? 1;
  const rows = data.shape.length === 0 || width === 0 ? 1 : data.shape.reduce((a, b) => a * b, 1) / width;
  if (data.byteLength <= PIECE_BYTES || rows <= 1) {
    yield data.toBytes();
    return;
  }
  const step = Math.max(1, Math.floor(PIECE_BYTES / (data.byteLength / rows)));
  for (let begin = 0; begin < rows; begin += step) {
    const view = data.rows(begin, Math.min(rows, begin + step));
    try {
      yield view.toBytes();
    } finally {
      view.dispose();
    }
  }
}

async function* fileChunks(path: string, header: Uint8Array, entries: Placed[]): AsyncGenerator<Uint8Array> {
  yield header;
  for (const entry of entries) {
    const data = typeof entry.data === 'function' ? await entry.data() : entry.data;
    if (data.byteLength !== entry.bytes) {
      throw new EacMoeError(
        'INVALID_ARGUMENT',
        `${path}: tensor '${entry.name}' has ${data.byteLength} bytes but ${entry.dtype} of shape [${entry.shape.join(', ')}] takes ${entry.bytes}`,
      );
    }
    yield* pieces(data);
  }
}

export interface WrittenFile {
  bytes: number;
  /** Of them the tensors'. */
  tensorBytes: number;
  /** In the order of the file. */
  names: string[];
}

/**
 * Writes a safetensors file. Nothing appears under `path` unless all of it was written; a full disk gives an OUTPUT error that says
 * how many bytes the file needs. The tensors stay the caller's.
 */
export async function writeSafetensors(
  path: string,
  entries: Iterable<TensorEntry> | AsyncIterable<TensorEntry>,
  metadata: Record<string, string> = { format: 'pt' },
): Promise<WrittenFile> {
  const placed: Placed[] = [];
  const seen = new Set<string>(['__metadata__']);
  for await (const entry of entries) {
    if (seen.has(entry.name))
      throw new EacMoeError('INVALID_ARGUMENT', `${path}: two tensors are named '${entry.name}'`);
    seen.add(entry.name);
    placed.push(place(path, entry));
  }
  const ordered = order(placed);
  const header = encodeHeader(ordered, metadata);
  const size = ordered.reduce((sum, e) => sum + e.bytes, header.byteLength);
  await writeFileAtomic(path, fileChunks(path, header, ordered), size);
  return { bytes: size, tensorBytes: size - header.byteLength, names: ordered.map((e) => e.name) };
}
