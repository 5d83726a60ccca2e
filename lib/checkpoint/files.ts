/**
 * Files of a model directory: JSON read with errors that name the file, and atomic writes. A file is written under a temporary name in
 * the same directory, synced and renamed, so that a reader sees the old content or the whole new one, never a half.
 */
import { createHash } from 'node:crypto';
import { existsSync, readdirSync, readFileSync, statSync, unlinkSync } from 'node:fs';
import { mkdir, open, rename, rm, statfs, type FileHandle } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { EacMoeError } from '../errors';

/** The largest single write; Node refuses buffers of 2 GiB and more. */
const WRITE_CHUNK = 64 * 2 ** 20;
const TEMPORARY = /^\..+\.tmp-\d+-\d+$/;
let temporaries = 0;

const LFS_POINTER = 'version https://git-lfs';

function errnoOf(error: unknown): string | undefined {
  return (error as NodeJS.ErrnoException | undefined)?.code;
}

/** The bytes of a small file. `missing` says what its absence means. */
export function readBytes(path: string, missing = 'no such file'): Buffer {
  try {
    return readFileSync(path);
  } catch (cause) {
    if (errnoOf(cause) === 'ENOENT')
      throw new EacMoeError('FILE_NOT_FOUND', `${path}: ${missing}`, { cause });
    throw new EacMoeError('FILE_NOT_FOUND', `${path}: cannot be read: ${(cause as Error).message}`, {
      cause,
    });
  }
}

/** Text that may be a pointer of Git LFS where the file itself was never fetched. */
export function isLfsPointer(head: Uint8Array): boolean {
  return (
    Buffer.from(head.buffer, head.byteOffset, Math.min(head.byteLength, LFS_POINTER.length)).toString(
      'latin1',
    ) === LFS_POINTER
  );
}

/** Parses bytes as a JSON object. */
export function parseJsonObject(bytes: Uint8Array, path: string): Record<string, unknown> {
  const fail = (what: string, cause?: unknown): never => {
    throw new EacMoeError('INVALID_CHECKPOINT', `${path}: ${what}`, { cause });
  };
  if (isLfsPointer(bytes)) fail('is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`');
  let value: unknown;
  try {
    value = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes));
  } catch (cause) {
    fail(`is not valid JSON: ${(cause as Error).message}`, cause);
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value))
    fail(`must hold a JSON object, found ${describeValue(value)}`);
  return value as Record<string, unknown>;
}

export function readJsonObject(path: string, missing?: string): Record<string, unknown> {
  return parseJsonObject(readBytes(path, missing), path);
}

/** `value` for an error message: short, and with its kind. */
export function describeValue(value: unknown): string {
  if (value === undefined || value === null) return 'nothing';
  const text = JSON.stringify(value) ?? String(value);
  return text.length > 60 ? `${text.slice(0, 57)}...` : text;
}

export function assertDirectory(dir: string): void {
  const stat = statSync(dir, { throwIfNoEntry: false });
  if (!stat) throw new EacMoeError('FILE_NOT_FOUND', `${dir}: no such directory`);
  if (!stat.isDirectory())
    throw new EacMoeError('FILE_NOT_FOUND', `${dir}: expected the directory of a model, found a file`);
}

/** What the file system said while `path`, a file of `bytes` bytes, was written. */
export function outputError(path: string, bytes: number, cause: unknown): EacMoeError {
  const code = errnoOf(cause);
  if (code === 'ENOSPC' || code === 'EDQUOT') {
    return new EacMoeError('OUTPUT', `${path}: the disk is full; the file needs ${bytes} bytes`, { cause });
  }
  return new EacMoeError('OUTPUT', `${path}: cannot be written: ${(cause as Error).message}`, { cause });
}

async function writeAll(file: FileHandle, bytes: Uint8Array): Promise<void> {
  for (let at = 0; at < bytes.byteLength;) {
    const { bytesWritten } = await file.write(bytes, at, Math.min(WRITE_CHUNK, bytes.byteLength - at));
    at += bytesWritten;
  }
}

/** Makes a rename last; some file systems cannot sync a directory, and then nothing better exists. */
async function syncDirectory(dir: string): Promise<void> {
  const handle = await open(dir, 'r').catch(() => undefined);
  await handle?.sync().catch(() => undefined);
  await handle?.close();
}

/**
 * Writes a file of `size` bytes from `chunks`. On any failure the temporary file is removed, `path` is untouched, and the error is
 * an EacMoeError: OUTPUT for the file system's, its own for one that `chunks` throws.
 */
export async function writeFileAtomic(
  path: string,
  chunks: Iterable<Uint8Array> | AsyncIterable<Uint8Array>,
  size: number,
): Promise<void> {
  const temporary = join(dirname(path), `.${basename(path)}.tmp-${process.pid}-${temporaries++}`);
  let file: FileHandle | undefined;
  try {
    file = await open(temporary, 'wx');
    for await (const chunk of chunks) await writeAll(file, chunk);
    await file.sync();
    await file.close();
    file = undefined;
    await rename(temporary, path);
    await syncDirectory(dirname(path));
  } catch (cause) {
    await file?.close().catch(() => undefined);
    await rm(temporary, { force: true }).catch(() => undefined);
    throw cause instanceof EacMoeError ? cause : outputError(path, size, cause);
  }
}

export async function writeText(path: string, text: string): Promise<void> {
  const bytes = Buffer.from(text, 'utf8');
  await writeFileAtomic(path, [bytes], bytes.byteLength);
}

/** Two spaces, a newline at the end, keys in insertion order: equal values give equal bytes. */
export async function writeJson(path: string, value: unknown): Promise<void> {
  await writeText(path, `${JSON.stringify(value, null, 2)}\n`);
}

/** Removes temporary files that a killed writer left in `dir`. Call it only when no other writer is at work there. */
export function removeTemporaryFiles(dir: string): void {
  for (const name of readdirSync(dir)) if (TEMPORARY.test(name)) unlinkSync(join(dir, name));
}

/** True for the names that `writeFileAtomic` uses before the rename. */
export function isTemporaryFile(name: string): boolean {
  return TEMPORARY.test(name);
}

/** Files beside the weights that a compressed copy of a model carries along unchanged. */
export const COMPANIONS: readonly string[] = [
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'tokenizer.model',
  'chat_template.jinja',
  'chat_template.json',
  'generation_config.json',
];

export function companionFiles(dir: string): string[] {
  return COMPANIONS.filter((name) => existsSync(join(dir, name)));
}

/** Copies the companion files of `from` into `to`, each atomically. */
export async function copyCompanionFiles(from: string, to: string): Promise<void> {
  for (const name of companionFiles(from)) {
    const bytes = readBytes(join(from, name));
    await writeFileAtomic(join(to, name), [bytes], bytes.byteLength);
  }
}

export function sha256(parts: Iterable<Uint8Array | string>): string {
  const hash = createHash('sha256');
  for (const part of parts) hash.update(part);
  return hash.digest('hex');
}

/** Creates a directory and those above it. */
export async function makeDirectory(dir: string): Promise<void> {
  try {
    await mkdir(dir, { recursive: true });
  } catch (cause) {
    throw new EacMoeError('OUTPUT', `${dir}: cannot be created: ${(cause as Error).message}`, { cause });
  }
}

/** Fails with OUTPUT where the file system of `path` has less space: said at the beginning, not found out after hours. */
export async function checkSpace(path: string, bytes: number): Promise<void> {
  let existing = resolve(path);
  while (!existsSync(existing)) existing = dirname(existing);
  const { bavail, bsize } = await statfs(existing);
  const free = Number(bavail) * Number(bsize);
  if (free < bytes) {
    const mb = (n: number) => `${Math.ceil(n / 1e6)} MB`;
    throw new EacMoeError(
      'OUTPUT',
      `${path}: the disk has ${mb(free)} free, the output needs about ${mb(bytes)}`,
    );
  }
}
