/**
 * One decoder layer as a list of operations: the interpreter of `LayerSpec`. The list is cut into stages so that a method can look
 * between them (calibration) or decide between them (pruning).
 */
import type { Matrix, Register, RegisterSpec, RouterSpec, Tensor } from '../../types/native';
import type { GluSpec, LayerSpec, LinearSpec, MoeSpec, NormSpec, RopeSpec } from '../architecture/types';
import { native } from '../native';
import type { ProgramBuilder, Range } from './program';

type Rows = RegisterSpec['rows'];

/** Where a layer's weights come from. */
export interface WeightSource {
  matrix(spec: LinearSpec): Matrix;
  tensor(name: string, shape: number[]): Tensor;
}

/** What the stages read and leave behind. All f32 [tokens, width] unless said otherwise. */
export interface LayerRegisters {
  /** Residual stream, [tokens, hidden]. */
  h: Register;
  /** Normed input of the attention, then of the feed-forward. */
  x: Register;
  /** Input of the output projection, [tokens, heads * headDim]. */
  context: Register;
  moe?: MoeRegisters;
}
export interface MoeRegisters {
  logits: Register;
  weights: Register;
  /** i32 [tokens, topK] */
  indices: Register;
  /** i32 [sequences, experts] */
  counts: Register;
}

export interface LayerStages extends OutputStages {
  /** h -> x */
  attentionNorm: Range;
  /** x -> context; appends to the cache */
  attention: Range;
}

/** What follows the attention. */
export interface OutputStages {
  /** h += o_proj(context) */
  attentionOutput: Range;
  /** h -> x */
  feedForwardNorm: Range;
  /** x -> logits, weights, indices, counts; empty in a dense layer */
  route: Range;
  /** h += feed-forward(x) */
  feedForward: Range;
  registers: LayerRegisters;
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
  const bias = spec.bias ? w.tensor(spec.bias, [spec.out]) : undefined;
  b.push({ op: 'linear', x, out, weight: w.matrix(spec), bias, add });
}

function pushRope(b: ProgramBuilder, rope: RopeSpec, headDim: number, x: Register): void {
  const table = (f: number[]) => native().fromArray(Float32Array.from(f), 'f32', [f.length]);
  const { scale, interleaved, long } = rope;
  b.push({
    op: 'rope',
    x,
    headDim,
    frequencies: table(rope.frequencies),
    scale,
    interleaved,
    ...(long && { longFrequencies: table(long.frequencies), longScale: long.scale, longFrom: long.from }),
  });
}

/** out += down(activation(gate x) * up x) */
function pushGlu(
  b: ProgramBuilder,
  w: WeightSource,
  spec: GluSpec,
  activation: MoeSpec['activation'],
  x: Register,
  out: Register,
  rows: Rows,
): void {
  const gate = b.register('glu.gate', spec.gate.out, 'f32', rows);
  const up = b.register('glu.up', spec.up.out, 'f32', rows);
  pushLinear(b, w, spec.gate, x, gate);
  pushLinear(b, w, spec.up, x, up);
  b.push({ op: 'glu', gate, up, activation });
  pushLinear(b, w, spec.down, gate, out, true);
}

function routerSpec(spec: RouterSpec): RouterSpec {
  const { scoring, topK, renormalize, scale, jitter } = spec;
  return { scoring, topK, renormalize, scale, jitter };
}

function moeRegisters(b: ProgramBuilder, moe: MoeSpec, rows: Rows): MoeRegisters {
  return {
    logits: b.register('router.logits', moe.router.out, 'f32', rows),
    weights: b.register('router.weights', moe.router.topK, 'f32', rows),
    indices: b.register('router.indices', moe.router.topK, 'i32', rows),
    counts: b.register('router.counts', moe.router.out, 'i32', 'sequences'),
  };
}

function pushExperts(
  b: ProgramBuilder,
  w: WeightSource,
  moe: MoeSpec,
  r: LayerRegisters & { moe: MoeRegisters },
): void {
  const { logits, weights, indices } = r.moe;
  const { shared } = moe;
  b.push({ op: 'reselect', logits, weights, indices, router: routerSpec(moe.router) });
  b.push({
    op: 'experts',
    x: r.x,
    weights,
    indices,
    out: r.h,
    gate: moe.experts.map((e) => w.matrix(e.gate)),
    up: moe.experts.map((e) => w.matrix(e.up)),
    down: moe.experts.map((e) => w.matrix(e.down)),
    activation: moe.activation,
    ...(shared && {
      shared: {
        gate: w.matrix(shared.gate),
        up: w.matrix(shared.up),
        down: w.matrix(shared.down),
        ...(shared.outputGate && { outputGate: w.matrix(shared.outputGate) }),
      },
    }),
    add: true,
  });
}

function layerRegisters(b: ProgramBuilder, spec: LayerSpec, rows: Rows): LayerRegisters {
  const { attention: a, feedForward: f } = spec;
  const hidden = spec.attentionNorm.size;
  return {
    h: b.register('h', hidden, 'f32', rows),
    x: b.register('x', hidden, 'f32', rows),
    context: b.register('context', a.o.in, 'f32', rows),
    ...(f.kind === 'moe' && { moe: moeRegisters(b, f, rows) }),
  };
}

/** Records layer `index` (its place in the key-value cache) and returns its stages. */
export function pushLayer(b: ProgramBuilder, w: WeightSource, spec: LayerSpec, index: number): LayerStages {
  const { attention: a } = spec;
  const registers = layerRegisters(b, spec, 'tokens');
  const { h, x, context } = registers;
  const q = b.register('q', a.q.out);
  const k = b.register('k', a.k.out);
  const v = b.register('v', a.v.out);

  const attentionNorm = b.stage(() => pushNorm(b, w, spec.attentionNorm, h, x));
  const attention = b.stage(() => {
    pushLinear(b, w, a.q, x, q);
    pushLinear(b, w, a.k, x, k);
    pushLinear(b, w, a.v, x, v);
    pushRope(b, a.rope, a.headDim, q);
    pushRope(b, a.rope, a.headDim, k);
    const { heads, kvHeads, headDim, scale, window } = a;
    b.push({ op: 'attention', q, k, v, out: context, layer: index, heads, kvHeads, headDim, scale, window });
  });
  return { attentionNorm, attention, ...pushOutput(b, w, spec, registers, 'tokens') };
}

/**
 * Records what follows the attention of the last layer once more, for the last token of each sequence only: prefill needs no other.
 * Returns the residual stream, [sequences, hidden].
 */
export function pushLastTokens(b: ProgramBuilder, w: WeightSource, spec: LayerSpec): Register {
  const all = layerRegisters(b, spec, 'tokens');
  const last = layerRegisters(b, spec, 'sequences');
  b.push({ op: 'lastRows', x: all.h, out: last.h });
  b.push({ op: 'lastRows', x: all.context, out: last.context });
  pushOutput(b, w, spec, last, 'sequences');
  return last.h;
}

function pushOutput(
  b: ProgramBuilder,
  w: WeightSource,
  spec: LayerSpec,
  registers: LayerRegisters,
  rows: Rows,
): OutputStages {
  const { attention: a, feedForward: f } = spec;
  const { h, x, context, moe } = registers;
  const attentionOutput = b.stage(() => pushLinear(b, w, a.o, context, h, true));
  const feedForwardNorm = b.stage(() => pushNorm(b, w, spec.feedForwardNorm, h, x));
  const route = b.stage(() => {
    if (f.kind !== 'moe') return;
    pushLinear(b, w, f.router, x, moe!.logits);
    b.push({ op: 'route', ...moe!, router: routerSpec(f.router) });
  });
  const feedForward = b.stage(() => {
    if (f.kind === 'moe') pushExperts(b, w, f, { ...registers, moe: moe! });
    else pushGlu(b, w, f, f.activation, x, h, rows);
  });
  return { attentionOutput, feedForwardNorm, route, feedForward, registers };
}
