/** Mixtral (Mixtral-8x7B, -8x22B): grouped-query attention, experts everywhere, top-k of the softmax renormalised. */
import type { ModelConfig } from '../checkpoint/config';
import { activation, attention, decoder, glu, linear, rmsNorm, router, topK } from './parts';
import type { Architecture } from './types';

export function mixtral(config: ModelConfig): Architecture {
  const hidden = config.positiveInteger('hidden_size');
  const width = config.positiveInteger('intermediate_size');
  const experts = config.positiveInteger('num_local_experts');
  const window = config.nonNegativeInteger('sliding_window', 0);
  return decoder(
    config,
    (module) => rmsNorm(module, config, 1e-5),
    (_, layer) => ({
      attention: attention(`${layer}.self_attn`, config, { window, defaultTheta: 1e6 }),
      feedForward: {
        kind: 'moe',
        router: router(linear(`${layer}.block_sparse_moe.gate`, experts, hidden), {
          topK: topK(config, experts),
          renormalize: true,
        }),
        experts: Array.from({ length: experts }, (_, e) =>
          glu(`${layer}.block_sparse_moe.experts.${e}`, hidden, width, ['w1', 'w3', 'w2']),
        ),
        activation: activation(config),
      },
    }),
  );
}
