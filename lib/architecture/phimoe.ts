/**
 * Phi-3.5-MoE: layer norms with bias, biases in attention and head, longrope, and sparse-mixer routing (arXiv 2409.12136), which
 * chooses two experts one after the other, each weighted by a softmax over the logits within 2 * jitter of the chosen one.
 *
 * Beyond the original length, frequencies and scale both switch to the long ones, as in the model's own code; transformers 5 switches
 * the scale only.
 */
import type { ModelConfig } from '../checkpoint/config';
import { EacMoeError } from '../errors';
import { activation, attention, decoder, glu, layerNorm, linear } from './parts';
import type { Architecture } from './types';

export function phimoe(config: ModelConfig): Architecture {
  const hidden = config.positiveInteger('hidden_size');
  const width = config.positiveInteger('intermediate_size');
  const experts = config.positiveInteger('num_local_experts');
  const window = config.nonNegativeInteger('sliding_window', 0);
  const bias = config.boolean('attention_bias', false);
  const topK = config.positiveInteger('num_experts_per_tok');
  if (topK !== 2 || experts < 2) {
    throw new EacMoeError(
      'UNSUPPORTED_MODEL',
      `${config.where}: num_experts_per_tok is ${topK} of ${experts}; sparse-mixer routing chooses exactly 2`,
    );
  }
  return decoder(
    config,
    (module) => layerNorm(module, config),
    (_, layer) => ({
      attention: attention(`${layer}.self_attn`, config, {
        bias: { qkv: bias, o: bias },
        window,
        defaultTheta: 1e6,
      }),
      feedForward: {
        kind: 'moe',
        router: {
          ...linear(`${layer}.block_sparse_moe.gate`, experts, hidden),
          scoring: 'sparse-mixer',
          topK,
          renormalize: false,
          scale: 1,
          jitter: config.nonNegativeNumber('router_jitter_noise', 0.01),
        },
        experts: Array.from({ length: experts }, (_, e) =>
          glu(`${layer}.block_sparse_moe.experts.${e}`, hidden, width, ['w1', 'w3', 'w2']),
        ),
        activation: activation(config),
      },
    }),
    { headBias: config.boolean('lm_head_bias', false) },
  );
}
