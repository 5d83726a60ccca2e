/**
 * What a model family is made of: data that `lib/model` interprets. One file beside this one describes one family, as a function from
 * its config.json to an `Architecture`; tensor names are those of the Hugging Face checkpoint.
 */
import type { Activation, RouterSpec } from '../../types/native';

/** The matrix [out, in] (or bias [out]) of one expert within a tensor that holds all experts'. */
export interface ExpertPart {
  tensor: string;
  /** Of that tensor, [experts, ., .] or, for biases, [experts, .]. */
  shape: number[];
  expert: number;
  /** The expert's output channels `from`, `from + step`, ...; gate and up often share a tensor, one after the other or interleaved. */
  from: number;
  step: number;
  /** Stored [experts, in, out] instead of [experts, out, in]. */
  transposed: boolean;
}

/** A linear layer, y = x Wᵀ + b. */
export interface LinearSpec {
  /**
   * Tensor name of the weight, [out, in]. Where the published checkpoint fuses experts (`fused`), this is the name under which the matrix is
   * known to plans and written when quantized.
   */
  weight: string;
  /** Tensor name of the bias, [out]. */
  bias?: string;
  out: number;
  in: number;
  /** Where weight and bias lie in tensors of several experts. A checkpoint that holds `weight` itself is read, too. */
  fused?: { weight: ExpertPart; bias?: ExpertPart };
}

/** A normalisation of the hidden states. */
export interface NormSpec {
  kind: 'rms' | 'layer';
  weight: string;
  /** Layer norm only. */
  bias?: string;
  size: number;
  eps: number;
}

/** Rotary position embedding. */
export interface RopeSpec {
  /** Channels of a head that turn (even; at most headDim). */
  dim: number;
  /** Inverse frequencies, dim / 2. */
  frequencies: number[];
  /** Multiplies cos and sin. */
  scale: number;
  /** Pairs (2i, 2i+1) instead of (i, i + dim/2). */
  interleaved: boolean;
  /** longrope: other frequencies once a sequence is longer than `from` tokens. */
  long?: { frequencies: number[]; scale: number; from: number };
}

/** Causal attention with grouped query heads; widths follow from the projections. */
export interface GroupedAttentionSpec {
  kind: 'grouped';
  q: LinearSpec;
  k: LinearSpec;
  v: LinearSpec;
  o: LinearSpec;
  heads: number;
  kvHeads: number;
  headDim: number;
  /** Multiplies q·k; usually headDim^-1/2. */
  scale: number;
  rope: RopeSpec;
  /** Sliding window in tokens, 0 = none. */
  window: number;
  /** Of queries and keys: of each head (size headDim) or of all together, before or after the rotary embedding. */
  norms?: { q: NormSpec; k: NormSpec; afterRope: boolean };
  /** Tensor name of a logit a head that takes its share of the softmax and has no value, [heads]. */
  sinks?: string;
}

/**
 * Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values are products of a latent vector a token, which
 * is what the cache holds, and one rotary key that all heads share.
 */
export interface LatentAttentionSpec {
  kind: 'latent';
  /** To heads * (nopeDim + ropeDim), from the input or from a latent vector of its own. */
  q: LinearSpec;
  qDown?: LinearSpec & { norm: NormSpec };
  /** To rank + ropeDim: the latent vector and the rotary key. */
  kvDown: LinearSpec;
  kvNorm: NormSpec;
  /** From rank to heads * (nopeDim + valueDim): each head's keys without position, then its values. */
  kvUp: LinearSpec;
  o: LinearSpec;
  heads: number;
  nopeDim: number;
  ropeDim: number;
  valueDim: number;
  rank: number;
  /** Multiplies q·k. */
  scale: number;
  rope: RopeSpec;
}

export type AttentionSpec = GroupedAttentionSpec | LatentAttentionSpec;

/** down(activation(gate x) * up x) */
export interface GluSpec {
  gate: LinearSpec;
  up: LinearSpec;
  down: LinearSpec;
}

/** How a router chooses; `correction` by the name and shape of its tensor. */
export type RouterOptions = Omit<RouterSpec, 'correction'> & {
  correction?: { tensor: string; shape: number[] };
};

/** A Mixture-of-Experts feed-forward: router, experts, and a shared expert where the family has one. */
export interface MoeSpec {
  kind: 'moe';
  router: LinearSpec & RouterOptions;
  experts: GluSpec[];
  activation: Activation;
  /** Runs for every token; `gate` ([1, hidden]) scales its output by a sigmoid. */
  shared?: GluSpec & { outputGate?: LinearSpec };
}

/** A feed-forward without experts, as some families have in their first layers. */
export interface DenseSpec extends GluSpec {
  kind: 'dense';
  activation: Activation;
}

/** A pre-norm decoder layer: h += residualScale * attention(norm(h)); h += residualScale * feedForward(norm(h)). */
export interface LayerSpec {
  attentionNorm: NormSpec;
  attention: AttentionSpec;
  feedForwardNorm: NormSpec;
  feedForward: MoeSpec | DenseSpec;
  /** Default 1. */
  residualScale?: number;
}

/** A whole model. */
export interface Architecture {
  /** `model_type` of config.json. */
  modelType: string;
  vocabSize: number;
  hiddenSize: number;
  /** Longest sequence the model was made for, in tokens. */
  maxPositions: number;
  embedding: { weight: string; scale: number };
  layers: LayerSpec[];
  norm: NormSpec;
  /** `weight` is the embedding's when tied. */
  head: LinearSpec;
  /** Multiplies the logits; default 1. */
  logitScale?: number;
}
