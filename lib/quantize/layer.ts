/**
 * QESC on one decoder layer (EAC-MoE section 4), in order: q, k, v; o behind the quantized q, k, v; the router behind the
 * quantized attention; the experts with the tokens that the calibrated router sends them, gate and up first, down behind these.
 *
 * Two streams of hidden states pass through: one through the full-precision layer, one through the layer as quantized so far.
 */
import type { Control, Matrix, Tensor } from '../../types/native';
import type { DenseSpec, GluSpec, LayerSpec, LinearSpec, MoeSpec } from '../architecture/types';
import { native } from '../native';
import type { WeightSource } from '../model/layer';
import { GluHidden, LayerRunner, Overlay, type Batch, type Bindings } from './runner';
import { InputStatistics, roundToNearest, sourceTensor, type Quantized, type Solver } from './matrix';
import type { LayerReport } from './options';
import type { Recipe } from './recipe';
import { calibrateRouter, routingOf, type Routing } from './router';

/** Hidden states of all calibration tokens, f32 [tokens, hidden]; rows of a sequence are consecutive. */
export interface Streams {
  full: Tensor;
  quantized: Tensor;
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
    const runner = new LayerRunner(job.spec, weights);
    const { stages } = runner;
    for (const batch of streams.batches) {
      await runner.run(batch, [[stages.registers.h, h]], stages.attentionNorm, stages.feedForward, job.control);
    }
    runner.dispose();
  }
}

/** Round to nearest: no data, no streams. */
export async function roundLayer(job: LayerJob): Promise<LayerResult> {
  const matrices = new Map<string, Matrix>();
  for (const spec of quantizable(job.spec)) {
    const q = job.recipe.plan.get(spec.weight);
    if (q) matrices.set(spec.weight, await roundToNearest(sourceTensor(job.source, spec), q, job.recipe.clipSearch));
  }
  return { matrices, report: { layer: job.index, errors: {} } };
}

function quantizable({ attention: a, feedForward: f }: LayerSpec): LinearSpec[] {
  const glus: GluSpec[] = f.kind === 'dense' ? [f] : [...f.experts, ...(f.shared ? [f.shared] : [])];
  return [a.q, a.k, a.v, a.o, ...glus.flatMap(({ gate, up, down }) => [gate, up, down])];
}

class LayerQuantizer {
  readonly #job: LayerJob;
  readonly #streams: Streams;
  readonly #weights: Overlay;
  readonly #full: LayerRunner;
  readonly #errors = new Map<string, number[]>();
  /** Inputs of the feed-forward, f32 [tokens, hidden]. */
  #x!: Tensor;
  #xFull!: Tensor;

  constructor(job: LayerJob, streams: Streams) {
    this.#job = job;
    this.#streams = streams;
    this.#weights = new Overlay(job.source);
    this.#full = new LayerRunner(job.spec, job.source);
  }

  async run(): Promise<LayerResult> {
    const { index, spec, onProgress } = this.#job;
    const hidden = spec.attentionNorm.size;
    const tokens = this.#streams.batches.at(-1)!.end;
    const report: LayerResult['report'] = { layer: index, errors: {} };
    try {
      onProgress(0, 'attention');
      await this.#attentionInputs();
      this.#x = native().zeros('f32', [tokens, hidden]);
      this.#xFull = native().zeros('f32', [tokens, hidden]);
      await this.#attentionOutput();
      onProgress(0.15, spec.feedForward.kind === 'moe' ? 'router' : 'feed-forward');
      if (spec.feedForward.kind === 'moe') report.router = await this.#mixture(spec.feedForward);
      else await this.#dense(spec.feedForward);
      for (const [kind, values] of this.#errors) report.errors[kind] = values.reduce((a, b) => a + b, 0) / values.length;
      return { matrices: this.#weights.matrices, report };
    } finally {
      this.#full.dispose();
      this.#x?.dispose();
      this.#xFull?.dispose();
    }
  }

  /** q, k and v share their input. */
  async #attentionInputs(): Promise<void> {
    const { spec, recipe, control } = this.#job;
    const { attention } = spec;
    const linears = [attention.q, attention.k, attention.v];
    const statistics = this.#statistics(attention.q.in);
    const quantized = this.#runner();
    for (const batch of statistics ? this.#streams.batches : []) {
      const a = await quantized.run(batch, this.#hidden(quantized), quantized.stages.attentionNorm, quantized.stages.attentionNorm, control);
      const b = recipe.twoStreamTargets
        ? await this.#full.run(batch, this.#hidden(this.#full), this.#full.stages.attentionNorm, this.#full.stages.attentionNorm, control)
        : undefined;
      await statistics!.add(a.tensor(quantized.stages.registers.x), b?.tensor(this.#full.stages.registers.x));
    }
    quantized.dispose();
    await this.#quantizeTogether(linears, 'attention', statistics);
  }

  /** o behind the quantized q, k, v. Afterwards both streams stand in the middle of the layer, and the feed-forward's inputs are stored. */
  async #attentionOutput(): Promise<void> {
    const { spec, control } = this.#job;
    const { o } = spec.attention;
    const statistics = this.#statistics(o.in);
    let quantized = this.#runner();
    for (const batch of this.#streams.batches) {
      const { stages } = this.#full;
      const b = await this.#full.run(batch, this.#hidden(this.#full, true), stages.attentionNorm, stages.feedForwardNorm, control);
      if (!statistics) continue;
      const a = await quantized.run(batch, this.#hidden(quantized), quantized.stages.attentionNorm, quantized.stages.attention, control);
      await statistics.add(a.tensor(quantized.stages.registers.context), b.tensor(stages.registers.context));
    }
    quantized.dispose();
    await this.#quantizeTogether([o], 'attention', statistics);
    quantized = this.#runner();
    for (const batch of this.#streams.batches) {
      await quantized.run(batch, this.#hidden(quantized, true), quantized.stages.attentionNorm, quantized.stages.feedForwardNorm, control);
    }
    quantized.dispose();
  }

  async #mixture(moe: MoeSpec): Promise<LayerReport['router']> {
    const { recipe, onProgress, control } = this.#job;
    const full = await routingOf(this.#full, this.#xFull, moe, this.#streams.batches, control);
    const outcome = await calibrateRouter({
      moe,
      recipe,
      control,
      weight: sourceTensor(this.#weights, moe.router),
      x: this.#x,
      full,
      batches: this.#streams.batches,
      runner: (weight) => {
        const overlay = new Overlay(this.#weights);
        overlay.matrices.set(moe.router.weight, weight);
        return new LayerRunner(this.#job.spec, overlay);
      },
    });
    if (outcome.weight) this.#weights.matrices.set(moe.router.weight, outcome.weight);
    onProgress(0.2, 'experts');
    const { counts, starved } = await this.#experts(moe, outcome.routing);
    if (moe.shared) await this.#glu(moe.shared, 'shared', moe.activation, null);
    onProgress(0.9, 'forward');
    await this.#advance(full, outcome.routing);
    for (const routing of [full, outcome.routing]) routing.dispose();
    return { ...outcome.report, expertTokens: [Math.min(...counts), Math.max(...counts)], starvedExperts: starved };
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
        const weights =
          recipe.routingWeightPower > 0 ? list.weights.map((w) => Math.pow(w, recipe.routingWeightPower)) : undefined;
        await this.#glu(moe.experts[e]!, 'expert', moe.activation, { rows: list.tokens, weights });
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
  async #glu(spec: GluSpec, kind: string, activation: MoeSpec['activation'], selection: Selection | null): Promise<void> {
    const { source, control } = this.#job;
    let statistics = this.#statistics(spec.gate.in);
    if (statistics) await this.#eachInput(selection, (x, xFull, w) => statistics!.add(x, xFull, w));
    await this.#quantizeTogether([spec.gate, spec.up], kind, statistics);

    statistics = this.#statistics(spec.down.in);
    if (statistics) {
      const quantized = new GluHidden(spec, activation, this.#weights);
      const full = this.#job.recipe.twoStreamTargets ? new GluHidden(spec, activation, source) : undefined;
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
    for (const [runner, h, x, routing] of [
      [this.#full, this.#streams.full, this.#xFull, full],
      [q, this.#streams.quantized, this.#x, quantized],
    ] as const) {
      const { h: rh, x: rx, moe } = runner.stages.registers;
      const bindings: Bindings = [
        [rh, h],
        [rx, x],
      ];
      if (routing && moe) bindings.push(...routing.bindings(moe));
      for (const batch of this.#streams.batches) {
        await runner.run(batch, bindings, runner.stages.feedForward, runner.stages.feedForward, this.#job.control);
      }
    }
    q.dispose();
  }

  async #quantizeTogether(linears: LinearSpec[], kind: string, statistics: InputStatistics | undefined): Promise<void> {
    const { recipe, source, control } = this.#job;
    const planned = linears.filter((spec) => recipe.plan.get(spec.weight));
    let solver: Solver | undefined;
    if (statistics && planned.length > 0) solver = await statistics.solver(recipe, control);
    for (const spec of planned) {
      const w = sourceTensor(source, spec);
      const q = recipe.plan.get(spec.weight)!;
      const { matrix, error }: Quantized = solver
        ? await solver.quantize(w, q)
        : { matrix: await roundToNearest(w, q, recipe.clipSearch), error: 0 };
      this.#weights.matrices.set(spec.weight, matrix);
      if (!this.#errors.has(kind)) this.#errors.set(kind, []);
      this.#errors.get(kind)!.push(error);
    }
    solver?.dispose();
  }

  /** Calls `use` with the stored inputs of both streams, a block of rows at a time. */
  async #eachInput(
    selection: Selection | null,
    use: (x: Tensor, xFull: Tensor | undefined, weights?: Float32Array) => Promise<void>,
  ): Promise<void> {
    const { twoStreamTargets } = this.#job.recipe;
    if (!selection) {
      for (const { begin, end } of this.#streams.batches) {
        await use(this.#x.rows(begin, end), twoStreamTargets ? this.#xFull.rows(begin, end) : undefined);
      }
      return;
    }
    const { rows, weights } = selection;
    const width = this.#job.spec.attentionNorm.size;
    const size = Math.min(GATHER_ROWS, rows.length);
    const buffers = (twoStreamTargets ? [this.#x, this.#xFull] : [this.#x]).map((from) => ({
      from,
      to: native().zeros('f32', [size, width]),
    }));
    for (let begin = 0; begin < rows.length; begin += size) {
      const part = rows.subarray(begin, begin + size);
      const [x, xFull] = buffers.map(({ to }) => to.rows(0, part.length));
      await native().gatherRows(this.#x, part, x!);
      if (xFull) await native().gatherRows(this.#xFull, part, xFull);
      await use(x!, xFull, weights?.subarray(begin, begin + size));
    }
    for (const { to } of buffers) to.dispose();
  }

  #statistics(width: number): InputStatistics | undefined {
    const { method, twoStreamTargets } = this.#job.recipe;
    return method === 'gptq' ? new InputStatistics(width, twoStreamTargets) : undefined;
  }

  #runner(): LayerRunner {
    return new LayerRunner(this.#job.spec, this.#weights);
  }

  /** A runner's residual stream, and with `keepInput` the place where the feed-forward's input is stored. */
  #hidden(runner: LayerRunner, keepInput = false): Bindings {
    const full = runner === this.#full;
    const { h, x } = runner.stages.registers;
    const bindings: Bindings = [[h, full ? this.#streams.full : this.#streams.quantized]];
    if (keepInput) bindings.push([x, full ? this.#xFull : this.#x]);
    return bindings;
  }
}

/** Rows of the stored inputs, with a weight each. */
interface Selection {
  rows: Int32Array;
  weights?: Float32Array;
}
