/** Tiny checkpoints of every family that gguf knows: random float32 weights under the published names, with a tokenizer of bytes. */
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { describe } from '../../lib/architecture';
import { requiredTensors, type RequiredTensor } from '../../lib/architecture/tensors';
import { normaliseConfig } from '../../lib/checkpoint/config';
import { writeJson } from '../../lib/checkpoint/files';
import { writeSafetensors } from '../../lib/checkpoint/safetensors';
import { seededRandom } from '../../lib/model/random';

const COMMON = {
  hidden_size: 128,
  vocab_size: 288,
  num_hidden_layers: 3,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  max_position_embeddings: 256,
  num_experts_per_tok: 2,
  rms_norm_eps: 1e-5,
  rope_theta: 10000,
  hidden_act: 'silu',
};

const YARN = {
  type: 'yarn',
  factor: 4,
  original_max_position_embeddings: 64,
  beta_fast: 32,
  beta_slow: 1,
};

const LATENT = {
  num_key_value_heads: 4,
  q_lora_rank: 64,
  kv_lora_rank: 32,
  qk_nope_head_dim: 32,
  qk_rope_head_dim: 16,
  v_head_dim: 32,
};

export const FAMILIES: Readonly<Record<string, Record<string, unknown>>> = {
  mixtral: { intermediate_size: 96, num_local_experts: 6, rope_theta: 1e6 },
  qwen2_moe: {
    num_experts: 6,
    moe_intermediate_size: 64,
    shared_expert_intermediate_size: 160,
    intermediate_size: 96,
    tie_word_embeddings: true,
  },
  deepseek: {
    n_routed_experts: 6,
    n_shared_experts: 2,
    first_k_dense_replace: 1,
    moe_intermediate_size: 64,
    intermediate_size: 96,
  },
  olmoe: { num_experts: 6, intermediate_size: 64, num_key_value_heads: 4 },
  qwen3_moe: {
    num_experts: 6,
    moe_intermediate_size: 64,
    intermediate_size: 96,
    head_dim: 64,
    norm_topk_prob: true,
  },
  granitemoe: {
    num_local_experts: 6,
    intermediate_size: 64,
    embedding_multiplier: 3,
    attention_multiplier: 0.12,
    residual_multiplier: 0.5,
    logits_scaling: 2,
  },
  glm4_moe: {
    n_routed_experts: 6,
    n_shared_experts: 1,
    first_k_dense_replace: 1,
    moe_intermediate_size: 64,
    intermediate_size: 96,
    head_dim: 32,
    partial_rotary_factor: 0.5,
    attention_bias: true,
    use_qk_norm: true,
    norm_topk_prob: true,
    routed_scaling_factor: 1.5,
    n_group: 1,
    topk_group: 1,
  },
  minimax_m2: { num_local_experts: 6, intermediate_size: 64, head_dim: 32, rotary_dim: 16, rope_theta: 5e6 },
  ernie4_5_moe: {
    moe_num_experts: 6,
    moe_k: 2,
    moe_num_shared_experts: 2,
    moe_intermediate_size: 64,
    moe_layer_start_index: 1,
    intermediate_size: 96,
  },
  deepseek_v2: {
    ...LATENT,
    n_routed_experts: 6,
    n_shared_experts: 2,
    first_k_dense_replace: 1,
    moe_intermediate_size: 64,
    intermediate_size: 96,
    routed_scaling_factor: 1.5,
    rope_scaling: { ...YARN, mscale: 0.707, mscale_all_dim: 0.707 },
  },
  deepseek_v3: {
    ...LATENT,
    n_routed_experts: 8,
    n_shared_experts: 1,
    first_k_dense_replace: 1,
    moe_intermediate_size: 64,
    intermediate_size: 96,
    routed_scaling_factor: 2.5,
    norm_topk_prob: true,
    n_group: 4,
    topk_group: 2,
    scoring_func: 'sigmoid',
    topk_method: 'noaux_tc',
    rope_scaling: { ...YARN, mscale: 1, mscale_all_dim: 1 },
  },
  gpt_oss: {
    num_local_experts: 6,
    intermediate_size: 64,
    head_dim: 32,
    sliding_window: 16,
    rope_theta: 150000,
    rope_scaling: YARN,
  },
  hunyuan_v1_moe: {
    num_experts: 6,
    moe_topk: 2,
    intermediate_size: 64,
    rope_scaling: { type: 'dynamic', alpha: 100, factor: 1 },
  },
};

/** GPT-2's alphabet: a letter for each byte. */
function byteLetters(): string[] {
  const plain = (b: number) => (b > 32 && b < 127) || (b > 160 && b !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(plain(b) ? b : next++));
}

/** Phi-3.5-MoE, whose experts llama.cpp weighs otherwise; its sequences are longer than the original length. */
export const PHIMOE = {
  num_local_experts: 4,
  intermediate_size: 96,
  attention_bias: true,
  lm_head_bias: true,
  rope_scaling: {
    type: 'longrope',
    short_factor: Array.from({ length: 16 }, (_, i) => 1 + 0.03 * i),
    long_factor: Array.from({ length: 16 }, (_, i) => 1 + 0.2 * i),
    short_mscale: 1.2431,
    long_mscale: 1.2431,
    original_max_position_embeddings: 16,
  },
  original_max_position_embeddings: 16,
};

export const BYTE_TOKENIZER = {
  version: '1.0',
  added_tokens: [],
  normalizer: null,
  pre_tokenizer: { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true },
  post_processor: null,
  decoder: { type: 'ByteLevel' },
  model: {
    type: 'BPE',
    byte_fallback: false,
    vocab: Object.fromEntries(byteLetters().map((letter, b) => [letter, b])),
    merges: [],
  },
};

/** Routers sharp, so that no rounding sends a token elsewhere. */
function deviation({ role, shape }: RequiredTensor): number {
  if (role === 'embedding') return 1;
  if (role === 'bias') return 0.1;
  return (role === 'router' ? 4 : 0.8) / Math.sqrt(shape.at(-1)!);
}

/** Writes a checkpoint of a family; `changes` to its config; experts may give nothing. Returns its directory. */
export async function writeFamily(
  dir: string,
  family: string,
  changes: object = {},
  experts = 1,
): Promise<string> {
  const raw = { ...COMMON, ...FAMILIES[family], model_type: family, torch_dtype: 'float32', ...changes };
  const random = seededRandom(1);
  const normal = () => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
  const tensors = new Map<string, { shape: number[]; tensor: RequiredTensor }>();
  for (const tensor of requiredTensors(describe(normaliseConfig(raw)))) {
    const name = tensor.fused?.tensor ?? tensor.name;
    tensors.set(name, { shape: tensor.fused?.shape ?? tensor.shape, tensor });
  }
  const entries = [...tensors].map(([name, { shape, tensor }]) => ({
    name,
    dtype: 'F32',
    shape,
    data: () => {
      const count = shape.reduce((a, b) => a * b, 1);
      const factor = deviation({ ...tensor, shape }) * (tensor.role === 'expert' ? experts : 1);
      const value = tensor.role === 'norm' ? () => 1 + 0.2 * normal() : () => factor * normal();
      return new Uint8Array(Float32Array.from({ length: count }, value).buffer);
    },
  }));
  mkdirSync(dir, { recursive: true });
  await writeSafetensors(join(dir, 'model.safetensors'), entries);
  await writeJson(join(dir, 'config.json'), raw);
  await writeJson(join(dir, 'tokenizer.json'), BYTE_TOKENIZER);
  await writeJson(join(dir, 'tokenizer_config.json'), {});
  return dir;
}
