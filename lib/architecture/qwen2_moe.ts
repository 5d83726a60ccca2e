/** Qwen1.5-MoE and Qwen2-MoE (`qwen2_moe`): biases on q, k and v, one shared expert scaled by a sigmoid gate, optional dense layers. */
import type { ModelConfig } from '../checkpoint/config';
import { activation, attention, decoder, dense, glu, linear, rmsNorm, router, topK } from './parts';
import type { Architecture, LayerSpec } from './types';

export function qwen2Moe(config: ModelConfig): Architecture {
  const hidden = config.positiveInteger('hidden_size');
  const experts = config.nonNegativeInteger('num_experts');
  const step = config.positiveInteger('decoder_sparse_step', 1);
  const denseLayers = new Set(config.integers('mlp_only_layers', []));
  const bias = { qkv: config.boolean('qkv_bias', true), o: false };
  const isMoe = (index: number): boolean =>
    !denseLayers.has(index) && experts > 0 && (index + 1) % step === 0;
  return decoder(
    config,
    (module) => rmsNorm(module, config),
    (index, layer) => ({
      attention: attention(`${layer}.self_attn`, config, { bias, window: windowOf(config, index) }),
      feedForward: isMoe(index)
        ? moe(config, `${layer}.mlp`, hidden, experts)
        : dense(`${layer}.mlp`, config),
    }),
  );
}

/** Where `layer_types` is absent, every other layer below max_window_layers has the window, as in transformers 5. */
function windowOf(config: ModelConfig, index: number): number {
  if (!config.boolean('use_sliding_window', false)) return 0;
  const types = config.strings('layer_types', []);
  const sliding =
    types.length > 0
      ? types[index] === 'sliding_attention'
      : index % 2 === 0 && index < config.nonNegativeInteger('max_window_layers', 28);
  return sliding ? config.positiveInteger('sliding_window', 4096) : 0;
}

function moe(config: ModelConfig, module: string, hidden: number, experts: number): LayerSpec['feedForward'] {
  const width = config.positiveInteger('moe_intermediate_size');
  return {
    kind: 'moe',
    router: router(linear(`${module}.gate`, experts, hidden), {
      topK: topK(config, experts),
      renormalize: config.boolean('norm_topk_prob', false),
    }),
    experts: Array.from({ length: experts }, (_, e) => glu(`${module}.experts.${e}`, hidden, width)),
    activation: activation(config),
    shared: {
      ...glu(`${module}.shared_expert`, hidden, config.positiveInteger('shared_expert_intermediate_size')),
      outputGate: linear(`${module}.shared_expert_gate`, 1, hidden),
    },
  };
}
