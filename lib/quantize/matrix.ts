/**
 * Quantizing matrices that share an input: the statistics of that input on both streams, and GPTQ with them.
 *
 * H = sum w x̂ x̂ᵀ over the quantized stream's inputs x̂ (GPTQ; the factor 2 changes nothing), and for two-stream targets
 * D = sum w (x - x̂) x̂ᵀ with the full-precision stream's inputs x of the same tokens.
 */
import type { Control, Device, HessianFactor, Matrix, QuantMatrix, Tensor } from '../../types/native';
import type { LinearSpec } from '../architecture/types';
import type { ModuleQuantization } from '../checkpoint/quantized';
import { EacMoeError } from '../errors';
import { native } from '../native';
import type { WeightSource } from '../model/linear';
import type { Recipe } from './recipe';

/** Statistics of one input, of width n. */
export class InputStatistics {
  readonly #h: Tensor;
  readonly #d: Tensor | undefined;
  #weight = 0;

  /** `device`: where the inputs lie. */
  constructor(width: number, twoStream: boolean, device: Device) {
    this.#h = native().zeros('f32', [width, width], device);
    this.#d = twoStream ? native().zeros('f32', [width, width], device) : undefined;
  }

  /** x, xFull: f32 [n, width] of the same tokens; weights: one a token. Disposes x and xFull: views keep what they look at in memory. */
  async add(x: Tensor, xFull: Tensor | undefined, weights?: Float32Array): Promise<void> {
    await native().accumulateHessian(this.#h, x, weights);
    if (this.#d && xFull) await native().accumulateCross(this.#d, xFull, x, weights);
    this.#weight += weights ? weights.reduce((a, b) => a + b, 0) : x.shape[0]!;
    x.dispose();
    xFull?.dispose();
  }

  /** `name`: whose input this is, for errors. */
  async solver(name: string, recipe: Recipe, control: Control): Promise<Solver> {
    const factor = await native()
      .factorHessian(this.#h, recipe.damping, recipe.actOrder, control)
      .catch((cause: unknown) => {
        if (!(cause instanceof EacMoeError) || cause.code === 'ABORTED') throw cause;
        throw new EacMoeError(cause.code, `'${name}': ${cause.message}`, { cause });
      });
    this.#h.dispose();
    return new Solver(factor, this.#d, this.#weight, recipe, control);
  }
}

export interface Quantized {
  matrix: QuantMatrix;
  /** Mean squared output error an output channel and token. */
  error: number;
}

/** GPTQ for matrices that share an input. */
export class Solver {
  constructor(
    private readonly factor: HessianFactor,
    private readonly cross: Tensor | undefined,
    private readonly weight: number,
    private readonly recipe: Recipe,
    private readonly control: Control,
  ) {}

  async quantize(w: Tensor, q: ModuleQuantization): Promise<Quantized> {
    const { bits, groupSize, symmetric } = q;
    const options = { bits, groupSize, symmetric, clipSearch: this.recipe.clipSearch };
    const target = this.cross ? await native().twoStreamTarget(w, this.factor, this.cross, 1) : w;
    const { matrix, error } = await native().quantizeGptq(target, this.factor, options, this.control);
    if (this.cross) target.dispose();
    return { matrix, error: this.weight > 0 ? error / this.weight : 0 };
  }

  dispose(): void {
    this.factor.dispose();
    this.cross?.dispose();
  }
}

/** The unquantized weights of a linear layer of the source. */
export function sourceTensor(weights: WeightSource, spec: LinearSpec): Tensor {
  const w: Matrix = weights.matrix(spec);
  if (!('dtype' in w)) {
    throw new EacMoeError(
      'UNSUPPORTED_MODEL',
      `'${spec.weight}' is already quantized; quantize the original, unquantized model`,
    );
  }
  return w;
}

/** Round to nearest. */
export async function roundToNearest(
  w: Tensor,
  q: ModuleQuantization,
  recipe: Recipe,
  control: Control,
): Promise<QuantMatrix> {
  const { bits, groupSize, symmetric } = q;
  const options = { bits, groupSize, symmetric, clipSearch: recipe.clipSearch };
  return native().quantizeRtn(w, options, undefined, control);
}
