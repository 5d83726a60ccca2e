/** Products with one matrix, quantized or dense. Many matrices of that shape take turns, so that weights come from memory. */
import type { Activations, Matrix } from '../../types/native';
import { randomMatrix, zeros } from '../kernels';
import type { Case, Group, Setting } from './case';
import { randomInput } from './experts';
import { programRun, Recorder, single } from './recorded';

/** Most matrices that take turns; small ones may then fit into a cache. */
const MAX_MATRICES = 1024;

/** One projection of an expert, quantized: [width, hidden]. */
export async function* linearGroups(setting: Setting): AsyncGenerator<Group> {
  const { shape, tokens, bits, groupSize, activations, seed, cycle } = setting;
  const sets: Matrix[][] = [];
  try {
    for (const b of bits) {
      const kind = { bits: b, groupSize };
      sets.push(await several(cycle, (i) => randomMatrix(shape.width, shape.hidden, kind, seed + i)));
    }
    for (const n of tokens) {
      const cases = sets.map((set, i) =>
        linearCase(set, n, { tokens: n, bits: bits[i]! }, activations, seed),
      );
      yield { cases, dispose: () => cases.forEach((c) => c.dispose()) };
    }
  } finally {
    sets.flat().forEach((matrix) => matrix.dispose());
  }
}

/** A dense projection of attention, [hidden, hidden], for each type of weights. */
export async function* denseGroups({ shape, tokens, seed, cycle }: Setting): AsyncGenerator<Group> {
  for (const dtype of ['f32', 'bf16'] as const) {
    const set = await several(cycle, (i) => randomMatrix(shape.hidden, shape.hidden, { dtype }, seed + i));
    try {
      for (const n of tokens) {
        const one = linearCase(set, n, { tokens: n, weights: dtype }, 'float32', seed);
        yield single(one, one);
      }
    } finally {
      set.forEach((matrix) => matrix.dispose());
    }
  }
}

/** Rows of the output head: the vocabulary of Qwen. */
const VOCABULARY = 151936;

export async function* headGroups({ shape, seed }: Setting): AsyncGenerator<Group> {
  const weights = await randomMatrix(VOCABULARY, shape.hidden, { dtype: 'bf16' }, seed);
  const parameters = { tokens: 1, weights: 'bf16', vocabulary: VOCABULARY };
  const one = linearCase([weights], 1, parameters, 'float32', seed);
  yield single(one, one, weights);
}

/** A dense product of three square operands, f32. */
export async function* gemmGroups({ shape, seed }: Setting): AsyncGenerator<Group> {
  const n = shape.hidden;
  const weights = await randomMatrix(n, n, { dtype: 'f32' }, seed);
  const one = linearCase([weights], n, { m: n, n, k: n }, 'float32', seed);
  yield single(one, one, weights);
}

/** Matrices until `bytes` are reached. */
async function several<M extends Matrix>(bytes: number, make: (i: number) => Promise<M>): Promise<M[]> {
  const set: M[] = [];
  for (let held = 0; held < bytes && set.length < MAX_MATRICES; held += set.at(-1)!.byteLength) {
    set.push(await make(set.length));
  }
  return set;
}

function linearCase(
  set: readonly Matrix[],
  tokens: number,
  parameters: Case['parameters'],
  activations: Activations,
  seed: number,
): Case & { dispose(): void } {
  const [first] = set;
  const [rows, cols] = 'bits' in first! ? [first.rows, first.cols] : (first!.shape as [number, number]);
  const r = new Recorder();
  const x = r.bound('x', randomInput(tokens, cols, seed));
  const out = r.bound('y', zeros([tokens, rows]));
  for (const weight of set) r.builder.push({ op: 'linear', x, out, weight });
  const { frame, program, dispose } = r.start([{ length: tokens }], activations);
  return {
    parameters,
    bytes: first!.byteLength + 4 * tokens * (rows + cols),
    operations: 2 * tokens * rows * cols,
    arithmetic: activations,
    run: programRun(frame, program),
    dispose,
  };
}
