/** DeepSeek-V3 and R1 (arXiv 2412.19437): as V2, with sigmoid scores that a learned correction balances. */
import type { ModelConfig } from '../checkpoint/config';
import { latentAttention } from './latent';
import { activation, decoder, dense, glu, linear, rmsNorm, router, topK } from './parts';
import type { Architecture, MoeSpec } from './types';

export function deepseekV3(config: ModelConfig): Architecture {
  const firstDense = config.nonNegativeInteger('first_k_dense_replace', 3);
  return decoder(
    config,
    (module) => rmsNorm(module, config),
    (index, layer) => ({
      attention: latentAttention(`${layer}.self_attn`, config),
      feedForward: index < firstDense ? dense(`${layer}.mlp`, config) : sigmoidMoe(config, `${layer}.mlp`),
    }),
  );
}

/** Also GLM-4.5's. */
export function sigmoidMoe(config: ModelConfig, module: string): MoeSpec {
  const hidden = config.positiveInteger('hidden_size');
  const width = config.positiveInteger('moe_intermediate_size');
  const experts = config.positiveInteger('n_routed_experts');
  const shared = config.nonNegativeInteger('n_shared_experts', 0);
  const count = config.positiveInteger('n_group', 1);
  return {
    kind: 'moe',
    router: router(linear(`${module}.gate`, experts, hidden), {
      scoring: 'sigmoid',
      topK: topK(config, experts),
      renormalize: config.boolean('norm_topk_prob', true),
      scale: config.positiveNumber('routed_scaling_factor', 1),
      correction: { tensor: `${module}.gate.e_score_correction_bias`, shape: [experts] },
      ...(count > 1 && { groups: { count, top: config.positiveInteger('topk_group'), best: 2 } }),
    }),
    experts: Array.from({ length: experts }, (_, e) => glu(`${module}.experts.${e}`, hidden, width)),
    activation: activation(config),
    ...(shared > 0 && { shared: glu(`${module}.shared_experts`, hidden, shared * width) }),
  };
}
