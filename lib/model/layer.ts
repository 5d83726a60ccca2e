/**
 * One decoder layer as a list of operations: the interpreter of `LayerSpec`. The list is cut into stages so that a method can look
 * between them (calibration) or decide between them (pruning).
 */
import type { Register, RegisterSpec, RouterSpec } from '../../types/native';
import { biasOf } from '../architecture/storage';
import type { GluSpec, LayerSpec, MoeSpec, RouterOptions } from '../architecture/types';
import { pushAttention, type AttentionInput } from './attention';
import { pushLinear, pushNorm, type WeightSource } from './linear';
import type { ProgramBuilder, Range } from './program';

type Rows = RegisterSpec['rows'];

/** What the stages read and leave behind. All f32 [tokens, width] unless said otherwise. */
export interface LayerRegisters {
  /** Residual stream, [tokens, hidden]. */
  h: Register;
  /** Normed input of the attention, then of the feed-forward. */
  x: Register;
  /** Input of the output projection. */
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
  /** The inputs of the attention's linear layers, in the order in which they come to be. */
  attentionInputs: AttentionInput[];
}

/** What follows the attention. */
export interface OutputStages {
  /** h += output projection of context */
  attentionOutput: Range;
  /** h -> x */
  feedForwardNorm: Range;
  /** x -> logits, weights, indices, counts; empty in a dense layer */
  route: Range;
  /** h += feed-forward(x) */
  feedForward: Range;
  registers: LayerRegisters;
}

/** Where a branch of the residual stream writes, and whether it adds. */
interface Branch {
  out: Register;
  add: boolean;
}

/** Records a branch whose result, times the layer's scale, is added to h. */
function pushBranch(
  b: ProgramBuilder,
  spec: LayerSpec,
  h: Register,
  rows: Rows,
  record: (branch: Branch) => void,
): void {
  const { residualScale: scale = 1 } = spec;
  if (scale === 1) return record({ out: h, add: true });
  const x = b.register('branch', spec.attentionNorm.size, 'f32', rows);
  record({ out: x, add: false });
  b.push({ op: 'addScaled', x, out: h, scale });
}

/** down(activation(gate x) * up x) */
function pushGlu(
  b: ProgramBuilder,
  w: WeightSource,
  spec: GluSpec,
  activation: MoeSpec['activation'],
  x: Register,
  { out, add }: Branch,
  rows: Rows,
): void {
  const gate = b.register('glu.gate', spec.gate.out, 'f32', rows);
  const up = b.register('glu.up', spec.up.out, 'f32', rows);
  pushLinear(b, w, spec.gate, x, gate);
  pushLinear(b, w, spec.up, x, up);
  b.push({ op: 'glu', gate, up, activation });
  pushLinear(b, w, spec.down, gate, out, add);
}

function routerSpec(w: WeightSource, spec: RouterOptions): RouterSpec {
  const { scoring, topK, renormalize, scale, jitter, groups, correction: c } = spec;
  const router: RouterSpec = { scoring, topK, renormalize, scale, jitter };
  if (groups) router.groups = groups;
  if (c) router.correction = w.tensor(c.tensor, c.shape);
  return router;
}

/** `layer`: layers share all registers but the counts, which are read after several. */
function moeRegisters(b: ProgramBuilder, moe: MoeSpec, layer: number, rows: Rows): MoeRegisters {
  return {
    logits: b.register('router.logits', moe.router.out, 'f32', rows),
    weights: b.register('router.weights', moe.router.topK, 'f32', rows),
    indices: b.register('router.indices', moe.router.topK, 'i32', rows),
    counts: b.register(`router.counts.${layer}`, moe.router.out, 'i32', 'sequences'),
  };
}

function pushExperts(
  b: ProgramBuilder,
  w: WeightSource,
  moe: MoeSpec,
  r: LayerRegisters & { moe: MoeRegisters },
  branch: Branch,
): void {
  const { logits, weights, indices, counts } = r.moe;
  const { shared } = moe;
  b.push({ op: 'reselect', logits, weights, indices, counts, router: routerSpec(w, moe.router) });
  const biases = (key: 'gate' | 'up' | 'down') => moe.experts.map((e) => w.bias(e[key]));
  b.push({
    op: 'experts',
    x: r.x,
    weights,
    indices,
    out: branch.out,
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
    ...(biasOf(moe.experts[0]!.gate) && {
      biases: { gate: biases('gate'), up: biases('up'), down: biases('down') },
    }),
    add: branch.add,
  });
}

function layerRegisters(b: ProgramBuilder, spec: LayerSpec, index: number, rows: Rows): LayerRegisters {
  const { attention: a, feedForward: f } = spec;
  const hidden = spec.attentionNorm.size;
  return {
    h: b.register('h', hidden, 'f32', rows),
    x: b.register('x', hidden, 'f32', rows),
    context: b.register('context', a.o.in, 'f32', rows),
    ...(f.kind === 'moe' && { moe: moeRegisters(b, f, index, rows) }),
  };
}

/** Records layer `index` (its place in the key-value cache) and returns its stages. */
export function pushLayer(b: ProgramBuilder, w: WeightSource, spec: LayerSpec, index: number): LayerStages {
  const registers = layerRegisters(b, spec, index, 'tokens');
  const { h, x, context } = registers;

  const attentionNorm = b.stage(() => pushNorm(b, w, spec.attentionNorm, h, x));
  let attentionInputs: AttentionInput[] = [];
  const attention = b.stage(() => {
    attentionInputs = pushAttention(b, w, spec.attention, index, x, context);
  });
  return { attentionNorm, attention, attentionInputs, ...pushOutput(b, w, spec, registers, 'tokens') };
}

/**
 * Records what follows the attention of the last layer once more, for the last token of each sequence only: prefill needs no other.
 * Returns the residual stream, [sequences, hidden].
 */
export function pushLastTokens(b: ProgramBuilder, w: WeightSource, spec: LayerSpec, index: number): Register {
  const all = layerRegisters(b, spec, index, 'tokens');
  const last = layerRegisters(b, spec, index, 'sequences');
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
  const attentionOutput = b.stage(() =>
    pushBranch(b, spec, h, rows, ({ out, add }) => pushLinear(b, w, a.o, context, out, add)),
  );
  const feedForwardNorm = b.stage(() => pushNorm(b, w, spec.feedForwardNorm, h, x));
  const route = b.stage(() => {
    if (f.kind !== 'moe') return;
    pushLinear(b, w, f.router, x, moe!.logits);
    b.push({ op: 'route', ...moe!, router: routerSpec(w, f.router) });
  });
  const feedForward = b.stage(() =>
    pushBranch(b, spec, h, rows, (branch) => {
      if (f.kind === 'moe') pushExperts(b, w, f, { ...registers, moe: moe! }, branch);
      else pushGlu(b, w, f, f.activation, x, branch, rows);
    }),
  );
  return { attentionOutput, feedForwardNorm, route, feedForward, registers };
}
