/** The operations that have weights of their own: linear layers and norms. */
import type { Matrix, Register, Tensor } from '../../types/native';
import { biasOf } from '../architecture/storage';
import type { LinearSpec, NormSpec } from '../architecture/types';
import { native } from '../native';
import type { ProgramBuilder } from './program';

/** Where a layer's weights come from. */
export interface WeightSource {
  matrix(spec: LinearSpec): Matrix;
  /** Of a layer that has one. */
  bias(spec: LinearSpec): Tensor;
  tensor(name: string, shape: number[]): Tensor;
}

export function pushNorm(
  b: ProgramBuilder,
  w: WeightSource,
  norm: NormSpec,
  x: Register,
  out: Register,
): void {
  const weight = w.tensor(norm.weight, [norm.size]);
  if (norm.kind === 'rms') b.push({ op: 'rmsNorm', x, out, weight, eps: norm.eps });
  else {
    const bias = norm.bias ? w.tensor(norm.bias, [norm.size]) : native().zeros('f32', [norm.size]);
    b.push({ op: 'layerNorm', x, out, weight, bias, eps: norm.eps });
  }
}

export function pushLinear(
  b: ProgramBuilder,
  w: WeightSource,
  spec: LinearSpec,
  x: Register,
  out: Register,
  add = false,
): void {
  const bias = biasOf(spec) ? w.bias(spec) : undefined;
  b.push({ op: 'linear', x, out, weight: w.matrix(spec), bias, add });
}
