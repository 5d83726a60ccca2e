/** Hunyuan-A13B (`hunyuan_v1_moe`): a shared expert of the experts' size, norms on the heads of q and k after the rotary embedding. */
import type { ModelConfig } from '../checkpoint/config';
import { activation, attention, decoder, glu, linear, rmsNorm, router } from './parts';
import type { Architecture } from './types';

export function hunyuanMoe(config: ModelConfig): Architecture {
  const hidden = config.positiveInteger('hidden_size');
  const width = config.positiveInteger('intermediate_size');
  const bias = config.boolean('attention_bias', false);
  return decoder(
    config,
    (module) => rmsNorm(module, config, 1e-5),
    (index, layer) => {
      const experts = ofLayer(config, 'num_experts', index);
      const topK = ofLayer(config, 'moe_topk', index);
      if (topK > experts) config.fail('moe_topk', `at most the number of experts, ${experts}`);
      return {
        attention: attention(`${layer}.self_attn`, config, {
          bias: { qkv: bias, o: bias },
          norms: { names: ['query_layernorm', 'key_layernorm'], of: 'head', afterRope: true },
        }),
        feedForward: {
          kind: 'moe',
          router: router(linear(`${layer}.mlp.gate.wg`, experts, hidden), { topK, renormalize: true }),
          experts: Array.from({ length: experts }, (_, e) => glu(`${layer}.mlp.experts.${e}`, hidden, width)),
          activation: activation(config),
          shared: glu(`${layer}.mlp.shared_mlp`, hidden, width),
        },
      };
    },
  );
}

/** One number for all layers, or one each. */
function ofLayer(config: ModelConfig, key: string, index: number): number {
  if (!Array.isArray(config.value(key))) return config.positiveInteger(key);
  const value = config.integers(key)[index];
  if (value === undefined || value < 1) config.fail(key, `a positive integer for layer ${index}`);
  return value;
}
