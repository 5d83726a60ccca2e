/**
 * QESC on one decoder layer (EAC-MoE section 4), in order: q, k, v; o behind these; the router behind the
 * quantized attention; the experts with the tokens that the calibrated router sends them, gate and up first, down behind these.
 *
 * Two streams of hidden states pass through: one through the full-precision layer, one through the layer as quantized so far.
 */
import type { Control, Device, Matrix, Tensor } from '../../types/native';
import type { DenseSpec, GluSpec, LayerSpec, LinearSpec, MoeSpec } from '../architecture/types';
import { native } from '../native';
import type { AttentionInput } from '../model/attention';
import type { WeightSource } from '../model/linear';
import { layerMatrices } from '../model/weights';
import { GluHidden, LayerRunner, Overlay, type Batch, type Bindings } from './runner';
import { InputStatistics, roundToNearest, sourceTensor, type Quantized, type Solver } from './matrix';
import type { LayerReport } from './options';
import type { Recipe } from './recipe';
import { calibrateRouter, routingOf, type Routing } from './router';

/** Hidden states of all calibration tokens, f32 [tokens, hidden]; rows of a sequence are consecutive. */
export interface Streams {
  full: Tensor;
  quantized: Tensor;
  /** Room for the inputs of a layer's feed-forward on both streams, f32 [tokens, hidden]. */
  xFull: Tensor;
  x: Tensor;
  batches: Batch[];
}

export interface LayerJob {
  index: number;
  spec: LayerSpec;
  source: WeightSource;
  recipe: Recipe;
  control: Control;
  /** Part of the layer that is done, 0 to 1. */
  onProgress: (fraction: number, message: string) => void;
}

export interface LayerResult {
  /** Weight name -> quantized matrix, or the calibrated router. */
  matrices: Map<string, Matrix>;
  report: Omit<LayerReport, 'seconds'>;
}

/** Rows of an expert's input gathered at a time. */
const GATHER_ROWS = 4096;

/** Quantizes one layer and moves both streams through it. */
export async function quantizeLayer(job: LayerJob, streams: Streams): Promise<LayerResult> {
  return new LayerQuantizer(job, streams).run();
}

/** Moves both streams through a layer that was quantized before: what `quantizeLayer` leaves behind, without the work. */
export async function advanceLayer(job: LayerJob, streams: Streams, quantized: WeightSource): Promise<void> {
  for (const [weights, h] of [
    [job.source, streams.full],
    [quantized, streams.quantized],
  ] as const) {
    const runner = new LayerRunner(job.spec, weights, h.device);
    const { stages } = runner;
    for (const batch of streams.batches) {
      await runner.run(
        batch,
        [[stages.registers.h, h]],
        stages.attentionNorm,
        stages.feedForward,
        job.control,
      );
    }
    runner.dispose();
  }
}

/** Round to nearest: no data, no streams. */
export async function roundLayer(job: LayerJob): Promise<LayerResult> {
  const { index, source, recipe, control, onProgress } = job;
  const matrices = new Map<string, Matrix>();
  const specs = layerMatrices(job.spec);
  for (const [i, spec] of specs.entries()) {
    if (i % 16 === 0) onProgress(i / specs.length, 'rounding');
    const q = recipe.plan.get(spec.weight);
    if (q) matrices.set(spec.weight, await roundToNearest(sourceTensor(source, spec), q, recipe, control));
  }
  return { matrices, report: { layer: index, errors: {} } };
}

class LayerQuantizer {
  readonly #job: LayerJob;
  readonly #streams: Streams;
  readonly #weights: Overlay;
  readonly #full: LayerRunner;
  /** By weight name. */
  readonly #errors = new Map<string, { kind: string; error: number }>();

  constructor(job: LayerJob, streams: Streams) {
    this.#job = job;
    this.#streams = streams;
    this.#weights = new Overlay(job.source);
    this.#full = new LayerRunner(job.spec, job.source, streams.x.device);
  }

  async run(): Promise<LayerResult> {
    const { index, spec, onProgress } = this.#job;
    const report: LayerResult['report'] = { layer: index, errors: {} };
    try {
      onProgress(0, 'attention');
      await this.#attentionInputs();
      await this.#attentionOutput();
      onProgress(0.15, spec.feedForward.kind === 'moe' ? 'router' : 'feed-forward');
      if (spec.feedForward.kind === 'moe') report.router = await this.#mixture(spec.feedForward);
      else await this.#dense(spec.feedForward);
      report.errors = this.#meanErrors();
      return { matrices: this.#weights.matrices, report };
    } finally {
      this.#full.dispose();
    }
  }

  /** By kind, summed in the order of the layer's matrices: the order in which experts get done varies. */
  #meanErrors(): Record<string, number> {
    const values: Record<string, number[]> = {};
    for (const { weight } of layerMatrices(this.#job.spec)) {
      const found = this.#errors.get(weight);
      if (found) (values[found.kind] ??= []).push(found.error);
    }
    const mean = (all: number[]) => all.reduce((a, b) => a + b, 0) / all.length;
    return Object.fromEntries(Object.entries(values).map(([kind, all]) => [kind, mean(all)]));
  }

  /** The linear layers before the attention, those that share an input together, each behind the quantized ones before it. */
  async #attentionInputs(): Promise<void> {
    for (const [i, input] of this.#full.stages.attentionInputs.entries()) {
      const { linears } = input;
      const statistics = this.#statistics(linears);
      if (statistics) {
        const quantized = this.#runner();
        await this.#collect(statistics, quantized, quantized.stages.attentionInputs[i]!, input);
        quantized.dispose();
      }
      await this.#quantizeTogether(linears, 'attention', statistics);
    }
  }

  /** What both streams bring to a place before the attention. */
  async #collect(
    statistics: InputStatistics,
    quantized: LayerRunner,
    ours: AttentionInput,
    theirs: AttentionInput,
  ): Promise<void> {
    const { recipe, control } = this.#job;
    for (const batch of this.#streams.batches) {
      const at = async (runner: LayerRunner, place: AttentionInput) => {
        const { from } = runner.stages.attentionNorm;
        const range = { from, to: place.at };
        const frame = await runner.run(batch, this.#hidden(runner), range, range, control);
        return frame.tensor(place.register);
      };
      const x = await at(quantized, ours);
      await statistics.add(x, recipe.twoStreamTargets ? await at(this.#full, theirs) : undefined);
    }
  }

  /** The output projection behind the quantized ones. Afterwards both streams stand in the middle of the layer, and the feed-forward's inputs are stored. */
  async #attentionOutput(): Promise<void> {
    const { spec, control } = this.#job;
    const { o } = spec.attention;
    const statistics = this.#statistics([o]);
    let quantized = this.#runner();
    for (const batch of this.#streams.batches) {
      const { stages } = this.#full;
      const b = await this.#full.run(
        batch,
        this.#hidden(this.#full, true),
        stages.attentionNorm,
        stages.feedForwardNorm,
        control,
      );
      if (!statistics) continue;
      const a = await quantized.run(
        batch,
        this.#hidden(quantized),
        quantized.stages.attentionNorm,
        quantized.stages.attention,
        control,
      );
      await statistics.add(a.tensor(quantized.stages.registers.context), b.tensor(stages.registers.context));
    }
    quantized.dispose();
    this.#full.release();
    await this.#quantizeTogether([o], 'attention', statistics);
    quantized = this.#runner();
    for (const batch of this.#streams.batches) {
      await quantized.run(
        batch,
        this.#hidden(quantized, true),
        quantized.stages.attentionNorm,
        quantized.stages.feedForwardNorm,
        control,
      );
    }
    quantized.dispose();
  }

  async #mixture(moe: MoeSpec): Promise<LayerReport['router']> {
    const { recipe, onProgress, control } = this.#job;
    const full = await routingOf(this.#full, this.#streams.xFull, moe, this.#streams.batches, control);
    this.#full.release();
    const outcome = await calibrateRouter({
      moe,
      recipe,
      control,
      weight: sourceTensor(this.#weights, moe.router),
      x: this.#streams.x,
      full,
      batches: this.#streams.batches,
      runner: (weight) => {
        const overlay = new Overlay(this.#weights);
        overlay.matrices.set(moe.router.weight, weight);
        return new LayerRunner(this.#job.spec, overlay, this.#device);
      },
    });
    if (outcome.weight) this.#weights.matrices.set(moe.router.weight, outcome.weight);
    onProgress(0.2, 'experts');
    const { counts, starved } = await this.#experts(moe, outcome.routing);
    if (moe.shared) await this.#glu(moe.shared, 'shared', moe.activation, null);
    onProgress(0.9, 'forward');
    await this.#advance(full, outcome.routing);
    for (const routing of [full, outcome.routing]) routing.dispose();
    return {
      ...outcome.report,
      expertTokens: [Math.min(...counts), Math.max(...counts)],
      starvedExperts: starved,
    };
  }

  async #dense(spec: DenseSpec): Promise<void> {
    await this.#glu(spec, 'dense', spec.activation, null);
    this.#job.onProgress(0.9, 'forward');
    await this.#advance();
  }

  /** Two experts at a time: the serial parts of one hide behind the other. Small layers gain, large ones keep all threads busy anyway. */
  async #experts(moe: MoeSpec, routing: Routing): Promise<{ counts: number[]; starved: number[] }> {
    const { recipe, onProgress } = this.#job;
    const lists = await routing.byExpert();
    const counts = lists.map((l) => l.tokens.length);
    const starved: number[] = [];
    let [next, done] = [0, 0];
    const worker = async () => {
      while (next < moe.experts.length) {
        const e = next++;
        let list = lists[e]!;
        if (recipe.method === 'gptq' && list.tokens.length < recipe.minExpertTokens) {
          starved.push(e);
          list = await routing.topUp(e, list, recipe.minExpertTokens);
        }
        const selection = {
          rows: list.tokens,
          weights: hessianWeights(list.weights, recipe.routingWeightPower),
        };
        await this.#glu(moe.experts[e]!, 'expert', moe.activation, selection);
        onProgress(0.2 + (0.65 * ++done) / moe.experts.length, `experts (${done} of ${moe.experts.length})`);
      }
    };
    const wide = Math.max(moe.experts[0]!.gate.in, moe.experts[0]!.gate.out) > 8192;
    const workers = [worker()];
    if (!wide) workers.push(worker());
    const settled = await Promise.allSettled(workers);
    for (const s of settled) if (s.status === 'rejected') throw s.reason;
    return { counts, starved: starved.sort((a, b) => a - b) };
  }

  /** gate and up, then down behind them, from the given rows of the stored inputs (null: all). */
  async #glu(
    spec: GluSpec,
    kind: string,
    activation: MoeSpec['activation'],
    selection: Selection | null,
  ): Promise<void> {
    const { source, control } = this.#job;
    let statistics = this.#statistics([spec.gate, spec.up]);
    if (statistics) await this.#eachInput(selection, (x, xFull, w) => statistics!.add(x, xFull, w));
    await this.#quantizeTogether([spec.gate, spec.up], kind, statistics);

    statistics = this.#statistics([spec.down]);
    if (statistics) {
      const quantized = new GluHidden(spec, activation, this.#weights, this.#device);
      const full = this.#job.recipe.twoStreamTargets
        ? new GluHidden(spec, activation, source, this.#device)
        : undefined;
      await this.#eachInput(selection, async (x, xFull, w) =>
        statistics!.add(await quantized.run(x, control), xFull && (await full?.run(xFull, control)), w),
      );
      quantized.dispose();
      full?.dispose();
    }
    await this.#quantizeTogether([spec.down], kind, statistics);
  }

  /** Both streams through the feed-forward, with the routing that was found. */
  async #advance(full?: Routing, quantized?: Routing): Promise<void> {
    const q = this.#runner();
    const s = this.#streams;
    for (const [runner, h, x, routing] of [
      [this.#full, s.full, s.xFull, full],
      [q, s.quantized, s.x, quantized],
    ] as const) {
      const { h: rh, x: rx, moe } = runner.stages.registers;
      const bindings: Bindings = [
        [rh, h],
        [rx, x],
      ];
      if (routing && moe) bindings.push(...routing.bindings(moe));
      for (const batch of this.#streams.batches) {
        await runner.run(
          batch,
          bindings,
          runner.stages.feedForward,
          runner.stages.feedForward,
          this.#job.control,
        );
      }
      runner.release();
    }
    q.dispose();
  }

  async #quantizeTogether(
    linears: LinearSpec[],
    kind: string,
    statistics: InputStatistics | undefined,
  ): Promise<void> {
    const { recipe, source, control } = this.#job;
    const planned = linears.filter((spec) => recipe.plan.get(spec.weight));
    const solver: Solver | undefined = await statistics?.solver(linears[0]!.weight, recipe, control);
    for (const spec of planned) {
      const w = sourceTensor(source, spec);
      const q = recipe.plan.get(spec.weight)!;
      const { matrix, error }: Quantized = solver
        ? await solver.quantize(w, q)
        : { matrix: await roundToNearest(w, q, recipe, control), error: 0 };
      this.#weights.matrices.set(spec.weight, matrix);
      this.#errors.set(spec.weight, { kind, error });
    }
    solver?.dispose();
  }

  /** Calls `use` with the stored inputs of both streams, a block of rows at a time; `use` disposes them. */
  async #eachInput(
    selection: Selection | null,
    use: (x: Tensor, xFull: Tensor | undefined, weights?: Float32Array) => Promise<void>,
  ): Promise<void> {
    const { x, xFull, batches } = this.#streams;
    const inputs = this.#job.recipe.twoStreamTargets ? [x, xFull] : [x];
    if (!selection) {
      for (const { begin, end } of batches) {
        const [a, b] = inputs.map((from) => from.rows(begin, end));
        await use(a!, b);
      }
      return;
    }
    const { rows, weights } = selection;
    const width = this.#job.spec.attentionNorm.size;
    const size = Math.min(GATHER_ROWS, rows.length);
    const buffers = inputs.map((from) => ({ from, to: native().zeros('f32', [size, width], from.device) }));
    for (let begin = 0; begin < rows.length; begin += size) {
      const part = rows.subarray(begin, begin + size);
      const gathered = buffers.map(({ from, to }) => ({ from, to: to.rows(0, part.length) }));
      for (const { from, to } of gathered) await native().gatherRows(from, part, to);
      await use(gathered[0]!.to, gathered[1]?.to, weights?.subarray(begin, begin + size));
    }
    for (const { to } of buffers) to.dispose();
  }

  /** For matrices that share an input; none where no data are needed. */
  #statistics(linears: LinearSpec[]): InputStatistics | undefined {
    const { method, twoStreamTargets, plan } = this.#job.recipe;
    const needed = method === 'gptq' && linears.some((spec) => plan.get(spec.weight));
    return needed ? new InputStatistics(linears[0]!.in, twoStreamTargets, this.#device) : undefined;
  }

  /** Where the streams lie: all work on them is done there. */
  get #device(): Device {
    return this.#streams.x.device;
  }

  #runner(): LayerRunner {
    return new LayerRunner(this.#job.spec, this.#weights, this.#device);
  }

  /** A runner's residual stream, and with `keepInput` the place where the feed-forward's input is stored. */
  #hidden(runner: LayerRunner, keepInput = false): Bindings {
    const full = runner === this.#full;
    const { h, x } = runner.stages.registers;
    const bindings: Bindings = [[h, full ? this.#streams.full : this.#streams.quantized]];
    if (keepInput) bindings.push([x, full ? this.#streams.xFull : this.#streams.x]);
    return bindings;
  }
}

/**
 * Routing weights as weights in a Hessian, whose scale is of no account: relative to the largest, or those of an expert that is never
 * chosen would vanish in float32. None where all are 0.
 */
function hessianWeights(routing: Float32Array, power: number): Float32Array | undefined {
  const largest = routing.reduce((a, b) => Math.max(a, b), 0);
  return power > 0 && largest > 0 ? routing.map((w) => Math.pow(w / largest, power)) : undefined;
}

/** Rows of the stored inputs, with a weight each. */
interface Selection {
  rows: Int32Array;
  weights?: Float32Array;
}
