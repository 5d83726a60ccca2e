/** Multi-head latent attention as DeepSeek-V2 and V3 configure and name it. */
import type { ModelConfig } from '../checkpoint/config';
import { linear, rmsNorm } from './parts';
import { ropeSpec, yarnScale } from './rope';
import type { LatentAttentionSpec } from './types';

export function latentAttention(module: string, config: ModelConfig): LatentAttentionSpec {
  const hidden = config.positiveInteger('hidden_size');
  const heads = config.positiveInteger('num_attention_heads');
  const rank = config.positiveInteger('kv_lora_rank');
  const nopeDim = config.positiveInteger('qk_nope_head_dim');
  const ropeDim = config.positiveInteger('qk_rope_head_dim');
  const valueDim = config.positiveInteger('v_head_dim');
  const qRank = config.has('q_lora_rank') ? config.positiveInteger('q_lora_rank') : 0;
  const bias = config.boolean('attention_bias', false);
  const qWidth = heads * (nopeDim + ropeDim);
  return {
    kind: 'latent',
    q: qRank ? linear(`${module}.q_b_proj`, qWidth, qRank) : linear(`${module}.q_proj`, qWidth, hidden),
    ...(qRank && {
      qDown: {
        ...linear(`${module}.q_a_proj`, qRank, hidden, bias),
        norm: rmsNorm(`${module}.q_a_layernorm`, config, undefined, qRank),
      },
    }),
    kvDown: linear(`${module}.kv_a_proj_with_mqa`, rank + ropeDim, hidden, bias),
    kvNorm: rmsNorm(`${module}.kv_a_layernorm`, config, undefined, rank),
    kvUp: linear(`${module}.kv_b_proj`, heads * (nopeDim + valueDim), rank),
    o: linear(`${module}.o_proj`, hidden, heads * valueDim, bias),
    heads,
    nopeDim,
    ropeDim,
    valueDim,
    rank,
    scale: yarnScale(config) / Math.sqrt(nopeDim + ropeDim),
    rope: {
      ...ropeSpec(config, ropeDim, undefined, ropeDim),
      interleaved: config.boolean('rope_interleave', true),
    },
  };
}
