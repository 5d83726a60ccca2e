/** The families: which `model_type` is described by which file. */
import type { ModelConfig } from '../checkpoint/config';
import { EacMoeError } from '../errors';
import { deepseek } from './deepseek';
import { mixtral } from './mixtral';
import { phimoe } from './phimoe';
import { qwen2Moe } from './qwen2_moe';
import type { Architecture } from './types';

export type * from './types';

const FAMILIES: ReadonlyMap<string, (config: ModelConfig) => Architecture> = new Map([
  ['mixtral', mixtral],
  ['phimoe', phimoe],
  ['deepseek', deepseek],
  ['qwen2_moe', qwen2Moe],
]);

/** `model_type`s that can be read. */
export const SUPPORTED_MODEL_TYPES: readonly string[] = [...FAMILIES.keys()];

/** Fields by which the configurations of MoE families count their experts. */
const EXPERT_FIELDS = [
  'num_experts',
  'num_local_experts',
  'n_routed_experts',
  'moe_num_experts',
  'num_experts_per_tok',
  'ffn_config',
];

function denseModel(config: ModelConfig, why: string): EacMoeError {
  return new EacMoeError(
    'UNSUPPORTED_MODEL',
    `${config.where}: '${config.modelType}' is a dense model (${why}); this library compresses Mixture-of-Experts models: ${SUPPORTED_MODEL_TYPES.join(', ')}`,
  );
}

/** What a model is made of, by its config.json. */
export function describe(config: ModelConfig): Architecture {
  const family = FAMILIES.get(config.modelType);
  if (!family) {
    if (!EXPERT_FIELDS.some((key) => config.has(key)))
      throw denseModel(config, 'its config.json names no experts');
    throw new EacMoeError(
      'UNSUPPORTED_MODEL',
      `${config.where}: model_type '${config.modelType}' is not supported; supported are ${SUPPORTED_MODEL_TYPES.join(', ')}`,
    );
  }
  const architecture = family(config);
  if (!architecture.layers.some((layer) => layer.feedForward.kind === 'moe')) {
    throw denseModel(config, 'none of its layers has experts');
  }
  return architecture;
}
