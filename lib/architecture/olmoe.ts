/** OLMoE (arXiv 2409.02060): experts everywhere, norms over all queries and over all keys. */
import type { ModelConfig } from '../checkpoint/config';
import { EacMoeError } from '../errors';
import { activation, attention, decoder, glu, linear, rmsNorm, router, topK } from './parts';
import type { Architecture } from './types';

export function olmoe(config: ModelConfig): Architecture {
  const hidden = config.positiveInteger('hidden_size');
  const width = config.positiveInteger('intermediate_size');
  const experts = config.positiveInteger('num_experts', config.positiveInteger('num_local_experts', 64));
  const bias = config.boolean('attention_bias', false);
  if (config.has('clip_qkv')) {
    throw new EacMoeError(
      'UNSUPPORTED_MODEL',
      `${config.where}: clip_qkv is not supported; the published OLMoE models do not clip`,
    );
  }
  return decoder(
    config,
    (module) => rmsNorm(module, config, 1e-5),
    (_, layer) => ({
      attention: attention(`${layer}.self_attn`, config, {
        bias: { qkv: bias, o: bias },
        norms: { names: ['q_norm', 'k_norm'], of: 'all' },
      }),
      feedForward: {
        kind: 'moe',
        router: router(linear(`${layer}.mlp.gate`, experts, hidden), {
          topK: topK(config, experts),
          renormalize: config.boolean('norm_topk_prob', false),
        }),
        experts: Array.from({ length: experts }, (_, e) => glu(`${layer}.mlp.experts.${e}`, hidden, width)),
        activation: activation(config),
      },
    }),
  );
}
