/** Granite 3 MoE (`granitemoe`): experts fused with gate before up, and a multiplier each for embedding, attention, residual branches and logits. */
import type { ModelConfig } from '../checkpoint/config';
import { activation, attention, decoder, fusedExpert, linear, rmsNorm, router, topK } from './parts';
import type { Architecture, GluSpec } from './types';

export function graniteMoe(config: ModelConfig): Architecture {
  const hidden = config.positiveInteger('hidden_size');
  const width = config.positiveInteger('intermediate_size');
  const experts = config.positiveInteger('num_local_experts');
  const bias = config.boolean('attention_bias', false);
  return decoder(
    config,
    (module) => rmsNorm(module, config),
    (_, layer) => ({
      attention: attention(`${layer}.self_attn`, config, {
        bias: { qkv: bias, o: bias },
        scale: config.positiveNumber('attention_multiplier', 1),
      }),
      feedForward: {
        kind: 'moe',
        router: router(linear(`${layer}.block_sparse_moe.router.layer`, experts, hidden), {
          topK: topK(config, experts),
          renormalize: true,
        }),
        experts: Array.from({ length: experts }, (_, e) =>
          expert(`${layer}.block_sparse_moe`, experts, e, hidden, width),
        ),
        activation: activation(config),
      },
      residualScale: config.positiveNumber('residual_multiplier', 1),
    }),
    {
      tied: true,
      embeddingScale: config.positiveNumber('embedding_multiplier', 1),
      logitScale: 1 / config.positiveNumber('logits_scaling', 1),
    },
  );
}

function expert(module: string, experts: number, e: number, hidden: number, width: number): GluSpec {
  const input = (name: string, from: number) => ({
    ...linear(`${module}.experts.${e}.${name}`, width, hidden),
    fused: {
      weight: fusedExpert(`${module}.input_linear.weight`, [experts, 2 * width, hidden], e, { from }),
    },
  });
  return {
    gate: input('gate_proj', 0),
    up: input('up_proj', width),
    down: {
      ...linear(`${module}.experts.${e}.down_proj`, hidden, width),
      fused: { weight: fusedExpert(`${module}.output_linear.weight`, [experts, hidden, width], e) },
    },
  };
}
