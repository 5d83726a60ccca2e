/** ERNIE 4.5 MoE (`ernie4_5_moe`): softmax scores with a correction, interleaved rotary pairs, dense layers at either end. */
import type { ModelConfig } from '../checkpoint/config';
import { activation, attention, decoder, dense, glu, linear, rmsNorm, router, topK } from './parts';
import type { Architecture, MoeSpec } from './types';

export function ernieMoe(config: ModelConfig): Architecture {
  const layers = config.positiveInteger('num_hidden_layers');
  const bias = config.boolean('use_bias', false);
  const interval = config.positiveInteger('moe_layer_interval', 1);
  const first = config.nonNegativeInteger('moe_layer_start_index', 1);
  // -1, or nothing: to the end.
  const last = config.value('moe_layer_end_index');
  const end =
    last === undefined || last === -1 ? layers - 1 : config.nonNegativeInteger('moe_layer_end_index');
  const isMoe = (index: number) => (index + 1) % interval === 0 && index >= first && index <= end;
  return decoder(
    config,
    (module) => rmsNorm(module, config, 1e-5),
    (index, layer) => ({
      attention: attention(`${layer}.self_attn`, config, {
        bias: { qkv: bias, o: bias },
        defaultTheta: 500000,
        interleaved: true,
      }),
      feedForward: isMoe(index) ? moe(config, `${layer}.mlp`, bias) : dense(`${layer}.mlp`, config, bias),
    }),
    { tied: true },
  );
}

function moe(config: ModelConfig, module: string, bias: boolean): MoeSpec {
  const hidden = config.positiveInteger('hidden_size');
  const width = config.positiveInteger('moe_intermediate_size');
  const experts = config.positiveInteger('moe_num_experts');
  const shared = config.nonNegativeInteger('moe_num_shared_experts', 0);
  return {
    kind: 'moe',
    router: router(linear(`${module}.gate`, experts, hidden), {
      topK: topK(config, experts, 'moe_k'),
      renormalize: true,
      correction: { tensor: `${module}.moe_statics.e_score_correction_bias`, shape: [1, experts] },
    }),
    experts: Array.from({ length: experts }, (_, e) =>
      glu(`${module}.experts.${e}`, hidden, width, undefined, bias),
    ),
    activation: activation(config),
    ...(shared > 0 && { shared: glu(`${module}.shared_experts`, hidden, shared * width) }),
  };
}
