/**
 * The one decoder that runs every architecture: it records the architecture once as a native program and runs it over batches of
 * sequences. Decoding a token crosses into native code once.
 */
import type {
  Activations,
  Control,
  Device,
  Frame,
  KvCache,
  Program,
  Register,
  Sampling,
  Sequence,
  Tensor,
} from '../../types/native';
import type { Architecture, MoeSpec } from '../architecture/types';
import { native } from '../native';
import { cacheWidths } from './attention';
import { pushLastTokens, pushLayer, type LayerStages } from './layer';
import { pushLinear, pushNorm, type WeightSource } from './linear';
import type { ExpertPolicy } from './policy';
import { ProgramBuilder, type Range } from './program';

export interface Batch {
  /** Token ids of all sequences, one after the other. */
  ids: Int32Array;
  sequences: Sequence[];
}

export interface RunOptions {
  policy?: ExpertPolicy;
  control?: Control;
  /** Default 'float32'. */
  activations?: Activations;
  /** Called after a MoE layer's router has chosen, before the policy prunes; may read the frame. */
  onRoute?: (layer: number, stages: LayerStages, frame: Frame) => void;
  /** Called after each layer, before the next one runs; may read the frame. */
  onLayer?: (layer: number, stages: LayerStages, frame: Frame) => void;
}

/** Rows of logits computed at a time: bounds their memory for large vocabularies. */
const HEAD_ROWS = 256;

export class Decoder {
  readonly layers: LayerStages[] = [];
  readonly h: Register;
  readonly #architecture: Architecture;
  readonly device: Device;
  readonly #program: Program;
  readonly #ids: Register;
  readonly #logits: Register;
  /** The head after all layers; and after the last layer's attention, for the last tokens only. */
  readonly #whole: Range;
  readonly #lastTokens: Range;
  readonly #embedding: number;
  readonly #head: Program;
  readonly #headIn: Register;
  readonly #headOut: Register;
  readonly #idle: Frame[] = [];

  constructor(architecture: Architecture, weights: WeightSource, device: Device = 'cpu') {
    this.#architecture = architecture;
    this.device = device;
    const { embedding, hiddenSize, vocabSize } = architecture;
    const b = new ProgramBuilder();
    this.h = b.register('h', hiddenSize);
    const table = weights.tensor(embedding.weight, [vocabSize, hiddenSize]);
    b.push({ op: 'embed', out: this.h, table, scale: embedding.scale });
    this.#embedding = 1;
    architecture.layers.forEach((spec, i) => this.layers.push(pushLayer(b, weights, spec, i)));

    this.#logits = b.register('logits', vocabSize, 'f32', 'sequences');
    this.#ids = b.register('ids', 1, 'i32', 'sequences');
    const sample = (last: Register) => {
      pushHead(b, weights, architecture, 'sequences', last, this.#logits);
      b.push({ op: 'sample', logits: this.#logits, out: this.#ids });
    };
    this.#whole = b.stage(() => {
      const last = b.register('last', hiddenSize, 'f32', 'sequences');
      b.push({ op: 'lastRows', x: this.h, out: last });
      sample(last);
    });
    this.#lastTokens = b.stage(() =>
      sample(pushLastTokens(b, weights, architecture.layers.at(-1)!, architecture.layers.length - 1)),
    );
    this.#program = b.build(device);

    const hb = new ProgramBuilder();
    this.#headIn = hb.register('h', hiddenSize);
    this.#headOut = hb.register('logits', vocabSize);
    pushHead(hb, weights, architecture, 'tokens', this.#headIn, this.#headOut);
    this.#head = hb.build(device);
  }

  /** Brings the weights to where they are used: the first run would otherwise. */
  async prepare(control?: Control, memory?: number): Promise<void> {
    await this.#program.prepare(control, memory);
    await this.#head.prepare(control, memory);
  }

  createCache(): KvCache {
    const widths = this.#architecture.layers.map(({ attention }) => cacheWidths(attention));
    return native().createKvCache(widths, this.device);
  }

  /** Embeds the batch and runs all layers; the caller reads the frame inside `use`. Caches hold the batch only if all went well. */
  async run<T>(batch: Batch, options: RunOptions, use: (frame: Frame) => Promise<T> | T): Promise<T> {
    return this.#withFrame(batch, options.activations, async (frame) => {
      await this.#runLayers(frame, batch, options);
      const result = await use(frame);
      frame.commit();
      return result;
    });
  }

  /** The hidden states before the first layer, [tokens, hidden]. */
  async embed(batch: Batch): Promise<Float32Array> {
    return this.#withFrame(batch, undefined, async (frame) => {
      await frame.run(0, this.#embedding);
      return frame.read(this.h) as Float32Array;
    });
  }

  /** One step of generation: the batch's last tokens' logits, sampled. Returns one id a sequence. */
  async step(batch: Batch, sampling: Sampling, options: RunOptions): Promise<Int32Array> {
    return this.#withFrame(batch, options.activations, async (frame) => {
      frame.setSampling(sampling);
      const { control } = options;
      if (batch.sequences.every((s) => s.length === 1)) {
        await frame.run(0, this.#whole.to, control);
      } else if (options.policy) {
        await this.#runLayers(frame, batch, options); // it counts what all tokens choose
        await frame.run(this.#whole.from, this.#whole.to, control);
      } else {
        await frame.run(0, this.layers.at(-1)!.attention.to, control);
        await frame.run(this.#lastTokens.from, this.#lastTokens.to, control);
      }
      frame.commit();
      return frame.read(this.#ids) as Int32Array;
    });
  }

  /**
   * Final norm and lm_head over rows of hidden states (f32 [n, hidden]), `HEAD_ROWS` at a time: `use` sees the logits of rows
   * [begin, begin + logits rows) in memory that the next piece overwrites.
   */
  async logits(
    h: Tensor,
    use: (logits: Tensor, begin: number) => Promise<void> | void,
    control?: Control,
  ): Promise<void> {
    const frame = native().createFrame(this.#head);
    const rows = h.byteLength / (4 * this.#architecture.hiddenSize);
    try {
      for (let begin = 0; begin < rows; begin += HEAD_ROWS) {
        const end = Math.min(rows, begin + HEAD_ROWS);
        frame.bind(this.#headIn, h.rows(begin, end));
        frame.begin(null, [{ length: end - begin }]);
        await frame.run(0, this.#head.length, control);
        await use(frame.tensor(this.#headOut), begin);
      }
    } finally {
      frame.dispose();
    }
  }

  dispose(): void {
    for (const frame of this.#idle.splice(0)) frame.dispose();
    this.#program.dispose();
    this.#head.dispose();
  }

  /** Frames keep their registers, so a next batch of no larger size allocates nothing. */
  async #withFrame<T>(
    batch: Batch,
    activations: Activations = 'float32',
    use: (frame: Frame) => Promise<T>,
  ): Promise<T> {
    const frame = this.#idle.pop() ?? native().createFrame(this.#program);
    try {
      frame.setActivations(activations);
      frame.begin(batch.ids, batch.sequences);
      const result = await use(frame);
      this.#idle.push(frame);
      return result;
    } catch (error) {
      frame.dispose(); // it may hold an expert mask
      throw error;
    }
  }

  async #runLayers(frame: Frame, batch: Batch, options: RunOptions): Promise<void> {
    const { policy, control, onRoute, onLayer } = options;
    const alone = policy?.pesf !== undefined;
    if (policy?.pesf) frame.setPruning({ ...policy.pesf, mode: policy.mode });
    let done = 0;
    for (const [layer, stages] of this.layers.entries()) {
      const spec = this.#architecture.layers[layer]!.feedForward;
      const decide = policy && !alone && spec.kind === 'moe';
      if (spec.kind === 'moe' && (decide || onRoute)) {
        await frame.run(done, stages.route.to, control);
        done = stages.route.to;
        onRoute?.(layer, stages, frame);
      }
      if (decide) {
        const mask = expertMask(policy, layer, spec, batch.sequences, countsOf(frame, stages));
        frame.setPruning(mask && { mask, mode: policy.mode });
      }
      if (onLayer || decide) {
        await frame.run(done, stages.feedForward.to, control);
        done = stages.feedForward.to;
        if (decide) frame.setPruning(null);
        onLayer?.(layer, stages, frame);
      }
    }
    await frame.run(done, this.layers.at(-1)?.feedForward.to ?? this.#embedding, control);
    if (!policy || !alone) return;
    frame.setPruning(null);
    for (const [layer, stages] of this.layers.entries()) {
      const spec = this.#architecture.layers[layer]!.feedForward;
      if (spec.kind === 'moe') expertMask(policy, layer, spec, batch.sequences, countsOf(frame, stages));
    }
  }
}

/** How often each sequence chose each expert of a layer, [sequences, experts]. */
function countsOf(frame: Frame, stages: LayerStages): Int32Array {
  return frame.read(stages.registers.moe!.counts) as Int32Array;
}

/** out = lm_head(norm(x)) */
function pushHead(
  b: ProgramBuilder,
  w: WeightSource,
  { norm, head, logitScale = 1 }: Architecture,
  rows: 'tokens' | 'sequences',
  x: Register,
  out: Register,
): void {
  const normed = b.register('normed', norm.size, 'f32', rows);
  pushNorm(b, w, norm, x, normed);
  pushLinear(b, w, head, normed, out);
  if (logitScale !== 1) b.push({ op: 'scale', x: out, scale: logitScale });
}

/** The policy's decision for every sequence of the batch, or null when nothing is pruned. Single tokens are never pruned. */
function expertMask(
  policy: ExpertPolicy,
  layer: number,
  moe: MoeSpec,
  sequences: Sequence[],
  counts: Int32Array,
): Uint8Array | null {
  const { out: experts, topK } = moe.router;
  const mask = new Uint8Array(sequences.length * experts).fill(1);
  let pruned = false;
  sequences.forEach(({ length: tokens }, s) => {
    if (tokens === 1) return;
    const range = [s * experts, (s + 1) * experts] as const;
    const selection = { layer, tokens, topK, experts, counts: counts.subarray(...range) };
    if (policy.select(selection, mask.subarray(...range))) pruned = true;
  });
  return pruned ? mask : null;
}
