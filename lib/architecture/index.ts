/** The families: which `model_type` is described by which file. */
import type { ModelConfig } from '../checkpoint/config';
import { EacMoeError } from '../errors';
import { deepseek } from './deepseek';
import { deepseekV2 } from './deepseek_v2';
import { deepseekV3 } from './deepseek_v3';
import { ernieMoe } from './ernie4_5_moe';
import { glm4Moe } from './glm4_moe';
import { gptOss } from './gpt_oss';
import { graniteMoe } from './granitemoe';
import { hunyuanMoe } from './hunyuan_v1_moe';
import { minimaxM2 } from './minimax_m2';
import { mixtral } from './mixtral';
import { olmoe } from './olmoe';
import { phimoe } from './phimoe';
import { qwen2Moe } from './qwen2_moe';
import { qwen3Moe } from './qwen3_moe';
import type { Architecture } from './types';

export type * from './types';

const FAMILIES: ReadonlyMap<string, (config: ModelConfig) => Architecture> = new Map([
  ['mixtral', mixtral],
  ['phimoe', phimoe],
  ['deepseek', deepseek],
  ['qwen2_moe', qwen2Moe],
  ['qwen3_moe', qwen3Moe],
  ['olmoe', olmoe],
  ['deepseek_v2', deepseekV2],
  ['deepseek_v3', deepseekV3],
  ['gpt_oss', gptOss],
  ['granitemoe', graniteMoe],
  ['glm4_moe', glm4Moe],
  ['minimax_m2', minimaxM2],
  ['ernie4_5_moe', ernieMoe],
  ['hunyuan_v1_moe', hunyuanMoe],
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
