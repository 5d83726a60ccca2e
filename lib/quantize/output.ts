/**
 * Writing a quantized checkpoint, layer by layer, so that a killed run can go on where it stopped.
 *
 * While a run lasts, the output directory holds the shards of the finished layers, the calibration sequences, and `eac_moe.partial.json`: what
 * is being done and how far it is. Each file appears under its name only when it is whole. config.json comes last; with it the
 * directory becomes a model, and the partial files go. Nothing written depends on time, paths or the number of threads.
 */
import { existsSync } from 'node:fs';
import { readdir, rm } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import type { Matrix, Tensor } from '../../types/native';
import type { Architecture } from '../architecture/types';
import { storageOf } from '../architecture/storage';
import { requiredTensors, type RequiredTensor } from '../architecture/tensors';
import {
  checkSpace,
  copyCompanionFiles,
  makeDirectory,
  readJsonObject,
  removeTemporaryFiles,
  sha256,
  writeJson,
} from '../checkpoint/files';
import { moduleOf, quantizationConfig, quantizedEntries } from '../checkpoint/quantized';
import { openSafetensors, writeSafetensors, type TensorEntry } from '../checkpoint/safetensors';
import { INDEX, REPORT, UNFINISHED, type Checkpoint } from '../checkpoint/source';
import { EacMoeError } from '../errors';
import type { CheckpointWeights } from '../model/weights';
import { native } from '../native';
import type { LayerReport } from './options';
import { planModules } from './plan';
import { recipeJson, type Recipe } from './recipe';
import { version } from '../version';

const PARTIAL = UNFINISHED;
const CALIBRATION = 'eac_moe.partial.safetensors';

/** Everything that the result depends on. */
interface Job {
  version: string;
  /** Fingerprint of the source's files and weights. */
  source: string;
  recipe: Record<string, unknown>;
  /** Hash of the calibration sequences, or 'self', whose sequences follow from the recipe's seed. */
  calibration: string;
}

type SavedLayer = Omit<LayerReport, 'seconds'>;

export class QuantizedOutput {
  readonly dir: string;
  /** Reports of the layers already written. */
  readonly layers: SavedLayer[];
  readonly #source: Checkpoint;
  readonly #weights: CheckpointWeights;
  readonly #architecture: Architecture;
  readonly #recipe: Recipe;
  readonly #job: Job;

  private constructor(
    dir: string,
    source: Checkpoint,
    weights: CheckpointWeights,
    architecture: Architecture,
    recipe: Recipe,
    job: Job,
    layers: SavedLayer[],
  ) {
    this.dir = dir;
    this.#source = source;
    this.#weights = weights;
    this.#architecture = architecture;
    this.#recipe = recipe;
    this.#job = job;
    this.layers = layers;
  }

  /**
   * Prepares the directory, or finds the unfinished run in it. `bytes`: about how much will be written. `weights`: those of the source,
   * which must be prepared for a layer when that is written.
   *
   * @throws EacMoeError OUTPUT when the directory holds something else, the run of another job, or too little space
   */
  static async open(
    path: string,
    source: Checkpoint,
    architecture: Architecture,
    recipe: Recipe,
    options: {
      fingerprint: string;
      calibration: string;
      resume: boolean;
      bytes: number;
      weights: CheckpointWeights;
    },
  ): Promise<QuantizedOutput> {
    const dir = resolve(path);
    const job: Job = {
      version,
      source: options.fingerprint,
      recipe: JSON.parse(JSON.stringify(recipeJson(recipe))) as Record<string, unknown>,
      calibration: options.calibration,
    };
    const layers = await savedLayers(dir, job, options.resume);
    const missing = 1 - layers.length / (architecture.layers.length + 1);
    await checkSpace(dir, options.bytes * missing);
    await makeDirectory(dir);
    removeTemporaryFiles(dir);
    const output = new QuantizedOutput(dir, source, options.weights, architecture, recipe, job, layers);
    if (layers.length === 0) await output.#save();
    return output;
  }

  /** The calibration sequences of the run that is being continued. */
  savedCalibration(): Int32Array[] | null {
    const path = join(this.dir, CALIBRATION);
    if (!existsSync(path)) return null;
    const file = openSafetensors(path);
    try {
      return [...file.tensors.keys()].sort().map((name) => file.tensor(name).toArray() as Int32Array);
    } finally {
      file.dispose();
    }
  }

  async saveCalibration(sequences: Int32Array[]): Promise<void> {
    const entries = sequences.map((ids, i) => ({
      name: String(i).padStart(8, '0'),
      data: native().fromArray(ids, 'i32', [ids.length]),
    }));
    await writeSafetensors(join(this.dir, CALIBRATION), entries);
  }

  /** The file of a layer's tensors; shard 1 holds what belongs to no layer. */
  shard(layer: number): string {
    const number = (n: number) => String(n).padStart(5, '0');
    return `model-${number(layer + 2)}-of-${number(this.#architecture.layers.length + 1)}.safetensors`;
  }

  /** Writes a finished layer; from here on a killed run continues behind it. */
  async writeLayer(layer: number, matrices: ReadonlyMap<string, Matrix>, report: SavedLayer): Promise<void> {
    await this.#writeShard(layer, matrices);
    this.layers.push(report);
    await this.#save();
  }

  /** Writes what belongs to no layer, the index, the tokenizer's files, the report and at last config.json. Returns the bytes of the weights. */
  async finish(sourceName: string, summary: Record<string, unknown>): Promise<number> {
    await this.#writeShard(-1, new Map());
    const bytes = await this.#writeIndex();
    await copyCompanionFiles(this.#source.dir, this.dir);
    const { version: by, source, recipe, calibration } = this.#job;
    await writeJson(join(this.dir, REPORT), {
      version: by,
      source: { name: sourceName, fingerprint: source },
      options: recipe,
      calibration,
      ...summary,
      layers: this.layers,
    });
    const config = this.#source.config.raw;
    await writeJson(join(this.dir, 'config.json'), {
      ...config,
      quantization_config: quantizationConfig(
        planModules(this.#architecture, this.#recipe.plan),
        `eac-moe:${version}`,
      ),
    });
    for (const name of [CALIBRATION, PARTIAL]) await rm(join(this.dir, name), { force: true });
    return bytes;
  }

  async #save(): Promise<void> {
    await writeJson(join(this.dir, PARTIAL), { ...this.#job, layers: this.layers });
  }

  /** `layer` -1: what belongs to no layer. What `matrices` lacks comes from the source. */
  async #writeShard(layer: number, matrices: ReadonlyMap<string, Matrix>): Promise<void> {
    const entries: (TensorEntry & { data: Tensor })[] = [];
    for (const need of requiredTensors(this.#architecture).filter((t) => (t.layer ?? -1) === layer)) {
      const matrix = matrices.get(need.name);
      if (matrix && 'bits' in matrix) entries.push(...(await quantizedEntries(moduleOf(need.name), matrix)));
      else if (matrix) entries.push({ name: need.name, data: matrix });
      else {
        const name = this.#outputName(need);
        if (name === need.name) entries.push({ name, data: this.#weights.read(need) });
        else if (!entries.some((e) => e.name === name))
          entries.push({ name, data: this.#source.tensor(name) });
      }
    }
    await writeSafetensors(join(this.dir, this.shard(layer)), entries);
    for (const { data } of entries) data.dispose();
  }

  /**
   * What is not quantized goes out as floats under its logical name. Only biases that lie in one tensor for all experts stay there: that is
   * the name by which other programs know them, and reading accepts both.
   */
  #outputName(need: RequiredTensor): string {
    const storage = need.role === 'bias' ? storageOf(this.#source, need) : null;
    return storage?.kind === 'fused' ? storage.part.tensor : need.name;
  }

  async #writeIndex(): Promise<number> {
    const map: Record<string, string> = {};
    let bytes = 0;
    let total = 0;
    for (let layer = -1; layer < this.#architecture.layers.length; layer++) {
      const file = openSafetensors(join(this.dir, this.shard(layer)));
      for (const name of file.tensors.keys()) {
        map[name] = this.shard(layer);
        total += file.info(name).bytes;
      }
      bytes += file.byteLength;
      file.dispose();
    }
    const sorted = Object.fromEntries(Object.entries(map).sort(([a], [b]) => (a < b ? -1 : 1)));
    await writeJson(join(this.dir, INDEX), { metadata: { total_size: total }, weight_map: sorted });
    return bytes;
  }
}

/** A hash of calibration sequences. */
export function calibrationHash(sequences: Int32Array[]): string {
  return sha256(
    sequences.flatMap((s) => [`${s.length}:`, new Uint8Array(s.buffer, s.byteOffset, s.byteLength)]),
  );
}

/** The finished layers of an unfinished run of the same job; anything else in the directory is an error. */
async function savedLayers(dir: string, job: Job, resume: boolean): Promise<SavedLayer[]> {
  if (!existsSync(dir)) return [];
  let names: string[];
  try {
    names = await readdir(dir);
  } catch (cause) {
    throw new EacMoeError(
      'OUTPUT',
      `${dir}: cannot be used as output directory: ${(cause as Error).message}`,
      { cause },
    );
  }
  if (names.length === 0) return [];
  const partial = join(dir, PARTIAL);
  if (!existsSync(partial)) {
    const what = names.includes(REPORT)
      ? 'already holds a quantized checkpoint'
      : `already holds something else (${names.sort()[0]!})`;
    throw new EacMoeError('OUTPUT', `${dir}: ${what}; choose another directory, or remove it first`);
  }
  const saved = readJsonObject(partial) as unknown as Job & { layers: SavedLayer[] };
  const differing = difference(saved, job);
  if (resume && differing === null) return saved.layers;
  if (resume) {
    throw new EacMoeError(
      'OUTPUT',
      `${dir}: holds an unfinished run with another ${differing}; repeat that command to finish it, start over with resume: false (--no-resume), or choose another directory`,
    );
  }
  for (const name of names) {
    const ours =
      name === PARTIAL || name === CALIBRATION || name === INDEX || name === REPORT || name === 'config.json';
    if (ours || /^model-\d{5}-of-\d{5}\.safetensors$/.test(name)) await rm(join(dir, name), { force: true });
  }
  return [];
}

/** The first thing in which two jobs differ, or null. Options come before the calibration sequences, which depend on some of them. */
function difference(a: Job, b: Job): string | null {
  for (const key of ['version', 'source'] as const) if (a[key] !== b[key]) return key;
  for (const key of new Set([...Object.keys(a.recipe), ...Object.keys(b.recipe)])) {
    if (JSON.stringify(a.recipe[key]) !== JSON.stringify(b.recipe[key]))
      return key === 'plan' ? 'plan of bits' : key;
  }
  return a.calibration === b.calibration ? null : 'calibration';
}
