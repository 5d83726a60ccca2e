/** QESC: compresses a Mixture-of-Experts checkpoint layer by layer (EAC-MoE section 4). */
import { basename, join, resolve } from 'node:path';
import type { Control, Device, Tensor } from '../../types/native';
import { describe, type Architecture } from '../architecture';
import { readStored, storageOf, storedNames } from '../architecture/storage';
import { checkTensors, layerTensors, requiredTensors, type RequiredTensor } from '../architecture/tensors';
import { sha256 } from '../checkpoint/files';
import { quantizationOf } from '../checkpoint/quantized';
import { openSafetensors } from '../checkpoint/safetensors';
import { Checkpoint } from '../checkpoint/source';
import { EacMoeError } from '../errors';
import { isHubReference, localModel } from '../hub';
import { MoeModel, setDevice } from '../model/model';
import { ProgramBuilder } from '../model/program';
import { Tokenizer } from '../model/tokenizer';
import { CheckpointWeights, layerMatrices } from '../model/weights';
import { native, withSignal } from '../native';
import { version } from '../version';
import { calibrationSequences, givenSequences } from './calibration';
import {
  advanceLayer,
  quantizeLayer,
  roundLayer,
  type LayerJob,
  type LayerResult,
  type Streams,
} from './layer';
import type { LayerReport, QuantizeOptions, QuantizeReport } from './options';
import { calibrationHash, QuantizedOutput } from './output';
import { estimateSize } from './plan';
import { makeRecipe, needsCalibration, recipeJson, type Recipe } from './recipe';
import { makeBatches } from './runner';

/**
 * Compresses the model `source`, a directory in Hugging Face's layout or `hf:<owner>/<name>[@revision]` (floats, or FP8 or MXFP4 as
 * published), into `options.output`, and loads the result.
 *
 * Memory is bounded by one layer (at 16 bit, where the source has fewer), its Hessians and the hidden states of the calibration tokens (4
 * f32 values a token and hidden channel), then by the compressed model. Calibration `self` runs the whole source model first, and so maps
 * all of it, or holds it decoded. The result
 * depends on the source, the options and the seed, not on threads (and within rounding on the device); a killed run continues when it is called again.
 *
 * @throws EacMoeError: INVALID_ARGUMENT for options out of range, FILE_NOT_FOUND, INVALID_CHECKPOINT, INVALID_TENSOR, NON_FINITE or
 * UNSUPPORTED_MODEL for the source (from the hub also those of `downloadModel`), CALIBRATION, TOKENIZER, OUTPUT for the directory or a full disk, ABORTED
 */
export async function quantizeMoE(
  source: string,
  options: QuantizeOptions,
): Promise<{ model: MoeModel; report: QuantizeReport }> {
  const report = await quantizeCheckpoint(source, options);
  return {
    model: await MoeModel.load(options.output, { device: options.device, signal: options.signal }),
    report,
  };
}

/** `quantizeMoE` without loading the result: memory does not grow with the number of layers. */
export async function quantizeCheckpoint(source: string, options: QuantizeOptions): Promise<QuantizeReport> {
  const begun = performance.now();
  const device = setDevice(options);
  if (typeof options.output !== 'string' || options.output === '') {
    throw new EacMoeError('INVALID_ARGUMENT', 'output must be the directory to write');
  }
  const checkpoint = Checkpoint.open(await localModel(source, options));
  let report: QuantizeReport;
  try {
    const quantization = quantizationOf(checkpoint.config);
    if (quantization) {
      const by = quantization.quantizers.join(', ') || 'another program';
      throw new EacMoeError(
        'UNSUPPORTED_MODEL',
        `${source}: is already quantized (by ${by}); quantize the original, unquantized model`,
      );
    }
    const architecture = describe(checkpoint.config);
    checkTensors(architecture, checkpoint);
    const recipe = makeRecipe(architecture, options);
    const name = isHubReference(source) ? source : basename(resolve(source));
    report = await withSignal(options.signal, (control) =>
      new Quantizer(name, checkpoint, architecture, recipe, options, device, control).run(),
    );
  } finally {
    checkpoint.dispose();
  }
  report.seconds = (performance.now() - begun) / 1000;
  return report;
}

/** Shares of the work, for the progress bar. */
const CHECK = 0.02;
const SAMPLE = 0.15;

class Quantizer {
  readonly #weights: CheckpointWeights;

  constructor(
    private readonly sourceName: string,
    private readonly checkpoint: Checkpoint,
    private readonly architecture: Architecture,
    private readonly recipe: Recipe,
    private readonly options: QuantizeOptions,
    private readonly device: Device,
    private readonly control: Control,
  ) {
    this.#weights = new CheckpointWeights(checkpoint, null);
  }

  async run(): Promise<QuantizeReport> {
    const { architecture, recipe, options } = this;
    const given = await this.#givenCalibration();
    const size = estimateSize(architecture, recipe.plan);
    const fingerprint = await this.#checkWeights();
    const output = await QuantizedOutput.open(options.output, this.checkpoint, architecture, recipe, {
      fingerprint,
      calibration: !needsCalibration(recipe) ? 'none' : given ? calibrationHash(given) : 'self',
      resume: options.resume ?? true,
      bytes: size.bytes,
      weights: this.#weights,
    });
    const sequences = await this.#sequences(output, given);
    const streams = sequences.length > 0 ? await this.#embed(sequences) : null;
    const layers = await this.#layers(output, streams);
    const calibration = {
      sequences: sequences.length,
      seqLen: Math.max(0, ...sequences.map((s) => s.length)),
      tokens: sequences.reduce((n, s) => n + s.length, 0),
    };
    const { averageBits, averageBitsWithOverhead } = size;
    this.#progress('write', 0.99, 'finishing');
    const bytes = await output.finish(this.sourceName, {
      averageBits,
      averageBitsWithOverhead,
      calibrationTokens: calibration,
    });
    this.#progress('write', 1, 'done');
    return {
      version,
      source: this.checkpoint.dir,
      options: recipeJson(recipe),
      calibration,
      bytes,
      averageBits,
      averageBitsWithOverhead,
      layers,
      seconds: 0,
    };
  }

  /** Texts and token ids become sequences before anything is written, so that a mistake in them costs nothing. */
  async #givenCalibration(): Promise<Int32Array[] | null> {
    const source = this.options.calibration ?? 'self';
    if (source === 'self' || !needsCalibration(this.recipe)) return null;
    const { architecture, checkpoint } = this;
    const vocabulary = {
      architecture,
      get tokenizer() {
        return Tokenizer.load(checkpoint.dir);
      },
    };
    return givenSequences(vocabulary, { ...this.#request(), source });
  }

  async #sequences(output: QuantizedOutput, given: Int32Array[] | null): Promise<Int32Array[]> {
    if (given || !needsCalibration(this.recipe)) return given ?? [];
    const saved = output.savedCalibration();
    if (saved) return saved;
    const model = await MoeModel.load(this.checkpoint.dir, {
      device: this.device,
      signal: this.options.signal,
    });
    try {
      const sampled = await calibrationSequences(model, { ...this.#request(), source: 'self' });
      await output.saveCalibration(sampled);
      return sampled;
    } finally {
      model.dispose();
    }
  }

  #request() {
    const { samples, seqLen, seed } = this.recipe;
    const onProgress = (f: number) =>
      this.#progress('sample', CHECK + f * (SAMPLE - CHECK), 'sampling calibration text');
    return { samples, seqLen, seed, signal: this.options.signal, onProgress };
  }

  /**
   * Reads all weights once: a NaN in hour three is worse than half a minute now, and a hash of the contents keeps a killed run from
   * being continued with other weights. Returns the source's fingerprint.
   */
  async #checkWeights(): Promise<string> {
    const tensors = requiredTensors(this.architecture);
    const hashes = [this.checkpoint.fingerprint()];
    const seen = new Set<string>();
    for (const [i, need] of tensors.entries()) {
      const storage = storageOf(this.checkpoint, need)!;
      const names = storage.tensors.map((t) => t.name);
      const floats = storage.kind === 'plain' || storage.kind === 'fused';
      // A tensor of all experts is scanned whole, and once; codes by what they stand for.
      if (!floats) {
        const decoded = await readStored(this.checkpoint, need, storage, this.control);
        hashes.push(await this.#scan(decoded, names[0]!, need));
      } else if (!seen.has(names[0]!)) {
        hashes.push(await this.#scan(this.checkpoint.tensor(names[0]!), names[0]!));
        seen.add(names[0]!);
      }
      this.checkpoint.release(names);
      if (i % 64 === 0) this.#progress('check', (CHECK * i) / tensors.length, 'checking weights');
    }
    return sha256(hashes);
  }

  /** Hashes a tensor of the file, or what was decoded from it, and disposes it. */
  async #scan(tensor: Tensor, name: string, decoded?: RequiredTensor): Promise<string> {
    const { nonFinite, hash } = await native().scanTensor(tensor, this.control);
    const { shape } = tensor;
    tensor.dispose();
    if (nonFinite < 0) return hash;
    let rest = nonFinite;
    const index = shape.map((_, d) => {
      const size = shape.slice(d + 1).reduce((a, b) => a * b, 1);
      const at = Math.floor(rest / size);
      rest %= size;
      return at;
    });
    const of = decoded && decoded.name !== name ? ` of '${decoded.name}'` : '';
    throw new EacMoeError(
      'NON_FINITE',
      `${this.checkpoint.info(name).file}: tensor '${name}' holds NaN or infinity at [${index.join(', ')}]${of}; the checkpoint is damaged`,
    );
  }

  /** Both streams start with the embeddings. */
  async #embed(sequences: Int32Array[]): Promise<Streams> {
    const { hiddenSize, embedding, vocabSize } = this.architecture;
    const batches = makeBatches(sequences.map((s) => s.length));
    const tokens = batches.at(-1)!.end;
    const zeros = () => native().zeros('f32', [tokens, hiddenSize], this.device);
    const streams: Streams = { full: zeros(), quantized: zeros(), xFull: zeros(), x: zeros(), batches };
    const b = new ProgramBuilder();
    const h = b.register('h', hiddenSize);
    const table = this.#weights.tensor(embedding.weight, [vocabSize, hiddenSize]);
    b.push({ op: 'embed', out: h, table, scale: embedding.scale });
    const program = b.build(this.device);
    const frame = native().createFrame(program);
    for (const stream of [streams.full, streams.quantized]) {
      let row = 0;
      for (const ids of sequences) {
        const view = stream.rows(row, (row += ids.length));
        frame.bind(h, view);
        view.dispose();
        frame.begin(ids, [{ length: ids.length }]);
        await frame.run(0, program.length, this.control);
      }
    }
    frame.dispose();
    program.dispose();
    this.checkpoint.release([embedding.weight]);
    return streams;
  }

  async #layers(output: QuantizedOutput, streams: Streams | null): Promise<LayerReport[]> {
    const reports: LayerReport[] = output.layers.map((saved) => ({ ...saved, seconds: 0 }));
    for (const [index, spec] of this.architecture.layers.entries()) {
      const begun = performance.now();
      const job: LayerJob = {
        index,
        spec,
        source: this.#weights,
        recipe: this.recipe,
        control: this.control,
        onProgress: (part, what) => this.#layerProgress(index, part, what),
      };
      const done = index < reports.length;
      if (!done || streams) await this.#prepare(job);
      if (done) {
        if (streams) await this.#replay(job, streams, output);
      } else {
        const result: LayerResult = streams ? await quantizeLayer(job, streams) : await roundLayer(job);
        await output.writeLayer(index, result.matrices, result.report);
        for (const matrix of result.matrices.values()) matrix.dispose();
        reports.push({ ...result.report, seconds: (performance.now() - begun) / 1000 });
      }
      this.#weights.release(layerMatrices(spec));
      this.checkpoint.release(storedNames(this.checkpoint, layerTensors(spec, index)));
    }
    return reports;
  }

  /** Decodes what the source does not hold as floats, an expert a tensor. */
  async #prepare(job: LayerJob): Promise<void> {
    this.#layerProgress(job.index, 0, 'reading');
    await this.#weights.prepare(layerMatrices(job.spec), this.options.signal);
  }

  /** A layer that an earlier run finished: read it back and move the streams through it. */
  async #replay(job: LayerJob, streams: Streams, output: QuantizedOutput): Promise<void> {
    this.#layerProgress(job.index, 0, 'reading back');
    const path = join(output.dir, output.shard(job.index));
    const file = openSafetensors(path);
    const reader = {
      dir: path,
      has: (name: string) => file.tensors.has(name),
      info: (name: string) => file.info(name),
      tensor: (name: string) => file.tensor(name),
      release: (names: Iterable<string>) => file.release([...names].filter((name) => file.tensors.has(name))),
    };
    const of = (module: string) => this.recipe.plan.get(`${module}.weight`) ?? null;
    const weights = new CheckpointWeights(reader, { of, quantizers: [] });
    try {
      await weights.prepare(layerMatrices(job.spec), this.options.signal);
      await advanceLayer(job, streams, weights);
    } finally {
      weights.dispose();
      file.dispose();
    }
  }

  #layerProgress(layer: number, part: number, what: string): void {
    const start = (this.options.calibration ?? 'self') === 'self' ? SAMPLE : CHECK;
    const { length } = this.architecture.layers;
    const fraction = start + ((0.99 - start) * (layer + part)) / length;
    this.options.onProgress?.({
      stage: 'calibrate',
      layer,
      fraction,
      message: `layer ${layer + 1}/${length}: ${what}`,
    });
  }

  #progress(stage: 'check' | 'sample' | 'write', fraction: number, message: string): void {
    this.options.onProgress?.({ stage, fraction, message });
  }
}
