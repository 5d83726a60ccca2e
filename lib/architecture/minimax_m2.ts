/** MiniMax-M2 (`minimax_m2`): experts everywhere, sigmoid scores with a correction, norms over all queries and over all keys. */
import type { ModelConfig } from '../checkpoint/config';
import { activation, attention, decoder, glu, linear, rmsNorm, router, topK } from './parts';
import type { Architecture } from './types';

export function minimaxM2(config: ModelConfig): Architecture {
  const hidden = config.positiveInteger('hidden_size');
  const width = config.positiveInteger('intermediate_size');
  const experts = config.positiveInteger('num_local_experts');
  const norms = config.boolean('use_qk_norm', true)
    ? ({ names: ['q_norm', 'k_norm'], of: 'all' } as const)
    : undefined;
  return decoder(
    config,
    (module) => rmsNorm(module, config),
    (_, layer) => ({
      attention: attention(`${layer}.self_attn`, config, {
        norms,
        defaultTheta: 5e6,
        // As published; rope_parameters, where there is one, says it by partial_rotary_factor, and transformers 5 reads nothing else.
        rotaryDim:
          config.has('rotary_dim') && !config.has('rope_parameters')
            ? config.positiveInteger('rotary_dim')
            : undefined,
      }),
      feedForward: {
        kind: 'moe',
        router: router(linear(`${layer}.block_sparse_moe.gate`, experts, hidden), {
          scoring: 'sigmoid',
          topK: topK(config, experts),
          renormalize: true,
          correction: { tensor: `${layer}.block_sparse_moe.e_score_correction_bias`, shape: [experts] },
        }),
        experts: Array.from({ length: experts }, (_, e) =>
          glu(`${layer}.block_sparse_moe.experts.${e}`, hidden, width, ['w1', 'w3', 'w2']),
        ),
        activation: activation(config),
      },
    }),
  );
}
