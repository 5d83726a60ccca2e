/** What quantization spends its time on: Hessians, their factors, GPTQ. */
import type { Tensor } from '../../types/native';
import { accumulateHessian, factorHessian, quantizeGptq, randomMatrix, zeros } from '../kernels';
import type { Case, Group, Setting } from './case';
import { randomInput } from './experts';
import { single } from './recorded';

/** Tokens of one update of a Hessian. */
const BATCH = 2048;

/** H += XᵀX, counted as the symmetric update it is: n (n + 1) / 2 sums of as many products as tokens. */
export async function* hessianGroups({ shape, seed }: Setting): AsyncGenerator<Group> {
  const n = shape.hidden;
  const [h, x] = [zeros([n, n]), randomInput(BATCH, n, seed)];
  const one: Case = {
    parameters: { channels: n, tokens: BATCH },
    bytes: 4 * (BATCH * n + 2 * n * n),
    operations: BATCH * n * (n + 1),
    arithmetic: 'float32',
    run: repeat(() => accumulateHessian(h, x)),
  };
  yield single(one, h, x);
}

/** Cholesky factor and its inverse, n³ / 3 operations each, in f64. */
export async function* factorGroups({ shape, seed }: Setting): AsyncGenerator<Group> {
  const n = shape.hidden;
  const h = await randomHessian(n, seed);
  const one: Case = {
    parameters: { channels: n },
    bytes: 4 * 2 * n * n,
    operations: (2 * n ** 3) / 3,
    arithmetic: 'float64',
    run: repeat(async () => (await factorHessian(h)).dispose()),
  };
  yield single(one, h);
}

/**
 * GPTQ of one expert, its three matrices one after the other: each quantized channel changes all that follow, rows * cols² operations.
 */
export async function* gptqGroups(setting: Setting): AsyncGenerator<Group> {
  const { shape, bits, groupSize, seed } = setting;
  const { hidden, width } = shape;
  const [hHidden, hWidth] = [await randomHessian(hidden, seed), await randomHessian(width, seed + 1)];
  const [fHidden, fWidth] = [await factorHessian(hHidden), await factorHessian(hWidth)];
  hHidden.dispose();
  hWidth.dispose();
  const dense = (rows: number, cols: number, i: number) =>
    randomMatrix(rows, cols, { dtype: 'f32' }, seed + i);
  const work = [
    { w: await dense(width, hidden, 0), factor: fHidden },
    { w: await dense(width, hidden, 1), factor: fHidden },
    { w: await dense(hidden, width, 2), factor: fWidth },
  ];
  const weights = 3 * hidden * width;
  const cases = bits.map((b): Case => ({
    parameters: { bits: b },
    bytes: 4 * (weights + hidden ** 2 + width ** 2),
    operations: 2 * width * hidden ** 2 + hidden * width ** 2,
    arithmetic: 'float32',
    run: repeat(async () => {
      for (const { w, factor } of work)
        (await quantizeGptq(w, factor, { bits: b, groupSize })).matrix.dispose();
    }),
  }));
  const owned = [fHidden, fWidth, ...work.map(({ w }) => w)];
  yield { cases, dispose: () => owned.forEach((o) => o.dispose()) };
}

/** The Hessian of random inputs, more of them than channels. */
async function randomHessian(n: number, seed: number): Promise<Tensor> {
  const h = zeros([n, n]);
  const x = randomInput(n + 64, n, seed);
  await accumulateHessian(h, x);
  x.dispose();
  return h;
}

function repeat(once: () => Promise<void>): Case['run'] {
  return async (calls) => {
    for (let i = 0; i < calls; i++) await once();
  };
}
