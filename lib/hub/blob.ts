/** One file of a repository: downloaded from where an earlier try ended, and in place only once its hash is right. */
import { createHash } from 'node:crypto';
import { constants, createReadStream, existsSync } from 'node:fs';
import { open, rename, rm, truncate, writeFile } from 'node:fs/promises';
import { EacMoeError } from '../errors';
import { outputError } from '../checkpoint/files';
import { Broken, type Connection } from './connection';

export interface RemoteFile {
  /** In the repository. */
  path: string;
  /** Bytes. */
  size: number;
  /** Hash of the content, and its name in the cache: SHA-256 (LFS), or git's SHA-1. */
  hash: string;
  lfs: boolean;
}

export const partialOf = (blob: string) => `${blob}.incomplete`;

/**
 * Downloads `file` from `url` to `blob`. `onBytes` is told how many bytes more (or fewer) are there.
 *
 * Bytes are written at their own positions and nothing is ever cut off, so that two processes that miss each other's lock write the
 * same bytes to the same places.
 *
 * @throws EacMoeError HUB_UNAVAILABLE after `settings.tries` tries without progress or for content of another hash, OUTPUT, ABORTED
 */
export async function downloadBlob(
  connection: Connection,
  url: string,
  file: RemoteFile,
  blob: string,
  onBytes: (change: number) => void,
): Promise<void> {
  const partial = partialOf(blob);
  // Damage may have been in what an earlier run left: what all comes from this one has a second chance.
  for (let chances = 2; chances > 0; chances--) {
    await downloadRest(connection, url, file, partial, onBytes);
    if ((await hashOf(partial, file, connection)) === file.hash) {
      await rename(partial, blob).catch((cause: unknown) => {
        if (!existsSync(blob)) throw outputError(blob, file.size, cause);
      });
      return;
    }
    await rm(partial, { force: true });
    onBytes(-file.size);
  }
  const kind = file.lfs ? 'SHA-256' : 'git hash';
  throw connection.error(
    'HUB_UNAVAILABLE',
    `${url}: the content that arrives does not have the ${kind} that the hub lists, ${file.hash}; nothing of it was kept. Try again later, or another HF_ENDPOINT`,
  );
}

async function downloadRest(
  connection: Connection,
  url: string,
  { size }: RemoteFile,
  partial: string,
  onBytes: (change: number) => void,
): Promise<void> {
  const onDisk = <T>(work: Promise<T>) =>
    work.catch((cause: unknown) => Promise.reject(outputError(partial, size, cause)));
  const handle = await onDisk(open(partial, constants.O_WRONLY | constants.O_CREAT));
  try {
    let at = Math.min((await handle.stat()).size, size);
    onBytes(at);
    const attempt = () =>
      connection.request(url, { headers: { range: `bytes=${at}-` } }, async (response, body) => {
        const start = startOf(response, at, size);
        onBytes(start - at);
        at = start;
        for await (const chunk of body) {
          if (at + chunk.byteLength > size)
            throw connection.error(
              'HUB_UNAVAILABLE',
              `${url}: sends more than the ${size} bytes that the hub lists`,
            );
          for (let done = 0; done < chunk.byteLength;)
            done += (await onDisk(handle.write(chunk, done, chunk.byteLength - done, at + done)))
              .bytesWritten;
          at += chunk.byteLength;
          onBytes(chunk.byteLength);
        }
        if (at < size) throw new Broken(`${url}: the connection ended after ${at} of ${size} bytes`);
      });
    if (at < size) await connection.repeat(attempt, { position: () => at });
    await onDisk(handle.sync());
  } finally {
    await handle.close();
  }
}

/** Longest header of a safetensors file that is believed; the format's own limit. */
const MAX_HEADER = 100e6;
/** Holds most headers; another request brings the rest. */
const FIRST = 2 ** 18;

/** Writes a file as long as a safetensors file of the hub that holds no more than its header. */
export async function downloadHeader(
  connection: Connection,
  url: string,
  { size }: RemoteFile,
  target: string,
): Promise<void> {
  const read = (from: number, to: number) =>
    connection.repeat(() =>
      connection.request(url, { headers: { range: `bytes=${from}-${to - 1}` } }, async (response, body) => {
        let skip = from - startOf(response, from, size);
        const parts: Uint8Array[] = [];
        let length = 0;
        for await (const part of body) {
          const rest = part.subarray(Math.min(skip, part.byteLength));
          skip -= part.byteLength - rest.byteLength;
          parts.push(rest);
          if ((length += rest.byteLength) >= to - from) return Buffer.concat(parts).subarray(0, to - from);
        }
        throw new Broken(`${url}: the connection ended after ${length} of ${to - from} bytes`);
      }),
    );
  const first = size > 0 ? await read(0, Math.min(size, FIRST)) : Buffer.alloc(0);
  const end = first.byteLength < 8 ? size : 8 + Number(first.readBigUInt64LE());
  // A length that cannot be true is for the reader of the file to complain about.
  const more = end > first.byteLength && end <= Math.min(size, MAX_HEADER);
  const header = more ? Buffer.concat([first, await read(first.byteLength, end)]) : first.subarray(0, end);
  try {
    await writeFile(target, header);
    await truncate(target, size);
  } catch (cause) {
    throw outputError(target, header.byteLength, cause);
  }
}

/** Where the body begins: where it was asked to, or at 0 where the server knows no ranges. */
function startOf({ status, headers, url }: Response, at: number, size: number): number {
  if (status !== 206) return 0;
  const range = headers.get('content-range') ?? '';
  const [, first, total] = /^bytes (\d+)-\d+\/(\d+|\*)$/.exec(range) ?? [];
  if (Number(first) === at && (total === '*' || Number(total) === size)) return at;
  throw new Broken(`${url}: asked for the bytes from ${at} of ${size}, the server sends '${range}'`);
}

/** Of the file as it is on the disk. */
async function hashOf(path: string, { size, lfs }: RemoteFile, connection: Connection): Promise<string> {
  const hash = createHash(lfs ? 'sha256' : 'sha1');
  if (!lfs) hash.update(`blob ${size}\0`);
  try {
    for await (const chunk of createReadStream(path, { highWaterMark: 2 ** 20 })) {
      connection.checkAborted();
      hash.update(chunk as Uint8Array);
    }
  } catch (cause) {
    if (cause instanceof EacMoeError) throw cause;
    throw outputError(path, size, cause);
  }
  return hash.digest('hex');
}
