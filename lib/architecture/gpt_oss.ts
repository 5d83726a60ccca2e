/**
 * gpt-oss (arXiv 2508.10925): attention sinks, every other layer with a sliding window, biases everywhere, experts fused with gate and up
 * interleaved, a clamped SwiGLU.
 */
import type { ModelConfig } from '../checkpoint/config';
import { EacMoeError } from '../errors';
import { attention, decoder, fusedExpert, linear, rmsNorm, router, topK } from './parts';
import type { Architecture, GluSpec } from './types';

export function gptOss(config: ModelConfig): Architecture {
  const hidden = config.positiveInteger('hidden_size');
  const width = config.positiveInteger('intermediate_size');
  const experts = config.positiveInteger('num_local_experts');
  const bias = config.boolean('attention_bias', true);
  const limit = config.positiveNumber('swiglu_limit', 7);
  const types = config.strings('layer_types', []);
  if (limit !== 7) {
    throw new EacMoeError(
      'UNSUPPORTED_MODEL',
      `${config.where}: swiglu_limit ${limit} is not supported; only 7, as published`,
    );
  }
  const slides = (index: number) =>
    types.length > 0 ? types[index] === 'sliding_attention' : index % 2 === 0;
  return decoder(
    config,
    (module) => rmsNorm(module, config, 1e-5),
    (index, layer) => ({
      attention: attention(`${layer}.self_attn`, config, {
        bias: { qkv: bias, o: bias },
        window: slides(index) ? config.positiveInteger('sliding_window', 128) : 0,
        defaultTheta: 150000,
        sinks: 'sinks',
      }),
      feedForward: {
        kind: 'moe',
        router: router(linear(`${layer}.mlp.router`, experts, hidden, true), {
          topK: topK(config, experts),
          renormalize: true,
        }),
        experts: Array.from({ length: experts }, (_, e) =>
          expert(`${layer}.mlp.experts`, experts, e, hidden, width),
        ),
        activation: 'clamped-swiglu',
      },
    }),
  );
}

function expert(module: string, experts: number, e: number, hidden: number, width: number): GluSpec {
  const part = (name: string, stored: string, out: number, inputs: number, from: number, step: number) => ({
    ...linear(`${module}.${e}.${name}`, out, inputs),
    fused: {
      weight: fusedExpert(`${module}.${stored}`, [experts, inputs, out * step], e, {
        from,
        step,
        transposed: true,
      }),
      bias: fusedExpert(`${module}.${stored}_bias`, [experts, out * step], e, { from, step }),
    },
  });
  return {
    gate: part('gate_proj', 'gate_up_proj', width, hidden, 0, 2),
    up: part('up_proj', 'gate_up_proj', width, hidden, 1, 2),
    down: part('down_proj', 'down_proj', hidden, width, 0, 1),
  };
}
