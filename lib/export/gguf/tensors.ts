/** The tensors of a GGUF file: llama.cpp's names for the parts of an architecture, and where each comes from. */
import type {
  Architecture,
  AttentionSpec,
  GluSpec,
  GroupedAttentionSpec,
  LatentAttentionSpec,
  LayerSpec,
  LinearSpec,
  NormSpec,
} from '../../architecture';
import { biasOf } from '../../architecture/storage';
import type { GgufFamily } from './families';

/** One tensor of the file. */
export interface TensorPlan {
  name: string;
  /** Innermost first. */
  shape: number[];
  /** Weights [out, in], one after the other (experts), that keep their type or get one; or what is written as f32. */
  from: { matrices: LinearSpec[] } | { biases: LinearSpec[] } | { values: string } | { numbers: number[] };
  /** Row r of the file is row rows[r] of the source. */
  rows?: number[];
}

class Plans {
  readonly list: TensorPlan[] = [];

  values(name: string, source: string | undefined, size: number, rows?: number[]): void {
    if (source) this.list.push({ name, shape: [size], from: { values: source }, ...(rows && { rows }) });
  }

  norm(name: string, { weight, bias, size }: NormSpec): void {
    this.values(`${name}.weight`, weight, size);
    this.values(`${name}.bias`, bias, size);
  }

  linear(name: string, spec: LinearSpec, rows?: number[]): void {
    this.matrices(name, [spec], [spec.in, spec.out], rows);
  }

  matrices(name: string, specs: LinearSpec[], shape: number[], rows?: number[]): void {
    this.list.push({ name: `${name}.weight`, shape, from: { matrices: specs }, ...(rows && { rows }) });
    if (!biasOf(specs[0]!)) return;
    const biasShape = shape.slice(1);
    this.list.push({
      name: `${name}.bias`,
      shape: biasShape,
      from: { biases: specs },
      ...(rows && { rows }),
    });
  }

  glu(prefix: string, suffix: string, glu: GluSpec): void {
    for (const part of ['gate', 'up', 'down'] as const)
      this.linear(`${prefix}.ffn_${part}${suffix}`, glu[part]);
  }

  experts(prefix: string, experts: GluSpec[]): void {
    for (const part of ['gate', 'up', 'down'] as const) {
      const { out, in: inputs } = experts[0]![part];
      const specs = experts.map((expert) => expert[part]);
      this.matrices(`${prefix}.ffn_${part}_exps`, specs, [inputs, out, experts.length]);
    }
  }
}

/** Rows of q or k in the order of neighbouring rotary pairs: (0, d / 2, 1, d / 2 + 1, ...) of each head, then what does not turn. */
export function neighbourRows(out: number, headDim: number, rotaryDim: number): number[] {
  const half = rotaryDim / 2;
  return Array.from({ length: out }, (_, r) => {
    const channel = r % headDim;
    return channel < rotaryDim ? r - channel + (channel % 2) * half + (channel >> 1) : r;
  });
}

function attention(plans: Plans, prefix: string, a: GroupedAttentionSpec, family: GgufFamily): void {
  const { headDim, rope } = a;
  const turn = (out: number) =>
    family.neighbours && !rope.interleaved ? neighbourRows(out, headDim, rope.dim) : undefined;
  plans.linear(`${prefix}.attn_q`, a.q, turn(a.q.out));
  plans.linear(`${prefix}.attn_k`, a.k, turn(a.k.out));
  plans.linear(`${prefix}.attn_v`, a.v);
  plans.linear(`${prefix}.attn_output`, a.o);
  plans.values(`${prefix}.attn_sinks.weight`, a.sinks, a.heads);
  if (a.norms) {
    plans.norm(`${prefix}.attn_q_norm`, a.norms.q);
    plans.norm(`${prefix}.attn_k_norm`, a.norms.k);
  }
}

function latentAttention(plans: Plans, prefix: string, a: LatentAttentionSpec): void {
  if (a.qDown) {
    plans.linear(`${prefix}.attn_q_a`, a.qDown);
    plans.norm(`${prefix}.attn_q_a_norm`, a.qDown.norm);
  }
  plans.linear(`${prefix}.attn_q${a.qDown ? '_b' : ''}`, a.q);
  plans.linear(`${prefix}.attn_kv_a_mqa`, a.kvDown);
  plans.norm(`${prefix}.attn_kv_a_norm`, a.kvNorm);
  plans.linear(`${prefix}.attn_kv_b`, a.kvUp);
  plans.linear(`${prefix}.attn_output`, a.o);
}

function layer(plans: Plans, index: number, spec: LayerSpec, family: GgufFamily): void {
  const prefix = `blk.${index}`;
  plans.norm(`${prefix}.attn_norm`, spec.attentionNorm);
  if (spec.attention.kind === 'grouped') attention(plans, prefix, spec.attention, family);
  else latentAttention(plans, prefix, spec.attention);
  plans.norm(`${prefix}.${family.ffnNorm ?? 'ffn_norm'}`, spec.feedForwardNorm);
  const { feedForward } = spec;
  if (feedForward.kind === 'dense') return plans.glu(prefix, '', feedForward);
  const { router, experts, shared } = feedForward;
  // Routers and gates decide much and weigh little: f32.
  plans.list.push({
    name: `${prefix}.ffn_gate_inp.weight`,
    shape: [router.in, router.out],
    from: { values: router.weight },
  });
  if (biasOf(router))
    plans.list.push({ name: `${prefix}.ffn_gate_inp.bias`, shape: [router.out], from: { biases: [router] } });
  plans.values(`${prefix}.exp_probs_b.bias`, router.correction?.tensor, experts.length);
  plans.experts(prefix, experts);
  if (!shared) return;
  plans.values(`${prefix}.ffn_gate_inp_shexp.weight`, shared.outputGate?.weight, router.in);
  plans.glu(prefix, '_shexp', shared);
}

/** In the order of the file. `theta`: base of the rotary frequencies. */
export function tensorPlans(
  architecture: Architecture,
  family: GgufFamily,
  theta: number | undefined,
): TensorPlan[] {
  const { embedding, head, layers, norm, hiddenSize, vocabSize } = architecture;
  const plans = new Plans();
  const embed = { weight: embedding.weight, out: vocabSize, in: hiddenSize };
  plans.linear('token_embd', embed);
  plans.norm('output_norm', norm);
  if (head.weight !== embedding.weight || !family.tiedHead) plans.linear('output', head);
  longFactors(plans, layers[0]!.attention, theta);
  for (const [i, spec] of layers.entries()) layer(plans, i, spec, family);
  return plans.list;
}

/** longrope: what the base's frequencies are divided by, up to the original length and beyond. */
function longFactors(plans: Plans, { rope }: AttentionSpec, theta: number | undefined): void {
  if (!rope.long || theta === undefined) return;
  for (const [kind, frequencies] of [
    ['long', rope.long.frequencies],
    ['short', rope.frequencies],
  ] as const) {
    const numbers = frequencies.map((f, i) => theta ** ((-2 * i) / rope.dim) / f);
    plans.list.push({ name: `rope_factors_${kind}.weight`, shape: [numbers.length], from: { numbers } });
  }
}
