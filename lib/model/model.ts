/** A Mixture-of-Experts language model: a checkpoint, its decoder, its tokenizer. */
import type { Activations, Device, Frame, KvCache, Sequence } from '../../types/native';
import { describe, type Architecture } from '../architecture';
import { checkTensors } from '../architecture/tensors';
import { quantizationOf } from '../checkpoint/quantized';
import { Checkpoint } from '../checkpoint/source';
import { EacMoeError } from '../errors';
import { localModel, type DownloadProgress } from '../hub';
import { native, withSignal } from '../native';
import { Decoder } from './decoder';
import { generate, type GenerateOptions } from './generate';
import type { LayerStages } from './layer';
import type { ExpertPolicy } from './policy';
import { Tokenizer, type ChatMessage } from './tokenizer';
import { CheckpointWeights, layerMatrices } from './weights';

export interface LoadOptions {
  /**
   * Where to compute. `auto` (default) takes the GPU where the CUDA library (`npm run build:cuda`) and a device are there, else the CPU. Where they are
   * there but cannot be used (a library of another version, an old driver, a busy or failed GPU), it takes the CPU with a warning
   * (`process.emitWarning`, code EAC_MOE_CUDA, once for each reason), and `cuda` throws. A GPU that works, but not for this model, is no reason for
   * the CPU: see `gpuMemory`.
   */
  device?: 'auto' | 'cpu' | 'cuda';
  /**
   * Bytes of GPU memory that the weights may take; default: what is free. Experts beyond it stay in pinned host memory, and each layer's are
   * copied while the layers before it compute. OUT_OF_MEMORY, with the size that is needed, where not even two layers fit.
   */
  gpuMemory?: number;
  /** Threads of the process-wide pool; default: all CPUs, or EAC_MOE_THREADS. */
  threads?: number;
  /**
   * How `forward` and `generate` multiply with quantized weights: inputs rounded to int8 in blocks of up to 128 channels (`int8`, default),
   * or exactly (`float32`), several times slower. Weights that are not quantized are always exact.
   */
  activations?: Activations;
  /**
   * Bits of the output head. 16 (default): as in the checkpoint. 4: rounded to nearest in groups of 32 while loading, for models whose
   * vocabulary makes the head a large part of what each decoded token reads.
   */
  headBits?: 4 | 16;
  /** While a model of the hub is downloaded. */
  onProgress?: (progress: DownloadProgress) => void;
  signal?: AbortSignal;
}

export interface ForwardOptions {
  /** Continue this sequence, and let it hold the new tokens afterwards. Default: the ids are a sequence of their own. */
  cache?: KvCache;
  /** `all` (default): logits of every token; `last`: of the last one; `none`. */
  logits?: 'all' | 'last' | 'none';
  /** Also return what each router said. */
  routing?: boolean;
  /** Also return the hidden states: entry 0 after the embedding, entry i after layer i. */
  hiddenStates?: boolean;
  signal?: AbortSignal;
}

/** What the router of one MoE layer said about the tokens, after pruning. */
export interface LayerRouting {
  layer: number;
  topK: number;
  experts: number;
  /** Raw router logits, [tokens, experts]. */
  logits: Float32Array;
  /** Weights of the chosen experts, [tokens, topK]. */
  weights: Float32Array;
  /** Chosen experts, [tokens, topK]; -1 where the expert was pruned. */
  indices: Int32Array;
}

export interface ForwardResult {
  /** [tokens, vocabulary], or [1, vocabulary] for `last`; empty for `none`. */
  logits: Float32Array;
  routing?: LayerRouting[];
  hiddenStates?: Float32Array[];
}

/** What models over the same weights share. */
interface Shared {
  checkpoint: Checkpoint;
  weights: CheckpointWeights;
  decoder: Decoder;
  tokenizer?: Tokenizer;
  users: number;
}

export class MoeModel {
  readonly path: string;
  readonly architecture: Architecture;
  /** Prunes experts during prefill; see `pruneExperts`. */
  readonly policy: ExpertPolicy | undefined;
  /** See LoadOptions. `evaluate` has an option of its own. */
  readonly activations: Activations;
  readonly #shared: Shared;
  #disposed = false;

  private constructor(
    path: string,
    architecture: Architecture,
    shared: Shared,
    activations: Activations,
    policy?: ExpertPolicy,
  ) {
    this.path = path;
    this.architecture = architecture;
    this.activations = activations;
    this.policy = policy;
    this.#shared = shared;
    shared.users++;
  }

  /**
   * Opens a model directory in Hugging Face's layout, full-precision or quantized by this library, or a model of the hub,
   * `hf:<owner>/<name>[@revision]` (see `downloadModel`). Weights are memory-mapped; those of a quantized model are repacked into memory.
   *
   * @throws EacMoeError FILE_NOT_FOUND, INVALID_CHECKPOINT, INVALID_TENSOR or UNSUPPORTED_MODEL, naming the file or tensor; for models of
   * the hub also those of `downloadModel`
   */
  static async load(model: string, options: LoadOptions = {}): Promise<MoeModel> {
    const device = setDevice(options);
    const activations = checkActivations(options.activations ?? 'int8');
    const { gpuMemory } = options;
    if (gpuMemory !== undefined && !(Number.isFinite(gpuMemory) && gpuMemory >= 1)) {
      throw new EacMoeError(
        'INVALID_ARGUMENT',
        `gpuMemory must be a positive number of bytes; found ${gpuMemory}`,
      );
    }
    const { headBits = 16 } = options;
    if (headBits !== 4 && headBits !== 16) {
      throw new EacMoeError('INVALID_ARGUMENT', `headBits must be 4 or 16; found ${String(headBits)}`);
    }
    const path = await localModel(model, options);
    const checkpoint = Checkpoint.open(path);
    try {
      const architecture = describe(checkpoint.config);
      checkTensors(architecture, checkpoint);
      const weights = new CheckpointWeights(checkpoint, quantizationOf(checkpoint.config));
      await weights.prepare(architecture.layers.flatMap(layerMatrices), options.signal);
      if (headBits === 4) await weights.round(architecture.head);
      const decoder = new Decoder(architecture, weights, device);
      await withSignal(options.signal, (control) => decoder.prepare(control, options.gpuMemory));
      return new MoeModel(path, architecture, { checkpoint, weights, decoder, users: 0 }, activations);
    } catch (error) {
      checkpoint.dispose();
      throw error;
    }
  }

  /** The model's tokenizer; EacMoeError TOKENIZER if the directory has none. */
  get tokenizer(): Tokenizer {
    return (this.#live().tokenizer ??= Tokenizer.load(this.path));
  }

  /** @internal */
  get checkpoint(): Checkpoint {
    return this.#live().checkpoint;
  }

  /** @internal */
  get decoder(): Decoder {
    return this.#live().decoder;
  }

  /** Where the model computes. */
  get device(): Device {
    return this.#live().decoder.device;
  }

  /** A key-value cache for one sequence: f32 keys and values of every layer, growing with the sequence. */
  createCache(): KvCache {
    return this.#live().decoder.createCache();
  }

  /** The same weights under another pruning policy (undefined: none). Each model is disposed on its own. */
  withPolicy(policy: ExpertPolicy | undefined): MoeModel {
    return new MoeModel(this.path, this.architecture, this.#live(), this.activations, policy);
  }

  /** The same weights and policy under another treatment of activations; see `LoadOptions.activations`. */
  withActivations(activations: Activations): MoeModel {
    const checked = checkActivations(activations);
    return new MoeModel(this.path, this.architecture, this.#live(), checked, this.policy);
  }

  /**
   * Runs token ids through the model.
   *
   * @throws EacMoeError INVALID_ARGUMENT for an empty list, ids outside the vocabulary or a cache that another run is at, ABORTED
   */
  async forward(ids: ArrayLike<number>, options: ForwardOptions = {}): Promise<ForwardResult> {
    const { decoder } = this.#live();
    const { vocabSize } = this.architecture;
    const sequence: Sequence = { length: ids.length, cache: options.cache };
    const batch = { ids: checkIds(ids, vocabSize), sequences: [sequence] };
    const result: ForwardResult = { logits: new Float32Array(0) };
    if (options.routing) result.routing = [];
    if (options.hiddenStates) result.hiddenStates = [];

    const onLayer = (layer: number, stages: LayerStages, frame: Frame) => {
      result.hiddenStates?.push(frame.read(decoder.h) as Float32Array);
      if (result.routing && stages.registers.moe) result.routing.push(this.#routing(layer, stages, frame));
    };
    const observe = options.routing || options.hiddenStates ? onLayer : undefined;
    if (result.hiddenStates) result.hiddenStates.push(await this.#embed(batch.ids));
    const wanted = options.logits ?? 'all';
    const { policy, activations } = this;
    return withSignal(options.signal, async (control) =>
      decoder.run(batch, { policy, activations, control, onLayer: observe }, async (frame) => {
        if (wanted === 'none') return result;
        const h = frame.tensor(decoder.h);
        const first = wanted === 'all' ? 0 : ids.length - 1;
        result.logits = new Float32Array((ids.length - first) * vocabSize);
        await decoder.logits(
          h.rows(first, ids.length),
          (logits, begin) => result.logits.set(logits.toArray() as Float32Array, begin * vocabSize),
          control,
        );
        return result;
      }),
    );
  }

  /**
   * Continues a prompt; yields pieces of text as they become whole characters. The iterator's return value says why it ended and what
   * it cost.
   */
  generate(
    prompt: string | ArrayLike<number> | ChatMessage[],
    options: GenerateOptions = {},
  ): ReturnType<typeof generate> {
    return generate(this, prompt, options);
  }

  /** Releases the weights once the last model that shares them is disposed. */
  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    if (--this.#shared.users > 0) return;
    this.#shared.decoder.dispose();
    this.#shared.weights.dispose();
    this.#shared.checkpoint.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }

  #live(): Shared {
    if (this.#disposed) throw new EacMoeError('DISPOSED', `the model ${this.path} was disposed`);
    return this.#shared;
  }

  async #embed(ids: Int32Array): Promise<Float32Array> {
    const { decoder } = this.#live();
    return decoder.embed({ ids, sequences: [{ length: ids.length }] });
  }

  #routing(layer: number, { registers }: LayerStages, frame: Frame): LayerRouting {
    const { logits, weights, indices } = registers.moe!;
    const moe = this.architecture.layers[layer]!.feedForward;
    if (moe.kind !== 'moe') throw new EacMoeError('INTERNAL', `layer ${layer} has no router`);
    return {
      layer,
      topK: moe.router.topK,
      experts: moe.router.out,
      logits: frame.read(logits) as Float32Array,
      weights: frame.read(weights) as Float32Array,
      indices: frame.read(indices) as Int32Array,
    };
  }
}

/** @throws EacMoeError INVALID_ARGUMENT */
export function checkActivations(activations: Activations): Activations {
  if (activations === 'int8' || activations === 'float32') return activations;
  throw new EacMoeError(
    'INVALID_ARGUMENT',
    `activations must be 'int8' or 'float32'; found '${String(activations)}'`,
  );
}

const warned = new Set<string>();

/** Applies `threads`; resolves `device`. */
export function setDevice({ device = 'auto', threads }: LoadOptions): Device {
  if (!['auto', 'cpu', 'cuda'].includes(device)) {
    throw new EacMoeError('INVALID_ARGUMENT', `device must be 'auto', 'cpu' or 'cuda'; found '${device}'`);
  }
  if (threads !== undefined) {
    if (!Number.isInteger(threads) || threads < 1) {
      throw new EacMoeError('INVALID_ARGUMENT', `threads must be a positive integer; found ${threads}`);
    }
    native().setThreads(threads);
  }
  if (device === 'cpu') return device;
  const cuda = native().cuda();
  if (cuda.available) return 'cuda';
  if (device === 'cuda') throw new EacMoeError(cuda.code, `device 'cuda': ${cuda.why}; use 'auto' or 'cpu'`);
  // Nobody expects a GPU where there is none.
  if (cuda.code !== 'INVALID_ARGUMENT' && !warned.has(cuda.why)) {
    warned.add(cuda.why);
    process.emitWarning(
      `device 'auto' takes the CPU: ${cuda.why}. device 'cpu' does so without this warning`,
      {
        code: 'EAC_MOE_CUDA',
      },
    );
  }
  return 'cpu';
}

function checkIds(ids: ArrayLike<number>, vocabSize: number): Int32Array {
  if (ids.length === 0) throw new EacMoeError('INVALID_ARGUMENT', 'ids: expected at least one token id');
  for (let i = 0; i < ids.length; i++) {
    const id = ids[i]!;
    if (!Number.isInteger(id) || id < 0 || id >= vocabSize) {
      throw new EacMoeError(
        'INVALID_ARGUMENT',
        `ids[${i}] is ${id}; expected an integer from 0 to ${vocabSize - 1}`,
      );
    }
  }
  return Int32Array.from(ids);
}
