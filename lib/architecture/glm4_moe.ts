/** GLM-4.5 and later (`glm4_moe`; arXiv 2508.06471): DeepSeek-V3's experts under grouped-query attention, half of each head rotary. */
import type { ModelConfig } from '../checkpoint/config';
import { sigmoidMoe } from './deepseek_v3';
import { attention, decoder, dense, rmsNorm } from './parts';
import type { Architecture } from './types';

export function glm4Moe(config: ModelConfig): Architecture {
  const firstDense = config.nonNegativeInteger('first_k_dense_replace', 1);
  const bias = { qkv: config.boolean('attention_bias', false), o: false };
  const norms = config.boolean('use_qk_norm', false)
    ? ({ names: ['q_norm', 'k_norm'], of: 'head' } as const)
    : undefined;
  return decoder(
    config,
    (module) => rmsNorm(module, config, 1e-5),
    (index, layer) => ({
      attention: attention(`${layer}.self_attn`, config, { bias, norms }),
      feedForward: index < firstDense ? dense(`${layer}.mlp`, config) : sigmoidMoe(config, `${layer}.mlp`),
    }),
  );
}
