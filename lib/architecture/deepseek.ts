/**
 * DeepSeek-MoE-16B (`deepseek`; arXiv 2401.06066): fine-grained experts, shared experts fused into one MLP, the first layers dense.
 * V2 and V3 are other families.
 */
import type { ModelConfig } from '../checkpoint/config';
import { EacMoeError } from '../errors';
import { activation, attention, decoder, dense, glu, linear, rmsNorm, router, topK } from './parts';
import type { Architecture } from './types';

export function deepseek(config: ModelConfig): Architecture {
  const hidden = config.positiveInteger('hidden_size');
  const experts = config.nonNegativeInteger('n_routed_experts', 0);
  const shared = config.nonNegativeInteger('n_shared_experts', 0);
  const firstDense = config.nonNegativeInteger('first_k_dense_replace', 0);
  const frequency = config.positiveInteger('moe_layer_freq', 1);
  const bias = config.boolean('attention_bias', false);
  const scoring = config.string('scoring_func', 'softmax');
  if (scoring !== 'softmax') {
    throw new EacMoeError(
      'UNSUPPORTED_MODEL',
      `${config.where}: scoring_func '${scoring}' is not supported in model_type deepseek, only softmax`,
    );
  }
  const isMoe = (index: number): boolean => experts > 0 && index >= firstDense && index % frequency === 0;
  return decoder(
    config,
    (module) => rmsNorm(module, config),
    (index, layer) => ({
      attention: attention(`${layer}.self_attn`, config, { bias: { qkv: bias, o: bias } }),
      feedForward: isMoe(index)
        ? moe(config, `${layer}.mlp`, hidden, experts, shared)
        : dense(`${layer}.mlp`, config),
    }),
  );
}

function moe(
  config: ModelConfig,
  module: string,
  hidden: number,
  experts: number,
  shared: number,
): Architecture['layers'][number]['feedForward'] {
  const width = config.positiveInteger('moe_intermediate_size');
  const k = topK(config, experts);
  return {
    kind: 'moe',
    router: router(linear(`${module}.gate`, experts, hidden), {
      topK: k,
      renormalize: k > 1 && config.boolean('norm_topk_prob', false),
    }),
    experts: Array.from({ length: experts }, (_, e) => glu(`${module}.experts.${e}`, hidden, width)),
    activation: activation(config),
    ...(shared > 0 ? { shared: glu(`${module}.shared_experts`, hidden, shared * width) } : {}),
  };
}
