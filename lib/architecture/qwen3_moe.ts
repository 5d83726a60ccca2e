/** Qwen3-MoE (arXiv 2505.09388): as Qwen2-MoE with norms on the heads of q and k, without biases and shared expert. */
import type { ModelConfig } from '../checkpoint/config';
import { activation, attention, decoder, dense, glu, linear, rmsNorm, router, topK } from './parts';
import type { Architecture } from './types';

export function qwen3Moe(config: ModelConfig): Architecture {
  const hidden = config.positiveInteger('hidden_size');
  const width = config.positiveInteger('moe_intermediate_size');
  const experts = config.nonNegativeInteger('num_experts', config.nonNegativeInteger('num_local_experts', 0));
  const step = config.positiveInteger('decoder_sparse_step', 1);
  const denseLayers = new Set(config.integers('mlp_only_layers', []));
  const bias = config.boolean('attention_bias', false);
  const window = config.boolean('use_sliding_window', false) ? config.positiveInteger('sliding_window') : 0;
  const isMoe = (index: number) => !denseLayers.has(index) && experts > 0 && (index + 1) % step === 0;
  return decoder(
    config,
    (module) => rmsNorm(module, config),
    (index, layer) => ({
      attention: attention(`${layer}.self_attn`, config, {
        bias: { qkv: bias, o: bias },
        window,
        norms: { names: ['q_norm', 'k_norm'], of: 'head' },
      }),
      feedForward: isMoe(index)
        ? {
            kind: 'moe',
            router: router(linear(`${layer}.mlp.gate`, experts, hidden), {
              topK: topK(config, experts),
              renormalize: config.boolean('norm_topk_prob', false),
            }),
            experts: Array.from({ length: experts }, (_, e) =>
              glu(`${layer}.mlp.experts.${e}`, hidden, width),
            ),
            activation: activation(config),
          }
        : dense(`${layer}.mlp`, config),
    }),
  );
}
