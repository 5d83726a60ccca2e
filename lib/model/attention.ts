/** Attention as operations: the interpreter of `AttentionSpec`. */
import type { Register } from '../../types/native';
import type {
  AttentionSpec,
  GroupedAttentionSpec,
  LatentAttentionSpec,
  LinearSpec,
  RopeSpec,
} from '../architecture/types';
import { native } from '../native';
import { pushLinear, pushNorm, type WeightSource } from './linear';
import type { ProgramBuilder } from './program';

/** Linear layers that share an input: the register that holds it once the operations before `at` have run. */
export interface AttentionInput {
  linears: LinearSpec[];
  register: Register;
  at: number;
}

/** Channels that the cache keeps of a token, as keys and as values. */
export function cacheWidths(a: AttentionSpec): { keyWidth: number; valueWidth: number } {
  if (a.kind === 'latent') return { keyWidth: a.rank + a.ropeDim, valueWidth: a.rank };
  const width = a.kvHeads * a.headDim;
  return { keyWidth: width, valueWidth: width };
}

/** Records x -> context; appends to layer `layer` of the cache. */
export function pushAttention(
  b: ProgramBuilder,
  w: WeightSource,
  a: AttentionSpec,
  layer: number,
  x: Register,
  context: Register,
): AttentionInput[] {
  return a.kind === 'grouped'
    ? pushGrouped(b, w, a, layer, x, context)
    : pushLatent(b, w, a, layer, x, context);
}

function pushRope(b: ProgramBuilder, rope: RopeSpec, headDim: number, x: Register, offset = 0): void {
  const table = (f: number[]) => native().fromArray(Float32Array.from(f), 'f32', [f.length]);
  const { scale, interleaved, long } = rope;
  b.push({
    op: 'rope',
    x,
    headDim,
    offset,
    frequencies: table(rope.frequencies),
    scale,
    interleaved,
    ...(long && { longFrequencies: table(long.frequencies), longScale: long.scale, longFrom: long.from }),
  });
}

function pushGrouped(
  b: ProgramBuilder,
  w: WeightSource,
  a: GroupedAttentionSpec,
  layer: number,
  x: Register,
  context: Register,
): AttentionInput[] {
  const inputs = [{ linears: [a.q, a.k, a.v], register: x, at: b.length }];
  const { heads, kvHeads, headDim, scale, window, norms, sinks } = a;
  const q = b.register('q', a.q.out);
  const k = b.register('k', a.k.out);
  const v = b.register('v', a.v.out);
  pushLinear(b, w, a.q, x, q);
  pushLinear(b, w, a.k, x, k);
  pushLinear(b, w, a.v, x, v);
  const norm = () => {
    if (!norms) return;
    pushNorm(b, w, norms.q, q, q);
    pushNorm(b, w, norms.k, k, k);
  };
  if (!norms?.afterRope) norm();
  pushRope(b, a.rope, headDim, q);
  pushRope(b, a.rope, headDim, k);
  if (norms?.afterRope) norm();
  b.push({
    op: 'attention',
    q,
    k,
    v,
    out: context,
    layer,
    heads,
    kvHeads,
    headDim,
    scale,
    window,
    ...(sinks && { sinks: w.tensor(sinks, [heads]) }),
  });
  return inputs;
}

/**
 * Queries go to the latent space instead of keys and values out of it: q·k = (W_UKᵀ q)·c, and the values are W_UV times the attended latents
 * (DeepSeek-V2, section 2.1.2). So all heads share one key of rank + ropeDim channels, whose first `rank` are the value.
 */
function pushLatent(
  b: ProgramBuilder,
  w: WeightSource,
  a: LatentAttentionSpec,
  layer: number,
  x: Register,
  context: Register,
): AttentionInput[] {
  const { heads, nopeDim, ropeDim, valueDim, rank, scale, kvUp } = a;
  const [queryDim, keyDim] = [nopeDim + ropeDim, rank + ropeDim];
  const inputs: AttentionInput[] = [{ linears: [a.qDown ?? a.q, a.kvDown], register: x, at: b.length }];
  const q = b.register('q', heads * queryDim);
  if (a.qDown) {
    const down = b.register('q.latent', a.qDown.out);
    pushLinear(b, w, a.qDown, x, down);
    pushNorm(b, w, a.qDown.norm, down, down);
    inputs.push({ linears: [a.q], register: down, at: b.length });
    pushLinear(b, w, a.q, down, q);
  } else pushLinear(b, w, a.q, x, q);

  const k = b.register('k', keyDim);
  const v = b.register('v', rank);
  pushLinear(b, w, a.kvDown, x, k);
  b.push({ op: 'columns', x: k, out: v, heads: 1, from: 0, to: 0, count: rank });
  pushNorm(b, w, a.kvNorm, v, v);
  inputs.push({ linears: [kvUp], register: v, at: b.length });
  b.push({ op: 'columns', x: v, out: k, heads: 1, from: 0, to: 0, count: rank });
  pushRope(b, a.rope, keyDim, k, rank);
  pushRope(b, a.rope, queryDim, q, nopeDim);

  const weight = w.matrix(kvUp);
  const latentQ = b.register('q.absorbed', heads * keyDim);
  const latent = b.register('context.latent', heads * rank);
  b.push({ op: 'headLinear', x: q, out: latentQ, weight, heads, begin: 0, count: nopeDim, transposed: true });
  b.push({ op: 'columns', x: q, out: latentQ, heads, from: nopeDim, to: rank, count: ropeDim });
  b.push({
    op: 'attention',
    q: latentQ,
    k,
    v,
    out: latent,
    layer,
    heads,
    kvHeads: 1,
    headDim: keyDim,
    valueDim: rank,
    scale,
    window: 0,
  });
  b.push({
    op: 'headLinear',
    x: latent,
    out: context,
    weight,
    heads,
    begin: nopeDim,
    count: valueDim,
    transposed: false,
  });
  return inputs;
}
