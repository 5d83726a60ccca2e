/**
 * Models of the Hugging Face hub, `hf:<owner>/<name>[@revision]`. What is in this folder turns such a name into a directory; nothing
 * else knows of the hub.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { hubSettings } from './settings';
import { PREFIX, Snapshot, type DownloadOptions } from './snapshot';

export type { DownloadOptions, DownloadProgress } from './snapshot';

export function isHubReference(path: string): boolean {
  return path.startsWith(PREFIX);
}

/**
 * Downloads `hf:<owner>/<name>[@revision]` (a branch, tag or commit; default main) unless it is in the cache, and returns its directory
 * there. Only what a model is loaded from: configuration, tokenizer and safetensors. What broke off continues where it did.
 *
 * Settings come from the environment, as with Python's huggingface_hub, whose cache this is: HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT,
 * HF_HUB_OFFLINE, HF_HUB_DOWNLOAD_TIMEOUT. When the hub cannot be reached, the cached revision is taken, with a warning
 * (`process.emitWarning`, code EAC_MOE_HUB).
 *
 * @throws EacMoeError INVALID_ARGUMENT for another form of name; HUB_NOT_FOUND: no such repository, revision or weights; HUB_DENIED:
 * private or gated; HUB_UNAVAILABLE: no connection, or offline and not in the cache; OUTPUT: the cache cannot be written, or the disk
 * is too full; ABORTED
 */
export async function downloadModel(reference: string, options: DownloadOptions = {}): Promise<string> {
  return new Snapshot(reference, hubSettings(), options).directory();
}

/** The directory of a model: `path` itself, or where the hub's model that it names was downloaded to. */
export async function localModel(path: string, options: DownloadOptions = {}): Promise<string> {
  return isHubReference(path) ? downloadModel(path, options) : path;
}

/**
 * The same for `use` that reads configuration, tokenizer and the headers of the weight files only: of weights that are not in the cache,
 * no more is downloaded.
 */
export async function withModelHeaders<T>(
  path: string,
  options: DownloadOptions,
  use: (directory: string) => T,
): Promise<T> {
  if (!isHubReference(path)) return use(path);
  const temporary = await mkdtemp(join(tmpdir(), 'eac-moe-headers-'));
  try {
    return use(await new Snapshot(path, hubSettings(), options).headers(temporary));
  } finally {
    await rm(temporary, { recursive: true, force: true });
  }
}
