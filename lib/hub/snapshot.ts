/**
 * A revision of a repository in the cache that the hub's clients share:
 *
 *   models--<owner>--<name>/refs/<branch or tag>       the commit's hash
 *                           snapshots/<commit>/<file>  a link to
 *                           blobs/<hash>               the content
 */
import { existsSync, readFileSync, statSync } from 'node:fs';
import { mkdir, rm, statfs, symlink } from 'node:fs/promises';
import { basename, join, relative } from 'node:path';
import type { ListFileEntry } from '@huggingface/hub';
import { COMPANIONS, outputError, writeText } from '../checkpoint/files';
import { INDEX, readIndex, SINGLE } from '../checkpoint/source';
import { EacMoeError } from '../errors';
import { downloadBlob, downloadHeader, partialOf, type RemoteFile } from './blob';
import { client } from './client';
import { Connection } from './connection';
import { withLock } from './lock';
import type { HubSettings } from './settings';

export interface DownloadProgress {
  stage: 'download';
  /** Of the weights, from 0 to 1; those that were there before count. */
  fraction: number;
  /** Of the weights; 0 of 0 while something else is downloaded. */
  bytes: number;
  totalBytes: number;
  /** What is being done, for people. */
  message: string;
}

export interface DownloadOptions {
  onProgress?: (progress: DownloadProgress) => void;
  signal?: AbortSignal;
}

export const PREFIX = 'hf:';
/** Files downloaded at a time. */
const STREAMS = 4;
/** Milliseconds between reports of progress. */
const REPORT = 100;
const COMMIT = /^[0-9a-f]{40}$/;

/** The names become names of directories: no dots that lead elsewhere. */
function parseReference(text: string): { repository: string; revision: string } {
  const part = '[A-Za-z0-9][A-Za-z0-9._-]{0,95}';
  const form = new RegExp(`^${PREFIX}(${part}/${part})(?:@([A-Za-z0-9][\\w./+-]*))?$`);
  const [, repository, revision = 'main'] = form.exec(text) ?? [];
  if (repository !== undefined && !/\.\.|--|\/\/|\/$/.test(`${repository}@${revision}`))
    return { repository, revision };
  const forms = `${PREFIX}<owner>/<name> or ${PREFIX}<owner>/<name>@<branch, tag or commit>`;
  throw new EacMoeError('INVALID_ARGUMENT', `${text}: expected ${forms}`);
}

export class Snapshot {
  readonly #repository: string;
  readonly #revision: string;
  readonly #connection: Connection;
  /** models--<owner>--<name> */
  readonly #folder: string;

  constructor(
    reference: string,
    private readonly settings: HubSettings,
    private readonly options: DownloadOptions,
  ) {
    const { repository, revision } = parseReference(reference);
    this.#repository = repository;
    this.#revision = revision;
    this.#connection = new Connection(settings, repository, revision, options.signal);
    this.#folder = join(settings.cache, client().getRepoFolderName({ type: 'model', name: repository }));
  }

  /** The snapshot's directory, with everything that a model is loaded from. */
  async directory(): Promise<string> {
    const found = await this.#locate();
    if (found.complete) return found.directory;
    const { directory, files } = found;
    const present = (some: RemoteFile[]) => some.every(({ path }) => existsSync(join(directory, path)));
    if (present(companions(files)) && present(this.#weights(directory, files))) {
      // A cache that has everything may be read-only.
      await this.#refer(basename(directory)).catch(() => undefined);
      return directory;
    }
    await this.#locked(async () => {
      await this.#download(directory, companions(files));
      await this.#download(directory, this.#weights(directory, files), true);
      // Last, so that an update which breaks off leaves the branch where it was.
      await this.#refer(basename(directory));
    });
    return directory;
  }

  /**
   * A directory with everything but the data of weights that are not in the cache: in `temporary`, these are files of full length that
   * hold their headers only.
   */
  async headers(temporary: string): Promise<string> {
    const found = await this.#locate();
    if (found.complete) return found.directory;
    const { directory, files } = found;
    await this.#locked(() => this.#download(directory, companions(files)));
    const weights = this.#weights(directory, files);
    for (const { path } of companions(files)) await symlink(join(directory, path), join(temporary, path));
    let done = 0;
    await this.#each(weights, async (file, connection) => {
      const [cached, target] = [join(directory, file.path), join(temporary, file.path)];
      if (existsSync(cached)) await symlink(cached, target);
      else await downloadHeader(connection, this.#url(directory, file), file, target);
      const message = `reading headers of ${this.#repository}: ${++done} of ${weights.length} files`;
      this.#report(message, 0, 0, done / weights.length);
    });
    return temporary;
  }

  /** Where the revision lies or will lie; what it consists of, unless the hub is not to be asked, or cannot be. */
  async #locate(): Promise<
    { directory: string; complete: true } | { directory: string; complete: false; files: RemoteFile[] }
  > {
    const { directory, missing } = this.#cached();
    const { offline } = this.settings;
    if (offline && missing)
      throw this.#connection.error('HUB_UNAVAILABLE', `${offline} is set, and ${missing}`);
    if (offline) return { directory, complete: true };
    try {
      // Who has something to fall back on is not kept waiting.
      const commit = await this.#commit(missing ? this.settings.tries : 1);
      const files = await this.#files(commit);
      return { directory: join(this.#folder, 'snapshots', commit), complete: false, files };
    } catch (error) {
      if (missing || !(error instanceof EacMoeError) || error.code !== 'HUB_UNAVAILABLE') throw error;
      process.emitWarning(`${error.message}. Using the cached ${directory}`, { code: 'EAC_MOE_HUB' });
      return { directory, complete: true };
    }
  }

  /** What the cache has of the revision, and what of it is missing. */
  #cached(): { directory: string; missing?: string } {
    const ref = join(this.#folder, 'refs', this.#revision);
    const commit = existsSync(ref) ? readFileSync(ref, 'utf8').trim() : this.#revision;
    const directory = join(this.#folder, 'snapshots', COMMIT.test(commit) ? commit : 'none');
    if (!existsSync(directory))
      return { directory, missing: `the cache ${this.settings.cache} does not hold it` };
    const lacks = (name: string) => !existsSync(join(directory, name));
    const weights = () => (lacks(SINGLE) ? [INDEX] : [SINGLE]);
    const shards = () => (lacks(SINGLE) ? [...readIndex(directory).values()] : []);
    const missing = ['config.json', ...weights()].find(lacks) ?? shards().find(lacks);
    return { directory, missing: missing && `the cached ${directory} lacks ${missing}` };
  }

  async #commit(tries: number): Promise<string> {
    const { sha } = await this.#understand(
      client().modelInfo({
        name: this.#repository,
        revision: this.#revision,
        additionalFields: ['sha'],
        hubUrl: this.settings.endpoint,
        fetch: this.#connection.fetcher(tries),
      }),
    );
    if (COMMIT.test(sha)) return sha;
    throw this.#connection.error('HUB_UNAVAILABLE', `${this.settings.endpoint} names no commit for it`);
  }

  /** What of the commit a model is loaded from; nothing below its first level is. */
  async #files(commit: string): Promise<RemoteFile[]> {
    const listing = client().listFiles({
      repo: { type: 'model', name: this.#repository },
      revision: commit,
      hubUrl: this.settings.endpoint,
      fetch: this.#connection.fetcher(),
    });
    const entries: ListFileEntry[] = [];
    await this.#understand(
      (async () => {
        for await (const entry of listing) if (entry.type === 'file') entries.push(entry);
      })(),
    );
    const names = entries.map(({ path }) => path);
    const files: RemoteFile[] = [];
    for (const { path, size, oid, lfs } of entries) {
      const wanted = [...COMPANIONS, 'config.json', INDEX].includes(path);
      if (!wanted && !/^\w[\w.-]*\.safetensors$/.test(path)) continue;
      const hash = lfs?.oid ?? oid ?? '';
      if (!(lfs ? /^[0-9a-f]{64}$/ : COMMIT).test(hash))
        throw this.#connection.error('HUB_UNAVAILABLE', `the hub lists ${path} without a hash`);
      files.push({ path, size: lfs?.size ?? size, hash, lfs: lfs !== undefined });
    }
    for (const needed of [['config.json'], [SINGLE, INDEX]]) {
      if (needed.some((name) => names.includes(name))) continue;
      const other = names.find((name) => /\.(bin|pt|pth|gguf|safetensors)$/.test(name));
      const hint = other
        ? `; it holds ${other}: look for a repository in Hugging Face's safetensors layout`
        : '';
      throw this.#connection.error(
        'HUB_NOT_FOUND',
        `the repository has no ${needed.join(' and no ')}${hint}`,
      );
    }
    return files;
  }

  /** What the client makes of an answer that is not the hub's (a login page, say) becomes an error of ours. */
  #understand<T>(answer: Promise<T>): Promise<T> {
    return answer.catch((cause: unknown) => {
      if (cause instanceof EacMoeError) throw cause;
      const what = `${this.settings.endpoint} does not answer as a hub does: ${(cause as Error).message}`;
      throw this.#connection.error('HUB_UNAVAILABLE', what, cause);
    });
  }

  /** The weight files that `Checkpoint` opens, of all that there are. */
  #weights(directory: string, files: RemoteFile[]): RemoteFile[] {
    const single = files.find(({ path }) => path === SINGLE);
    if (single) return [single];
    return [...new Set(readIndex(directory).values())].map((name) => {
      const file = files.find(({ path }) => path === name);
      if (file) return file;
      throw this.#connection.error(
        'INVALID_CHECKPOINT',
        `${INDEX} lists ${name}, which the repository lacks`,
      );
    });
  }

  #locked(work: () => Promise<void>): Promise<void> {
    const { signal } = this.options;
    const path = join(this.settings.cache, '.locks', basename(this.#folder), 'eac-moe.lock');
    const onWait = () => {
      this.#connection.checkAborted();
      this.#report(`waiting for another process that downloads ${this.#repository}`);
    };
    return withLock(path, { signal, onWait }, work);
  }

  /** Brings `files` into the cache and links them into the snapshot. */
  async #download(directory: string, files: RemoteFile[], weights = false): Promise<void> {
    const blobs = join(this.#folder, 'blobs');
    const missing = files.filter(({ path }) => !existsSync(join(directory, path)));
    if (missing.length === 0) return;
    // Files of equal content are one blob.
    const distinct = [...new Map(missing.map((file) => [file.hash, file])).values()];
    for (const dir of [blobs, directory]) {
      await mkdir(dir, { recursive: true }).catch((cause: unknown) => {
        throw outputError(dir, 0, cause);
      });
    }
    await this.#checkSpace(distinct.filter(({ hash }) => !existsSync(join(blobs, hash))));
    let bytes = sizeOf(files) - sizeOf(missing);
    const total = bytes + sizeOf(distinct);
    const onBytes = (change: number) => {
      bytes += change;
      if (weights)
        this.#report(`downloading ${this.#repository}: ${progressText(bytes, total)}`, bytes, total);
      else this.#report(`downloading ${this.#repository}: configuration and tokenizer`);
    };
    await this.#each(distinct, async (file, connection) => {
      const blob = join(blobs, file.hash);
      if (existsSync(blob)) onBytes(file.size);
      else await downloadBlob(connection, this.#url(directory, file), file, blob, onBytes);
      const same = missing.filter(({ hash }) => hash === file.hash);
      for (const { path } of same) await link(blob, join(directory, path));
    });
  }

  /** A few at a time. The first failure ends the others, and comes out when they have ended. */
  async #each(
    files: RemoteFile[],
    work: (file: RemoteFile, connection: Connection) => Promise<void>,
  ): Promise<void> {
    const stop = new AbortController();
    const { signal } = this.options;
    const abort = () => stop.abort(signal?.reason);
    signal?.addEventListener('abort', abort, { once: true });
    const connection = new Connection(this.settings, this.#repository, this.#revision, stop.signal);
    const queue = [...files];
    const failures: unknown[] = [];
    const stream = async () => {
      for (let file = queue.shift(); file && failures.length === 0; file = queue.shift()) {
        await work(file, connection).catch((error: unknown) => {
          failures.push(error);
          stop.abort(error);
        });
      }
    };
    if (signal?.aborted) abort();
    await Promise.all(Array.from({ length: STREAMS }, stream));
    signal?.removeEventListener('abort', abort);
    if (failures.length > 0) throw failures[0];
  }

  async #checkSpace(files: RemoteFile[]): Promise<void> {
    const arrived = ({ hash }: RemoteFile) =>
      statSync(partialOf(join(this.#folder, 'blobs', hash)), { throwIfNoEntry: false })?.size ?? 0;
    const needed = files.reduce((sum, file) => sum + Math.max(0, file.size - arrived(file)), 0);
    const { bavail, bsize } = await statfs(this.#folder);
    if (needed <= bavail * bsize) return;
    const figures = `${gigabytes(needed)} GB are to be downloaded, and ${gigabytes(bavail * bsize)} GB are free`;
    const cure = 'make room, or set HF_HUB_CACHE to a folder on another disk';
    throw this.#connection.error(
      'OUTPUT',
      `${this.settings.cache}: the disk is too full: ${figures}; ${cure}`,
    );
  }

  async #refer(commit: string): Promise<void> {
    const ref = join(this.#folder, 'refs', this.#revision);
    if (this.#revision === commit || (existsSync(ref) && readFileSync(ref, 'utf8') === commit)) return;
    await mkdir(join(ref, '..'), { recursive: true }).catch((cause: unknown) => {
      throw outputError(ref, 0, cause);
    });
    await writeText(ref, commit);
  }

  #url(directory: string, { path }: RemoteFile): string {
    return `${this.settings.endpoint}/${this.#repository}/resolve/${basename(directory)}/${path}`;
  }

  #reported = 0;
  #report(
    message: string,
    bytes = 0,
    totalBytes = 0,
    fraction = totalBytes > 0 ? bytes / totalBytes : 0,
  ): void {
    const now = performance.now();
    if (now - this.#reported < REPORT && fraction < 1) return;
    this.#reported = now;
    this.options.onProgress?.({ stage: 'download', fraction, bytes, totalBytes, message });
  }
}

function companions(files: RemoteFile[]): RemoteFile[] {
  return files.filter(({ path }) => !path.endsWith('.safetensors'));
}

function sizeOf(files: RemoteFile[]): number {
  return files.reduce((sum, { size }) => sum + size, 0);
}

async function link(blob: string, pointer: string): Promise<void> {
  try {
    if (!existsSync(pointer)) await rm(pointer, { force: true });
    await symlink(relative(join(pointer, '..'), blob), pointer);
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code !== 'EEXIST') throw outputError(pointer, 0, cause);
  }
}

function gigabytes(bytes: number): string {
  return (bytes / 1e9).toFixed(2);
}

function progressText(bytes: number, total: number): string {
  return total < 1e9
    ? `${Math.round(bytes / 1e6)} of ${Math.round(total / 1e6)} MB`
    : `${gigabytes(bytes)} of ${gigabytes(total)} GB`;
}
