/** DeepSeek-V2 (arXiv 2405.04434): latent attention, groups of experts of which a token uses a few, shared experts fused into one MLP. */
import type { ModelConfig } from '../checkpoint/config';
import { EacMoeError } from '../errors';
import { latentAttention } from './latent';
import { activation, decoder, dense, glu, linear, rmsNorm, router, topK } from './parts';
import type { Architecture, MoeSpec } from './types';

export function deepseekV2(config: ModelConfig): Architecture {
  const experts = config.nonNegativeInteger('n_routed_experts', 0);
  const firstDense = config.nonNegativeInteger('first_k_dense_replace', 0);
  const frequency = config.positiveInteger('moe_layer_freq', 1);
  const isMoe = (index: number) => experts > 0 && index >= firstDense && index % frequency === 0;
  return decoder(
    config,
    (module) => rmsNorm(module, config),
    (index, layer) => ({
      attention: latentAttention(`${layer}.self_attn`, config),
      feedForward: isMoe(index) ? moe(config, `${layer}.mlp`, experts) : dense(`${layer}.mlp`, config),
    }),
  );
}

function moe(config: ModelConfig, module: string, experts: number): MoeSpec {
  const hidden = config.positiveInteger('hidden_size');
  const width = config.positiveInteger('moe_intermediate_size');
  const shared = config.nonNegativeInteger('n_shared_experts', 0);
  return {
    kind: 'moe',
    router: router(linear(`${module}.gate`, experts, hidden), {
      topK: topK(config, experts),
      scale: config.positiveNumber('routed_scaling_factor', 1),
      ...groups(config),
    }),
    experts: Array.from({ length: experts }, (_, e) => glu(`${module}.experts.${e}`, hidden, width)),
    activation: activation(config),
    ...(shared > 0 && { shared: glu(`${module}.shared_experts`, hidden, shared * width) }),
  };
}

function groups(config: ModelConfig): Pick<MoeSpec['router'], 'groups'> {
  const method = config.string('topk_method', 'greedy');
  if (config.boolean('norm_topk_prob', false) || !['greedy', 'group_limited_greedy'].includes(method)) {
    throw new EacMoeError(
      'UNSUPPORTED_MODEL',
      `${config.where}: topk_method '${method}' with norm_topk_prob ${config.boolean('norm_topk_prob', false)} is not supported in model_type deepseek_v2; supported are 'greedy' and 'group_limited_greedy' without it`,
    );
  }
  if (method === 'greedy') return {};
  return {
    groups: {
      count: config.positiveInteger('n_group'),
      top: config.positiveInteger('topk_group'),
      best: 1,
    },
  };
}
