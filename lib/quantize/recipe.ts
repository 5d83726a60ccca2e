/** The options of `quantizeMoE`, checked, with defaults filled in: what determines the result, bit for bit. */
import type { Architecture } from '../architecture/types';
import { EacMoeError } from '../errors';
import type { QuantizeOptions } from './options';
import { makePlan, type Plan } from './plan';

export interface RouterRecipe {
  loss: 'topk-mse' | 'mse';
  /** 0: chosen by `defaultWindow` for the layer's number of experts. */
  k: number;
  ridge: number;
}

export interface Recipe {
  method: 'gptq' | 'rtn';
  plan: Plan;
  router: RouterRecipe | null;
  actOrder: boolean;
  twoStreamTargets: boolean;
  routingWeightPower: number;
  clipSearch: boolean;
  damping: number;
  minExpertTokens: number;
  samples: number;
  seqLen: number;
  seed: number;
}

/**
 * The window K of TopK-MSE for a router of `experts` experts, of which `topK` are chosen: a quarter of the experts plus four, rounded up
 * to even, at least 8 and at least twice topK, at most all. Gives the paper's choices (section 4): 8 of 8, 8 of 16, 20 of 60, 20 of 64.
 */
export function defaultWindow(experts: number, topK: number): number {
  const quarter = 2 * Math.ceil((experts / 4 + 4) / 2);
  return Math.min(experts, Math.max(8, quarter, 2 * topK));
}

function invalid(name: string, what: string, found: unknown): never {
  throw new EacMoeError(
    'INVALID_ARGUMENT',
    `${name} must be ${what}; found ${JSON.stringify(found) ?? String(found)}`,
  );
}

function number(name: string, value: number, ok: boolean, what: string): number {
  return typeof value === 'number' && Number.isFinite(value) && ok ? value : invalid(name, what, value);
}
const integer = (name: string, value: number, least: number): number =>
  number(name, value, Number.isSafeInteger(value) && value >= least, `an integer >= ${least}`);
const boolean = (name: string, value: unknown): boolean =>
  typeof value === 'boolean' ? value : invalid(name, 'true or false', value);

function routerRecipe(router: QuantizeOptions['router']): RouterRecipe | null {
  if (router === false) return null;
  const { loss = 'topk-mse', k = 0, ridge = 1e-3 } = router ?? {};
  if (loss !== 'topk-mse' && loss !== 'mse') invalid('router.loss', `'topk-mse' or 'mse'`, loss);
  return {
    loss,
    k: k === 0 ? 0 : integer('router.k', k, 1),
    ridge: number('router.ridge', ridge, ridge > 0, 'a positive number'),
  };
}

export function makeRecipe(architecture: Architecture, o: QuantizeOptions): Recipe {
  const method = o.method ?? 'gptq';
  if (method !== 'gptq' && method !== 'rtn') invalid('method', `'gptq' or 'rtn'`, method);
  const { damping = 0.01, routingWeightPower = 1 } = o;
  const plan = makePlan(architecture, {
    bits: o.bits ?? 3,
    attentionBits: o.attentionBits,
    sharedBits: o.sharedBits,
    groupSize: o.groupSize,
    symmetric: o.symmetric,
  });
  if ([...plan.values()].every((q) => q === null)) {
    throw new EacMoeError(
      'INVALID_ARGUMENT',
      'bits leaves every matrix at 16 bit: there is nothing to quantize',
    );
  }
  return {
    method,
    plan,
    router: routerRecipe(o.router),
    actOrder: boolean('actOrder', o.actOrder ?? true),
    twoStreamTargets: boolean('twoStreamTargets', o.twoStreamTargets ?? true),
    routingWeightPower: number(
      'routingWeightPower',
      routingWeightPower,
      routingWeightPower >= 0,
      'a number >= 0',
    ),
    clipSearch: boolean('clipSearch', o.clipSearch ?? false),
    damping: number('damping', damping, damping > 0, 'a positive number'),
    minExpertTokens: integer('minExpertTokens', o.minExpertTokens ?? 256, 0),
    samples: integer('samples', o.samples ?? 128, 1),
    seqLen: Math.min(integer('seqLen', o.seqLen ?? 2048, 2), architecture.maxPositions),
    seed: integer('seed', o.seed ?? 0, 0),
  };
}

/** Whether calibration data are needed at all. */
export function needsCalibration(recipe: Recipe): boolean {
  return recipe.method === 'gptq' || recipe.router !== null;
}

/** The recipe as JSON: equal for equal results. */
export function recipeJson(recipe: Recipe): Record<string, unknown> {
  return { ...recipe, plan: Object.fromEntries(recipe.plan) };
}
