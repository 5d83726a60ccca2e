/** What the families' files are written with: the shapes that most decoders share, filled in from config.json. */
import type { Activation } from '../../types/native';
import type { ModelConfig } from '../checkpoint/config';
import { EacMoeError } from '../errors';
import { ropeSpec } from './rope';
import type {
  Architecture,
  DenseSpec,
  ExpertPart,
  GluSpec,
  GroupedAttentionSpec,
  LayerSpec,
  LinearSpec,
  NormSpec,
  RouterOptions,
} from './types';

const ACTIVATIONS: ReadonlyMap<string, Activation> = new Map([
  ['silu', 'silu'],
  ['swish', 'silu'],
  ['gelu', 'gelu'],
  ['gelu_new', 'gelu-tanh'],
  ['gelu_pytorch_tanh', 'gelu-tanh'],
  ['relu', 'relu'],
]);

export function activation(config: ModelConfig): Activation {
  const name = config.string('hidden_act', 'silu');
  const found = ACTIVATIONS.get(name);
  if (!found) {
    throw new EacMoeError(
      'UNSUPPORTED_MODEL',
      `${config.where}: hidden_act '${name}' is not supported; supported are ${[...ACTIVATIONS.keys()].join(', ')}`,
    );
  }
  return found;
}

/** The linear layer of module `module`, [out, in]. */
export function linear(module: string, out: number, inputs: number, bias = false): LinearSpec {
  return { weight: `${module}.weight`, ...(bias ? { bias: `${module}.bias` } : {}), out, in: inputs };
}

/** A gated MLP under `module`; `names` are the gate, up and down projections'. */
export function glu(
  module: string,
  hidden: number,
  width: number,
  names: readonly [string, string, string] = ['gate_proj', 'up_proj', 'down_proj'],
  bias = false,
): GluSpec {
  return {
    gate: linear(`${module}.${names[0]}`, width, hidden, bias),
    up: linear(`${module}.${names[1]}`, width, hidden, bias),
    down: linear(`${module}.${names[2]}`, hidden, width, bias),
  };
}

/** `expert` of the tensor `tensor`, [experts, in, out] if transposed; its channels are those of the linear layer unless said otherwise. */
export function fusedExpert(
  tensor: string,
  shape: number[],
  expert: number,
  part: Partial<Pick<ExpertPart, 'from' | 'step' | 'transposed'>> = {},
): ExpertPart {
  return { tensor, shape, expert, from: 0, step: 1, transposed: false, ...part };
}

/** A feed-forward without experts. */
export function dense(module: string, config: ModelConfig, bias = false): DenseSpec {
  const [hidden, width] = [
    config.positiveInteger('hidden_size'),
    config.positiveInteger('intermediate_size'),
  ];
  return { kind: 'dense', ...glu(module, hidden, width, undefined, bias), activation: activation(config) };
}

/** A softmax over all experts, whose top-k are weighted as they are; `options` says what is different. */
export function router(
  gate: LinearSpec,
  options: Pick<RouterOptions, 'topK'> & Partial<RouterOptions>,
): LinearSpec & RouterOptions {
  return { ...gate, scoring: 'softmax', renormalize: false, scale: 1, jitter: 0, ...options };
}

export function rmsNorm(module: string, config: ModelConfig, defaultEps = 1e-6, size?: number): NormSpec {
  const eps = config.positiveNumber('rms_norm_eps', defaultEps);
  return {
    kind: 'rms',
    weight: `${module}.weight`,
    size: size ?? config.positiveInteger('hidden_size'),
    eps,
  };
}

/** Layer norm whose epsilon config.json still calls rms_norm_eps. */
export function layerNorm(module: string, config: ModelConfig, defaultEps = 1e-5): NormSpec {
  return { ...rmsNorm(module, config, defaultEps), kind: 'layer', bias: `${module}.bias` };
}

/** `top` of `count` experts, checked. */
export function topK(config: ModelConfig, count: number, key = 'num_experts_per_tok'): number {
  const k = config.positiveInteger(key);
  if (k > count) config.fail(key, `at most the number of experts, ${count}`);
  return k;
}

export interface AttentionOptions {
  /** Biases on q, k, v and on o. */
  bias?: { qkv: boolean; o: boolean };
  window?: number;
  defaultTheta?: number;
  /** Rotary channels of a head, where config.json does not say it by `partial_rotary_factor`. */
  rotaryDim?: number;
  interleaved?: boolean;
  /** Default headDim^-1/2. */
  scale?: number;
  /** RMS norms of queries and keys: their modules, and whether of each head or of all together. */
  norms?: { names: readonly [string, string]; of: 'head' | 'all'; afterRope?: boolean };
  /** Name of the sinks under the module. */
  sinks?: string;
}

/** Grouped-query attention under `module`, with q_proj, k_proj, v_proj and o_proj. */
export function attention(
  module: string,
  config: ModelConfig,
  options: AttentionOptions = {},
): GroupedAttentionSpec {
  const { bias = { qkv: false, o: false }, window = 0, defaultTheta, rotaryDim, norms, sinks } = options;
  const hidden = config.positiveInteger('hidden_size');
  const heads = config.positiveInteger('num_attention_heads');
  const kvHeads = config.positiveInteger('num_key_value_heads', heads);
  if (heads % kvHeads !== 0)
    config.fail('num_key_value_heads', `a divisor of num_attention_heads (${heads})`);
  if (!config.has('head_dim') && hidden % heads !== 0)
    config.fail('num_attention_heads', `a divisor of hidden_size (${hidden})`);
  const headDim = config.positiveInteger('head_dim', hidden / heads);
  const norm = (name: string, count: number): NormSpec =>
    rmsNorm(`${module}.${name}`, config, undefined, norms!.of === 'head' ? headDim : count * headDim);
  const rope = ropeSpec(config, headDim, defaultTheta, rotaryDim);
  return {
    kind: 'grouped',
    q: linear(`${module}.q_proj`, heads * headDim, hidden, bias.qkv),
    k: linear(`${module}.k_proj`, kvHeads * headDim, hidden, bias.qkv),
    v: linear(`${module}.v_proj`, kvHeads * headDim, hidden, bias.qkv),
    o: linear(`${module}.o_proj`, hidden, heads * headDim, bias.o),
    heads,
    kvHeads,
    headDim,
    scale: options.scale ?? 1 / Math.sqrt(headDim),
    rope: { ...rope, interleaved: options.interleaved ?? rope.interleaved },
    window,
    ...(norms && {
      norms: {
        q: norm(norms.names[0], heads),
        k: norm(norms.names[1], kvHeads),
        afterRope: norms.afterRope ?? false,
      },
    }),
    ...(sinks && { sinks: `${module}.${sinks}` }),
  };
}

/** Embedding, layers, final norm and head under the names that all families here use. */
export function decoder(
  config: ModelConfig,
  norm: (module: string, config: ModelConfig) => NormSpec,
  layer: (index: number, module: string) => Pick<LayerSpec, 'attention' | 'feedForward' | 'residualScale'>,
  options: { headBias?: boolean; tied?: boolean; embeddingScale?: number; logitScale?: number } = {},
): Architecture {
  const { headBias = false, embeddingScale = 1, logitScale } = options;
  const vocabSize = config.positiveInteger('vocab_size');
  const hiddenSize = config.positiveInteger('hidden_size');
  const tied = config.boolean('tie_word_embeddings', options.tied ?? false);
  const embedding = 'model.embed_tokens.weight';
  const head = linear('lm_head', vocabSize, hiddenSize, headBias);
  return {
    modelType: config.modelType,
    vocabSize,
    hiddenSize,
    maxPositions: config.positiveInteger('max_position_embeddings'),
    embedding: { weight: embedding, scale: embeddingScale },
    layers: Array.from({ length: config.positiveInteger('num_hidden_layers') }, (_, i) => {
      const module = `model.layers.${i}`;
      return {
        attentionNorm: norm(`${module}.input_layernorm`, config),
        ...layer(i, module),
        feedForwardNorm: norm(`${module}.post_attention_layernorm`, config),
      };
    }),
    norm: norm('model.norm', config),
    head: tied ? { ...head, weight: embedding } : head,
    ...(logitScale !== undefined && { logitScale }),
  };
}
