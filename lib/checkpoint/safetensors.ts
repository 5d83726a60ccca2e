/**
 * Reading safetensors files through a memory map.
 *
 * LAYOUT   8 bytes: header length n, little-endian; n bytes: a JSON object, padded with spaces; then the tensors' data.
 *          The header maps each name to { dtype, shape, data_offsets: [begin, end) relative to the data }, and `__metadata__` to strings.
 * LIMITS   Every byte of the data belongs to exactly one tensor: no holes, no overlap. A header is at most 100 MB.
 * Source   https://github.com/huggingface/safetensors (format section of the README)
 */
import { closeSync, openSync, readSync, statSync } from 'node:fs';
import { basename } from 'node:path';
import type { MappedFile, Tensor } from '../../types/native';
import { EacMoeError } from '../errors';
import { native } from '../native';
import { elementBytes, KNOWN_DTYPES, NATIVE_DTYPES, nativeDType, tensorBytes } from './dtypes';
import { describeValue, isLfsPointer } from './files';

export { writeSafetensors, type TensorData, type TensorEntry, type WrittenFile } from './writer';

const MAX_HEADER_BYTES = 100_000_000;

export interface TensorInfo {
  readonly name: string;
  /** As the file spells it: 'BF16', 'F32', ... */
  readonly dtype: string;
  readonly shape: readonly number[];
  /** Name of the file, without its directory. */
  readonly file: string;
  /** Bytes of data. */
  readonly bytes: number;
  /** Offset of the data from the start of the file. */
  readonly offset: number;
}

export interface SafetensorsHeader {
  readonly metadata: Readonly<Record<string, string>>;
  /** In the order of the data. */
  readonly tensors: ReadonlyMap<string, TensorInfo>;
}

/**
 * The first key that an object of this (syntactically valid) JSON text holds twice; JSON.parse would keep the last one in silence,
 * and two readers could then disagree about where a tensor lies.
 */
function duplicateKey(text: string): string | undefined {
  const scopes: Set<string>[] = [];
  for (let at = 0; at < text.length; at++) {
    const c = text[at];
    if (c === '{') scopes.push(new Set());
    else if (c === '}') scopes.pop();
    else if (c === '"') {
      const begin = at++;
      while (text[at] !== '"') at += text[at] === '\\' ? 2 : 1;
      let next = at + 1;
      while (/\s/.test(text[next] ?? '')) next++;
      if (text[next] !== ':') continue;
      const key = JSON.parse(text.slice(begin, at + 1)) as string;
      const scope = scopes[scopes.length - 1]!;
      if (scope.has(key)) return key;
      scope.add(key);
    }
  }
  return undefined;
}

/** Checks the 8-byte prefix of a file of `fileBytes` bytes; returns the header's length. */
function headerLength(path: string, prefix: Uint8Array, fileBytes: number): number {
  const fail = (what: string): never => {
    throw new EacMoeError('INVALID_CHECKPOINT', `${path}: ${what}`);
  };
  if (isLfsPointer(prefix)) fail('is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`');
  if (fileBytes < 8)
    fail(`has ${fileBytes} bytes, fewer than the 8 of a safetensors header length; the file is truncated`);
  const length = Buffer.from(prefix.buffer, prefix.byteOffset, 8).readBigUInt64LE();
  if (length > BigInt(fileBytes - 8)) {
    fail(
      `its header should have ${length} bytes but only ${fileBytes - 8} follow; the file is truncated or no safetensors file`,
    );
  }
  if (length > BigInt(MAX_HEADER_BYTES))
    fail(`its header has ${length} bytes, more than the ${MAX_HEADER_BYTES} that safetensors allows`);
  return Number(length);
}

function isCount(value: unknown): value is number {
  return typeof value === 'number' && Number.isSafeInteger(value) && value >= 0;
}

function parseEntry(
  path: string,
  name: string,
  value: unknown,
  dataBegin: number,
  dataBytes: number,
): TensorInfo {
  const fail = (what: string): never => {
    throw new EacMoeError('INVALID_CHECKPOINT', `${path}: tensor '${name}': ${what}`);
  };
  if (typeof value !== 'object' || value === null || Array.isArray(value))
    fail(`expected an object, found ${describeValue(value)}`);
  const { dtype, shape, data_offsets: offsets } = value as Record<string, unknown>;
  if (typeof dtype !== 'string') return fail(`dtype must be a string, found ${describeValue(dtype)}`);
  if (elementBytes(dtype) === undefined)
    fail(`unknown dtype ${describeValue(dtype)}; known are ${KNOWN_DTYPES.join(', ')}`);
  if (!Array.isArray(shape) || !shape.every(isCount)) {
    return fail(`shape must be a list of non-negative integers, found ${describeValue(shape)}`);
  }
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isCount)) {
    return fail(`data_offsets must be two non-negative integers, found ${describeValue(offsets)}`);
  }
  const [begin, end] = offsets as [number, number];
  const bytes = tensorBytes(dtype, shape);
  if (bytes === undefined)
    return fail(`shape [${shape.join(', ')}] of ${dtype} is not a whole, addressable number of bytes`);
  if (end < begin) fail(`data_offsets end at ${end}, before their begin ${begin}`);
  if (end - begin !== bytes) {
    fail(`data_offsets span ${end - begin} bytes but ${dtype} of shape [${shape.join(', ')}] takes ${bytes}`);
  }
  if (end > dataBytes)
    fail(`data_offsets end at ${end} but the file has ${dataBytes} bytes of data; the file is truncated`);
  return { name, dtype, shape, file: basename(path), bytes, offset: dataBegin + begin };
}

function parseMetadata(path: string, value: unknown): Record<string, string> {
  const valid =
    typeof value === 'object' && value !== null && Object.values(value).every((v) => typeof v === 'string');
  if (!valid)
    throw new EacMoeError(
      'INVALID_CHECKPOINT',
      `${path}: __metadata__ must map names to strings, found ${describeValue(value)}`,
    );
  return value as Record<string, string>;
}

/** Fails unless the tensors, sorted by offset, cover the data without hole or overlap. */
function checkCoverage(path: string, sorted: TensorInfo[], dataBegin: number, dataBytes: number): void {
  let end = 0;
  let previous: TensorInfo | undefined;
  for (const info of sorted) {
    const begin = info.offset - dataBegin;
    const after = previous ? `after tensor '${previous.name}'` : 'at the start of the data';
    if (begin < end) {
      throw new EacMoeError(
        'INVALID_CHECKPOINT',
        `${path}: tensors '${previous!.name}' and '${info.name}' overlap: the first ends at ${end}, the second begins at ${begin}`,
      );
    }
    if (begin > end) {
      throw new EacMoeError(
        'INVALID_CHECKPOINT',
        `${path}: bytes ${end} to ${begin} ${after} belong to no tensor; '${info.name}' should begin at ${end}, not ${begin}`,
      );
    }
    end = begin + info.bytes;
    previous = info;
  }
  if (end !== dataBytes) {
    throw new EacMoeError(
      'INVALID_CHECKPOINT',
      `${path}: the tensors take ${end} bytes but the file has ${dataBytes} bytes of data; ${dataBytes - end} belong to no tensor`,
    );
  }
}

/** Parses and checks the header of a file of `fileBytes` bytes. `header` is its JSON text, without the length. */
export function parseHeader(path: string, header: Uint8Array, fileBytes: number): SafetensorsHeader {
  const fail = (what: string, cause?: unknown): never => {
    throw new EacMoeError('INVALID_CHECKPOINT', `${path}: ${what}`, { cause });
  };
  let text = '';
  let value: unknown;
  try {
    text = new TextDecoder('utf-8', { fatal: true }).decode(header);
  } catch (cause) {
    fail(`its header of ${header.byteLength} bytes is not UTF-8; no safetensors file, or damaged`, cause);
  }
  try {
    value = JSON.parse(text);
  } catch (cause) {
    fail(`its header of ${header.byteLength} bytes is not valid JSON: ${(cause as Error).message}`, cause);
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value))
    fail(`its header must be a JSON object, found ${describeValue(value)}`);
  const duplicate = duplicateKey(text);
  if (duplicate !== undefined) fail(`its header holds the key '${duplicate}' twice`);

  const dataBegin = 8 + header.byteLength;
  const dataBytes = fileBytes - dataBegin;
  let metadata: Record<string, string> = {};
  const sorted: TensorInfo[] = [];
  for (const [name, entry] of Object.entries(value as Record<string, unknown>)) {
    if (name === '__metadata__') metadata = parseMetadata(path, entry);
    else sorted.push(parseEntry(path, name, entry, dataBegin, dataBytes));
  }
  // Empty tensors sort before the one that begins where they lie.
  sorted.sort((a, b) => a.offset - b.offset || a.bytes - b.bytes);
  checkCoverage(path, sorted, dataBegin, dataBytes);
  return { metadata, tensors: new Map(sorted.map((info) => [info.name, info])) };
}

function readPrefix(path: string): { header: Uint8Array; fileBytes: number } {
  const stat = statSync(path, { throwIfNoEntry: false });
  if (!stat?.isFile()) throw new EacMoeError('FILE_NOT_FOUND', `${path}: no such file`);
  let fd: number;
  try {
    fd = openSync(path, 'r');
  } catch (cause) {
    throw new EacMoeError('FILE_NOT_FOUND', `${path}: cannot be read: ${(cause as Error).message}`, {
      cause,
    });
  }
  try {
    const prefix = new Uint8Array(32);
    readSync(fd, prefix, 0, prefix.length, 0);
    const header = new Uint8Array(headerLength(path, prefix, stat.size));
    for (let at = 0; at < header.byteLength;) {
      const n = readSync(fd, header, at, header.byteLength - at, 8 + at);
      if (n === 0)
        throw new EacMoeError(
          'INVALID_CHECKPOINT',
          `${path}: ends inside its header; the file is being changed`,
        );
      at += n;
    }
    return { header, fileBytes: stat.size };
  } finally {
    closeSync(fd);
  }
}

/** One open safetensors file. The header is read at once; the data are mapped on the first tensor. */
export class SafetensorsFile {
  readonly path: string;
  readonly byteLength: number;
  /** The raw JSON text. */
  readonly header: Uint8Array;
  readonly metadata: Readonly<Record<string, string>>;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  #mapping: MappedFile | undefined;
  #disposed = false;

  constructor(path: string) {
    const { header, fileBytes } = readPrefix(path);
    this.path = path;
    this.byteLength = fileBytes;
    this.header = header;
    const parsed = parseHeader(path, header, fileBytes);
    this.metadata = parsed.metadata;
    this.tensors = parsed.tensors;
  }

  #map(): MappedFile {
    if (this.#disposed) throw new EacMoeError('DISPOSED', `${this.path}: was closed by dispose()`);
    if (!this.#mapping) {
      const mapping = native().mapFile(this.path);
      // A file that shrank after its header was read would fault on access.
      if (mapping.byteLength !== this.byteLength) {
        mapping.dispose();
        throw new EacMoeError(
          'INVALID_CHECKPOINT',
          `${this.path}: had ${this.byteLength} bytes when it was opened and has ${mapping.byteLength} now; it is being changed`,
        );
      }
      this.#mapping = mapping;
    }
    return this.#mapping;
  }

  info(name: string): TensorInfo {
    const info = this.tensors.get(name);
    if (!info) throw new EacMoeError('INVALID_TENSOR', `${this.path}: has no tensor '${name}'`);
    return info;
  }

  /** A tensor over the mapping; it keeps the mapping alive. */
  tensor(name: string): Tensor {
    const info = this.info(name);
    const dtype = nativeDType(info.dtype);
    if (!dtype) {
      throw new EacMoeError(
        'INVALID_TENSOR',
        `${this.path}: tensor '${name}' has dtype ${info.dtype}, which is not supported; supported are ${NATIVE_DTYPES.join(', ')}`,
      );
    }
    const mapping = this.#map();
    // Old writers do not pad the header: copy what an element-wise load could not read in place.
    if (info.offset % elementBytes(info.dtype)! !== 0) {
      return native().fromBytes(mapping.bytes(info.offset, info.offset + info.bytes), dtype, [...info.shape]);
    }
    return mapping.tensor(dtype, [...info.shape], info.offset);
  }

  /** A copy of a tensor's bytes, whatever its dtype. */
  bytes(name: string): Uint8Array {
    const info = this.info(name);
    return this.#map().bytes(info.offset, info.offset + info.bytes);
  }

  /** Lets the pages of these tensors leave memory; they are read again on use. */
  release(names: Iterable<string>): void {
    if (!this.#mapping) return;
    for (const name of names) {
      const info = this.info(name);
      this.#mapping.release(info.offset, info.offset + info.bytes);
    }
  }

  dispose(): void {
    this.#disposed = true;
    this.#mapping?.dispose();
    this.#mapping = undefined;
  }
}

/** Opens a safetensors file and checks its header against its size. Errors name the file, the tensor and the numbers. */
export function openSafetensors(path: string): SafetensorsFile {
  return new SafetensorsFile(path);
}
