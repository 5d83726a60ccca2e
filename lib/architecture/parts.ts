/** What the families' files are written with: the shapes that most decoders share, filled in from config.json. */
import type { Activation } from '../../types/native';
import type { ModelConfig } from '../checkpoint/config';
import { EacMoeError } from '../errors';
import { ropeSpec } from './rope';
import type { Architecture, AttentionSpec, GluSpec, LayerSpec, LinearSpec, NormSpec } from './types';

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
): GluSpec {
  return {
    gate: linear(`${module}.${names[0]}`, width, hidden),
    up: linear(`${module}.${names[1]}`, width, hidden),
    down: linear(`${module}.${names[2]}`, hidden, width),
  };
}

export function rmsNorm(module: string, config: ModelConfig, defaultEps = 1e-6): NormSpec {
  const eps = config.positiveNumber('rms_norm_eps', defaultEps);
  return { kind: 'rms', weight: `${module}.weight`, size: config.positiveInteger('hidden_size'), eps };
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
}

/** Grouped-query attention under `module`, with q_proj, k_proj, v_proj and o_proj. */
export function attention(
  module: string,
  config: ModelConfig,
  options: AttentionOptions = {},
): AttentionSpec {
  const { bias = { qkv: false, o: false }, window = 0, defaultTheta } = options;
  const hidden = config.positiveInteger('hidden_size');
  const heads = config.positiveInteger('num_attention_heads');
  const kvHeads = config.positiveInteger('num_key_value_heads', heads);
  if (heads % kvHeads !== 0)
    config.fail('num_key_value_heads', `a divisor of num_attention_heads (${heads})`);
  if (!config.has('head_dim') && hidden % heads !== 0)
    config.fail('num_attention_heads', `a divisor of hidden_size (${hidden})`);
  const headDim = config.positiveInteger('head_dim', hidden / heads);
  return {
    q: linear(`${module}.q_proj`, heads * headDim, hidden, bias.qkv),
    k: linear(`${module}.k_proj`, kvHeads * headDim, hidden, bias.qkv),
    v: linear(`${module}.v_proj`, kvHeads * headDim, hidden, bias.qkv),
    o: linear(`${module}.o_proj`, hidden, heads * headDim, bias.o),
    heads,
    kvHeads,
    headDim,
    scale: 1 / Math.sqrt(headDim),
    rope: ropeSpec(config, headDim, defaultTheta),
    window,
  };
}

/** Embedding, layers, final norm and head under the names that all families here use. */
export function decoder(
  config: ModelConfig,
  norm: (module: string, config: ModelConfig) => NormSpec,
  layer: (index: number, module: string) => Pick<LayerSpec, 'attention' | 'feedForward'>,
  headBias = false,
): Architecture {
  const vocabSize = config.positiveInteger('vocab_size');
  const hiddenSize = config.positiveInteger('hidden_size');
  const tied = config.boolean('tie_word_embeddings', false);
  const embedding = 'model.embed_tokens.weight';
  const head = linear('lm_head', vocabSize, hiddenSize, headBias);
  return {
    modelType: config.modelType,
    vocabSize,
    hiddenSize,
    maxPositions: config.positiveInteger('max_position_embeddings'),
    embedding: { weight: embedding, scale: 1 },
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
  };
}
