/** Routers: what they say about all calibration tokens, and calibrating them against expert shift (EAC-MoE section 4, Eq. 5). */
import { setImmediate as nextTurn } from 'node:timers/promises';
import type { Control, Device, HessianFactor, Tensor } from '../../types/native';
import type { MoeSpec } from '../architecture/types';
import type { MoeRegisters } from '../model/layer';
import { countShift, ShiftMeter, type ShiftRates } from '../evaluate/shift';
import { native } from '../native';
import type { LayerReport } from './options';
import { defaultWindow, type Recipe } from './recipe';
import type { Batch, Bindings, LayerRunner } from './runner';

/** Tokens of an expert, rising, and the weight that each gave it. */
export interface ExpertTokens {
  tokens: Int32Array;
  weights: Float32Array;
}

/** One layer's routing of all calibration tokens. */
export class Routing {
  readonly logits: Tensor;
  readonly weights: Tensor;
  readonly indices: Tensor;
  readonly #topK: number;
  readonly #experts: number;

  constructor(tokens: number, moe: MoeSpec, device: Device) {
    this.#topK = moe.router.topK;
    this.#experts = moe.experts.length;
    this.logits = native().zeros('f32', [tokens, this.#experts], device);
    this.weights = native().zeros('f32', [tokens, this.#topK], device);
    this.indices = native().zeros('i32', [tokens, this.#topK], device);
  }

  bindings(registers: MoeRegisters): Bindings {
    return [
      [registers.logits, this.logits],
      [registers.weights, this.weights],
      [registers.indices, this.indices],
    ];
  }

  /** The tokens of every expert. */
  async byExpert(): Promise<ExpertTokens[]> {
    const indices = this.indices.toArray();
    const weights = this.weights.toArray();
    const counts = new Int32Array(this.#experts);
    for (const e of indices) if (e >= 0) counts[e]!++;
    const lists = Array.from(counts, (n) => ({ tokens: new Int32Array(n), weights: new Float32Array(n) }));
    const filled = new Int32Array(this.#experts);
    for (let i = 0; i < indices.length; i++) {
      const e = indices[i]!;
      if (e < 0) continue;
      const at = filled[e]!++;
      lists[e]!.tokens[at] = Math.floor(i / this.#topK);
      lists[e]!.weights[at] = weights[i]!;
      if (i % 65536 === 65535) await nextTurn();
    }
    return lists;
  }

  /**
   * More tokens for an expert that few chose: those of the rest whose logit for it is highest, each with the weight that a softmax over
   * all experts gives it.
   */
  async topUp(expert: number, list: ExpertTokens, wanted: number): Promise<ExpertTokens> {
    const more = await native().topRows(this.logits, expert, wanted - list.tokens.length, list.tokens);
    const tokens = new Int32Array(list.tokens.length + more.length);
    const weights = new Float32Array(tokens.length);
    tokens.set(list.tokens);
    tokens.set(more, list.tokens.length);
    weights.set(list.weights);
    for (const [i, t] of more.entries()) {
      const row = this.logits.rows(t, t + 1);
      const logits = row.toArray() as Float32Array;
      row.dispose();
      const max = logits.reduce((a, b) => Math.max(a, b));
      const sum = logits.reduce((a, b) => a + Math.exp(b - max), 0);
      weights[list.tokens.length + i] = Math.exp(logits[expert]! - max) / sum;
    }
    return { tokens, weights };
  }

  /** Expert shift of this routing against another over some batches. */
  async shift(other: Routing, batches: Batch[]): Promise<ShiftRates> {
    const meter = new ShiftMeter();
    for (const { begin, end } of batches) {
      const [a, b] = [this, other].map((r) => {
        const rows = r.indices.rows(begin, end);
        const indices = rows.toArray() as Int32Array;
        rows.dispose();
        return indices;
      });
      meter.add(0, countShift(b!, a!, this.#topK));
      await nextTurn();
    }
    const { changedAll, changedAny, changedHalf } = meter.result();
    return { changedAll, changedAny, changedHalf };
  }

  dispose(): void {
    for (const t of [this.logits, this.weights, this.indices]) t.dispose();
  }
}

/** Runs a layer's router over stored inputs. */
export async function routingOf(
  runner: LayerRunner,
  x: Tensor,
  moe: MoeSpec,
  batches: Batch[],
  control: Control,
): Promise<Routing> {
  const routing = new Routing(batches.at(-1)!.end, moe, x.device);
  const { registers, route } = runner.stages;
  const bindings: Bindings = [[registers.x, x], ...routing.bindings(registers.moe!)];
  for (const batch of batches) await runner.run(batch, bindings, route, route, control);
  return routing;
}

export interface RouterJob {
  moe: MoeSpec;
  recipe: Recipe;
  control: Control;
  /** Original weight, [experts, hidden]. */
  weight: Tensor;
  /** Router inputs of the quantized stream. */
  x: Tensor;
  /** Routing of the full-precision stream. */
  full: Routing;
  batches: Batch[];
  /** The layer with another router. */
  runner: (weight: Tensor) => LayerRunner;
}

export interface RouterOutcome {
  /** In the original's dtype; absent when the original stays. */
  weight?: Tensor;
  /** Of the quantized stream, with the router that stays. */
  routing: Routing;
  report: Omit<NonNullable<LayerReport['router']>, 'expertTokens' | 'starvedExperts'>;
}

/** One part in this many of the calibration batches judges a fit on the others, before the fit on all of them is taken. */
const HELD_OUT = 16;

export async function calibrateRouter(job: RouterJob): Promise<RouterOutcome> {
  const { recipe, weight, full, batches } = job;
  const before = await route(job, weight);
  const shiftBefore = await before.shift(full, batches);
  const original = {
    iterations: 0,
    lossBefore: 0,
    lossAfter: 0,
    shiftBefore,
    shiftAfter: shiftBefore,
    kept: false,
  };
  if (!recipe.router) return { routing: before, report: original };

  const factor = await inputFactor(job);
  try {
    return await fitAndJudge(job, factor, before, original);
  } finally {
    factor.dispose();
  }
}

/** The factor of the Hessian of the router's inputs. */
async function inputFactor({ x, batches, recipe, control }: RouterJob): Promise<HessianFactor> {
  const width = x.shape[1]!;
  const h = native().zeros('f32', [width, width], x.device);
  for (const { begin, end } of batches) await native().accumulateHessian(h, x.rows(begin, end));
  const factor = await native().factorHessian(h, recipe.damping, true, control);
  h.dispose();
  return factor;
}

async function fitAndJudge(
  job: RouterJob,
  factor: HessianFactor,
  before: Routing,
  original: RouterOutcome['report'],
): Promise<RouterOutcome> {
  const { full, batches } = job;
  const { shiftBefore } = original;
  const held = Math.floor(batches.length / HELD_OUT);
  if (held > 0) {
    const judges = batches.slice(-held);
    const { routing } = await fit(job, factor, batches.length - held);
    const worse =
      (await routing.shift(full, judges)).changedAny > (await before.shift(full, judges)).changedAny;
    routing.dispose();
    if (worse) return { routing: before, report: original };
  }
  const { calibrated, routing, iterations, lossBefore, lossAfter } = await fit(job, factor, batches.length);
  const shiftAfter = await routing.shift(full, batches);
  if (shiftAfter.changedAny > shiftBefore.changedAny) {
    routing.dispose();
    return { routing: before, report: original };
  }
  before.dispose();
  const report = { iterations, lossBefore, lossAfter, shiftBefore, shiftAfter, kept: true };
  return { weight: calibrated, routing, report };
}

async function route({ runner, x, moe, batches, control }: RouterJob, weight: Tensor): Promise<Routing> {
  const layer = runner(weight);
  const routing = await routingOf(layer, x, moe, batches, control);
  layer.dispose();
  return routing;
}

/** Fits the router to the first `count` batches; returns it in the original's dtype, and what it says about all of them. */
async function fit(job: RouterJob, factor: HessianFactor, count: number) {
  const { moe, weight, x, full, batches, control } = job;
  const { loss, k, ridge } = job.recipe.router!;
  const experts = moe.experts.length;
  const window = loss === 'mse' ? experts : k || defaultWindow(experts, moe.router.topK);
  const tokens = batches[count - 1]!.end;
  const { weight: fitted, ...result } = await native().calibrateRouter(
    weight,
    x.rows(0, tokens),
    full.logits.rows(0, tokens),
    { k: Math.min(window, experts), ridge, tolerance: 1e-5, maxIterations: 100 },
    control,
  );
  const calibrated = await native().roundRouter(fitted, factor, weight.dtype);
  fitted.dispose();
  return { calibrated, routing: await route(job, calibrated), ...result };
}
