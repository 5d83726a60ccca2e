/** The rest of a layer: attention, norms, rotary embedding, activations, routing, sampling. */
import type { Op, QuantMatrix } from '../../types/native';
import { createKvCache, randomMatrix, tensor, zeros } from '../kernels';
import type { Case, Group, Setting } from './case';
import { randomInput } from './experts';
import { programRun, Recorder, single } from './recorded';

type Attention = Extract<Op, { op: 'attention' }>;

/** Positions that a decoded token looks back on. */
const CONTEXT = 2048;
const VOCABULARY = 151936;

/** Heads of 128 channels, of 32 where those do not divide the hidden size; as many for keys and values. */
function heads(hidden: number): Pick<Attention, 'heads' | 'kvHeads' | 'headDim' | 'scale'> {
  const headDim = hidden % 128 === 0 ? 128 : 32;
  return { heads: hidden / headDim, kvHeads: hidden / headDim, headDim, scale: headDim ** -0.5 };
}

/** Copies of an operation in one program: one crossing from JavaScript runs them all. */
const COPIES = 64;

/** A group of one case: what `record` adds to a program is one call on a batch of n tokens. */
function batchGroup(
  n: number,
  parameters: Case['parameters'],
  work: { bytes: number; operations: number },
  record: (r: Recorder) => Op[],
): Group {
  const r = new Recorder();
  const ops = record(r);
  for (let i = 0; i < COPIES; i++) ops.forEach((op) => r.builder.push(op));
  const { frame, program, dispose } = r.start([{ length: n }]);
  const run = programRun(frame, program, ops.length);
  return single({ parameters, ...work, arithmetic: 'float32', run }, { dispose });
}

/** Causal attention of a batch over itself: scores and their sums, 4 * hidden operations for each pair of positions. */
export async function* prefillGroups({ shape, tokens, seed }: Setting): AsyncGenerator<Group> {
  const { hidden } = shape;
  for (const n of tokens) {
    const work = { bytes: 4 * 4 * n * hidden, operations: (4 * hidden * n * (n + 1)) / 2 };
    yield batchGroup(n, { tokens: n, heads: heads(hidden).heads }, work, (r) => {
      const [q, k, v] = ['q', 'k', 'v'].map((name, i) => r.bound(name, randomInput(n, hidden, seed + i)));
      const out = r.bound('out', zeros([n, hidden]));
      return [{ op: 'attention', q: q!, k: k!, v: v!, out, layer: 0, window: 0, ...heads(hidden) }];
    });
  }
}

/** One token over a cache of keys and values in f32; layers take turns. */
export async function* decodeGroups({ shape, seed, cycle }: Setting): AsyncGenerator<Group> {
  const { hidden } = shape;
  const layerBytes = 2 * 4 * CONTEXT * hidden;
  const layers = Math.max(1, Math.min(64, Math.ceil(cycle / layerBytes)));
  const cache = createKvCache(
    Array.from({ length: layers }, () => ({ keyWidth: hidden, valueWidth: hidden })),
  );
  const recorded = (rows: number, window: number) => {
    const r = new Recorder();
    const [q, k, v] = ['q', 'k', 'v'].map((name, i) => r.bound(name, randomInput(rows, hidden, seed + i)));
    const out = r.bound('out', zeros([rows, hidden]));
    for (let layer = 0; layer < layers; layer++) {
      r.builder.push({ op: 'attention', q: q!, k: k!, v: v!, out, layer, window, ...heads(hidden) });
    }
    return r.start([{ length: rows, cache }]);
  };
  const fill = recorded(CONTEXT - 1, 1); // a window of one: only to write keys and values
  await fill.frame.run(0, layers);
  fill.frame.commit();
  fill.dispose();
  const { frame, program, dispose } = recorded(1, 0);
  const one: Case = {
    parameters: { tokens: 1, context: CONTEXT, heads: heads(hidden).heads },
    bytes: layerBytes,
    operations: 4 * hidden * CONTEXT,
    arithmetic: 'float32',
    run: programRun(frame, program),
  };
  yield single(one, { dispose }, cache);
}

/** Norms: the sum of squares and two multiplications an element; for the layer norm the mean and its subtraction, and the bias. */
export async function* normGroups({ shape, tokens, seed }: Setting): AsyncGenerator<Group> {
  const { hidden } = shape;
  for (const kind of ['rms', 'layer'] as const) {
    for (const n of tokens) {
      const work = { bytes: 4 * 2 * n * hidden, operations: (kind === 'rms' ? 4 : 8) * n * hidden };
      yield batchGroup(n, { norm: kind, tokens: n }, work, (r) => {
        const x = r.bound('x', randomInput(n, hidden, seed));
        const out = r.bound('out', zeros([n, hidden]));
        const weight = tensor(new Float32Array(hidden).fill(1), [hidden]);
        if (kind === 'rms') return [{ op: 'rmsNorm', x, out, weight, eps: 1e-6 }];
        return [{ op: 'layerNorm', x, out, weight, bias: zeros([hidden]), eps: 1e-6 }];
      });
    }
  }
}

/** Rotary embedding of queries or keys, in place: four multiplications and two additions a pair of channels. */
export async function* ropeGroups({ shape, tokens, seed }: Setting): AsyncGenerator<Group> {
  const { hidden } = shape;
  const { headDim } = heads(hidden);
  for (const interleaved of [false, true]) {
    for (const n of tokens) {
      const work = { bytes: 4 * 2 * n * hidden, operations: 3 * n * hidden };
      yield batchGroup(n, { pairs: interleaved ? 'interleaved' : 'halves', tokens: n }, work, (r) => {
        const x = r.bound('x', randomInput(n, hidden, seed));
        const inverse = Float32Array.from({ length: headDim / 2 }, (_, i) => 10000 ** ((-2 * i) / headDim));
        const frequencies = tensor(inverse, [headDim / 2]);
        return [{ op: 'rope', x, headDim, frequencies, scale: 1, interleaved }];
      });
    }
  }
}

/**
 * activation(gate) * up, the width of all experts of a token. It works in place, so each call begins with a copy of the gate: its bytes
 * count. Operations: about ten an element for the exponential, and ten more for erf.
 */
export async function* activationGroups({ shape, tokens, seed }: Setting): AsyncGenerator<Group> {
  const width = shape.width * shape.topK;
  for (const activation of ['silu', 'gelu', 'gelu-tanh', 'relu'] as const) {
    const each = { silu: 14, gelu: 35, 'gelu-tanh': 18, relu: 2 }[activation];
    for (const n of tokens) {
      const work = { bytes: 4 * 5 * n * width, operations: each * n * width };
      yield batchGroup(n, { activation, tokens: n }, work, (r) => {
        const [x, up] = ['x', 'up'].map((name, i) => r.bound(name, randomInput(n, width, seed + i)));
        const gate = r.bound('gate', zeros([n, width]));
        return [
          { op: 'copy', x: x!, out: gate },
          { op: 'glu', gate, up: up!, activation },
        ];
      });
    }
  }
}

/** The router: logits from f32 weights, softmax, top-k. Operations: those of the product. */
export async function* routerGroups({ shape, tokens, seed }: Setting): AsyncGenerator<Group> {
  const { hidden, experts, topK } = shape;
  const weight = await randomMatrix(experts, hidden, { dtype: 'f32' }, seed);
  const router = { scoring: 'softmax', topK, renormalize: true, scale: 1, jitter: 0 } as const;
  try {
    for (const n of tokens) {
      const work = { bytes: 4 * (experts + n) * hidden, operations: 2 * n * experts * hidden };
      yield batchGroup(n, { tokens: n }, work, (r) => {
        const x = r.bound('x', randomInput(n, hidden, seed));
        const logits = r.builder.register('logits', experts);
        const weights = r.builder.register('weights', topK);
        const indices = r.builder.register('indices', topK, 'i32');
        const counts = r.builder.register('counts', experts, 'i32', 'sequences');
        return [
          { op: 'linear', x, out: logits, weight },
          { op: 'route', logits, weights, indices, counts, router },
        ];
      });
    }
  } finally {
    weight.dispose();
  }
}

/** From logits to the next token. Operations: about two an element for the largest, or the softmax. */
export async function* sampleGroups({ seed }: Setting): AsyncGenerator<Group> {
  const ways = [
    { name: 'greedy', temperature: 0, topK: 0, topP: 1 },
    { name: 'top-p 0.95', temperature: 1, topK: 0, topP: 0.95 },
    { name: 'top-k 50', temperature: 1, topK: 50, topP: 1 },
  ];
  const cases: Case[] = [];
  const owned: { dispose(): void }[] = [];
  for (const { name, ...sampling } of ways) {
    const r = new Recorder();
    const logits = r.builder.register('logits', VOCABULARY, 'f32', 'sequences');
    const out = r.builder.register('id', 1, 'i32', 'sequences');
    r.builder.push({ op: 'sample', logits, out });
    const { frame, program, dispose } = r.start([{ length: 1 }]);
    const values = randomInput(1, VOCABULARY, seed);
    frame.bind(logits, values);
    frame.setSampling({ ...sampling, uniform: Float64Array.of(0.5) });
    owned.push({ dispose }, values);
    cases.push({
      parameters: { sampling: name, vocabulary: VOCABULARY },
      bytes: 4 * VOCABULARY,
      operations: 2 * VOCABULARY,
      arithmetic: 'float32',
      run: programRun(frame, program),
    });
  }
  yield { cases, dispose: () => owned.forEach((o) => o.dispose()) };
}

/** Quantized weights back to f32; bytes are read and written. */
export async function* dequantizeGroups({ shape, bits, groupSize, seed }: Setting): AsyncGenerator<Group> {
  const { hidden, width } = shape;
  const matrices: QuantMatrix[] = [];
  for (const b of bits) matrices.push(await randomMatrix(width, hidden, { bits: b, groupSize }, seed));
  const cases = matrices.map((matrix, i): Case => ({
    parameters: { bits: bits[i]! },
    bytes: matrix.byteLength + 4 * width * hidden,
    operations: 2 * width * hidden,
    arithmetic: 'float32',
    run: async (calls) => {
      for (let c = 0; c < calls; c++) (await matrix.dequantize()).dispose();
    },
  }));
  yield { cases, dispose: () => matrices.forEach((matrix) => matrix.dispose()) };
}
