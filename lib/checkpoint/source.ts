/**
 * A model directory in Hugging Face's layout: config.json, generation_config.json, and the weights in `model.safetensors` or in the
 * shards that `model.safetensors.index.json` lists. Headers are read and checked at open; the data stay on disk until asked for.
 */
import { existsSync, readdirSync } from 'node:fs';
import { basename, join } from 'node:path';
import type { Tensor } from '../../types/native';
import { EacMoeError } from '../errors';
import { normaliseConfig, type ModelConfig } from './config';
import { assertDirectory, describeValue, parseJsonObject, readBytes, readJsonObject, sha256 } from './files';
import { openSafetensors, type SafetensorsFile, type TensorInfo } from './safetensors';

export const SINGLE = 'model.safetensors';
/** Lists the shards' tensors. */
export const INDEX = 'model.safetensors.index.json';
/** Options, versions and errors of the run of quantize that wrote a directory. */
export const REPORT = 'eac_moe.json';

function sameShape(a: readonly number[], b: readonly number[]): boolean {
  return a.length === b.length && a.every((n, i) => n === b[i]);
}

/** The weight map of an index file: tensor name to shard name. */
export function readIndex(dir: string): Map<string, string> {
  const path = join(dir, INDEX);
  const map = readJsonObject(path).weight_map;
  if (typeof map !== 'object' || map === null || Array.isArray(map)) {
    throw new EacMoeError(
      'INVALID_CHECKPOINT',
      `${path}: weight_map must be an object, found ${describeValue(map)}`,
    );
  }
  const result = new Map<string, string>();
  for (const [name, file] of Object.entries(map as Record<string, unknown>)) {
    // A path could lead out of the directory.
    if (typeof file !== 'string' || basename(file) !== file || /[\\/]|^\.*$/.test(file)) {
      throw new EacMoeError(
        'INVALID_CHECKPOINT',
        `${path}: tensor '${name}': expected a file name in the same directory, found ${describeValue(file)}`,
      );
    }
    result.set(name, file);
  }
  if (result.size === 0) throw new EacMoeError('INVALID_CHECKPOINT', `${path}: weight_map lists no tensor`);
  return result;
}

function openShards(dir: string, index: Map<string, string>): Map<string, SafetensorsFile> {
  const path = join(dir, INDEX);
  const names = [...new Set(index.values())].sort();
  const missing = names.filter((file) => !existsSync(join(dir, file)));
  if (missing.length > 0) {
    const tensor = [...index].find(([, file]) => file === missing[0])![0];
    throw new EacMoeError(
      'FILE_NOT_FOUND',
      `${join(dir, missing[0])}: this shard is missing; ${INDEX} lists it, e.g. for tensor '${tensor}'` +
        (missing.length > 1 ? ` (${missing.length} of ${names.length} shards are missing)` : ''),
    );
  }
  const files = new Map(names.map((file) => [file, openSafetensors(join(dir, file))]));
  for (const [name, file] of index) {
    if (!files.get(file)!.tensors.has(name)) {
      throw new EacMoeError(
        'INVALID_CHECKPOINT',
        `${path}: lists tensor '${name}' in ${file}, which does not hold it`,
      );
    }
  }
  for (const [file, shard] of files) {
    for (const name of shard.tensors.keys()) {
      if (index.get(name) !== file) {
        const listed = index.has(name) ? `lists it in ${index.get(name)}` : 'does not list it';
        throw new EacMoeError(
          'INVALID_CHECKPOINT',
          `${shard.path}: holds tensor '${name}' but ${INDEX} ${listed}`,
        );
      }
    }
  }
  return files;
}

function openWeights(dir: string): Map<string, SafetensorsFile> {
  // As Hugging Face does: the single file wins where both exist.
  if (existsSync(join(dir, SINGLE))) return new Map([[SINGLE, openSafetensors(join(dir, SINGLE))]]);
  if (existsSync(join(dir, INDEX))) return openShards(dir, readIndex(dir));
  const other = readdirSync(dir).find((name) => /\.(bin|pt|pth|gguf|safetensors)$/.test(name));
  const hint = other ? `; it holds ${other}: convert it to safetensors in Hugging Face's layout first` : '';
  throw new EacMoeError('FILE_NOT_FOUND', `${dir}: has neither ${SINGLE} nor ${INDEX}${hint}`);
}

/** Marks a directory in which a quantized checkpoint is being written. */
export const UNFINISHED = 'eac_moe.partial.json';
const UNFINISHED_HINT =
  'no such file: the directory holds an unfinished run of quantize; start the same command again to finish it';
const LAYOUT_HINT = "no such file; expected a model directory in Hugging Face's layout";

export class Checkpoint {
  readonly dir: string;
  readonly config: ModelConfig;
  /** Empty where the directory has no generation_config.json. */
  readonly generationConfig: Readonly<Record<string, unknown>>;
  readonly #configBytes: Uint8Array;
  readonly #files: Map<string, SafetensorsFile>;
  readonly #where = new Map<string, SafetensorsFile>();

  private constructor(dir: string) {
    assertDirectory(dir);
    this.dir = dir;
    const configPath = join(dir, 'config.json');
    this.#configBytes = readBytes(
      configPath,
      existsSync(join(dir, UNFINISHED)) ? UNFINISHED_HINT : LAYOUT_HINT,
    );
    this.config = normaliseConfig(parseJsonObject(this.#configBytes, configPath), configPath);
    const generation = join(dir, 'generation_config.json');
    this.generationConfig = existsSync(generation) ? readJsonObject(generation) : {};
    this.#files = openWeights(dir);
    for (const file of this.#files.values())
      for (const name of file.tensors.keys()) this.#where.set(name, file);
  }

  /** Opens a model directory. Reads headers only. */
  static open(dir: string): Checkpoint {
    return new Checkpoint(dir);
  }

  has(name: string): boolean {
    return this.#where.has(name);
  }

  names(): string[] {
    return [...this.#where.keys()];
  }

  /** Names of the weight files. */
  files(): string[] {
    return [...this.#files.keys()];
  }

  /** Size of the weight files in bytes. */
  get byteLength(): number {
    return [...this.#files.values()].reduce((sum, file) => sum + file.byteLength, 0);
  }

  #file(name: string): SafetensorsFile {
    const file = this.#where.get(name);
    if (!file) throw new EacMoeError('INVALID_TENSOR', `${this.dir}: tensor '${name}' is missing`);
    return file;
  }

  info(name: string): TensorInfo {
    return this.#file(name).info(name);
  }

  /** A tensor over the mapped file. Fails when its shape is not `expectedShape`. */
  tensor(name: string, expectedShape?: readonly number[]): Tensor {
    const file = this.#file(name);
    const { shape } = file.info(name);
    if (expectedShape && !sameShape(shape, expectedShape)) {
      throw new EacMoeError(
        'INVALID_TENSOR',
        `${file.path}: tensor '${name}' has shape [${shape.join(', ')}], expected [${expectedShape.join(', ')}]`,
      );
    }
    return file.tensor(name);
  }

  /** Lets the pages of these tensors leave memory; they are read again on use. Names that do not exist are ignored. */
  release(names: Iterable<string>): void {
    for (const name of names) this.#where.get(name)?.release([name]);
  }

  /**
   * A hash that tells one source from another: of config.json and of each weight file's name, size and header. The data themselves are
   * not read (that would take minutes for a large model), so weights changed in place under the same header go unnoticed.
   */
  fingerprint(): string {
    const parts: (Uint8Array | string)[] = ['eac-moe checkpoint 1\0', this.#configBytes];
    for (const [name, file] of [...this.#files].sort(([a], [b]) => (a < b ? -1 : 1))) {
      parts.push(`\0${name}\0${file.byteLength}\0`, file.header);
    }
    return sha256(parts);
  }

  /** Unmaps the files. Tensors already handed out stay valid until they are disposed. */
  dispose(): void {
    for (const file of this.#files.values()) file.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}
