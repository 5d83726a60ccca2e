/**
 * What llama.cpp calls the families, and what it takes for granted of each. Tensors and most metadata follow from the architecture
 * (tensors.ts, metadata.ts), so that a family is an entry here.
 *
 * Source   llama.cpp: conversion/*.py, src/models/*.cpp, llama_model_rope_type
 */
import type { ModelConfig } from '../../checkpoint/config';
import type { Architecture, MoeSpec } from '../../architecture';
import type { Activation } from '../../../types/native';
import type { GgufValue } from './writer';

export interface GgufFamily {
  /** `general.architecture`. */
  arch: string;
  /** Rotary pairs are neighbours; else channel i and i + dim / 2. */
  neighbours?: boolean;
  /** Chosen weights are divided by their sum: always, never, or as metadata says. */
  renormalize: boolean | 'metadata';
  /** `expert_gating_func` and corrections of scores are read. */
  scores?: boolean;
  /** As many key heads as query heads. */
  equalHeads?: boolean;
  /** Has layers without experts, all before the others. */
  leadingDense?: boolean;
  /** Default silu. */
  activation?: Activation;
  /** Biases in the router, sinks, a window in every other layer beginning with the first. */
  gptOss?: boolean;
  /** Latent attention; experts in groups that are worth their best two. */
  latent?: boolean;
  /** Rotary embeddings by yarn. */
  yarn?: boolean;
  /** llama.cpp's name of the norm before the feed-forward. */
  ffnNorm?: string;
  /** The embedding is the head where the file has none; else it is written twice when tied. */
  tiedHead?: boolean;
  /** What only this family has. */
  metadata?: (config: ModelConfig, architecture: Architecture) => Record<string, GgufValue>;
  /** Differences between llama.cpp's model and the published one, for the docs and the report. */
  note?: string;
}

const moeLayer = (a: Architecture): MoeSpec =>
  a.layers.map((l) => l.feedForward).find((f) => f.kind === 'moe')!;

const leadingDense = (a: Architecture): number => a.layers.findIndex((l) => l.feedForward.kind === 'moe');

/** Shared experts count as so many of the routed ones' width. */
function sharedCount(a: Architecture): number {
  const { shared, experts } = moeLayer(a);
  return shared ? shared.up.out / experts[0]!.up.out : 0;
}

const deepseek2: GgufFamily = {
  arch: 'deepseek2',
  neighbours: true,
  renormalize: 'metadata',
  scores: true,
  tiedHead: true,
  latent: true,
  yarn: true,
  leadingDense: true,
  metadata: (config, a) => {
    const { groups, scale } = moeLayer(a).router;
    const all = config.rope.type === 'yarn' ? config.rope.fields.nonNegativeNumber('mscale_all_dim', 0) : 0;
    return {
      leading_dense_block_count: leadingDense(a),
      expert_shared_count: sharedCount(a),
      expert_weights_scale: { f32: scale },
      ...(groups && { expert_group_count: groups.count, expert_group_used_count: groups.top }),
      ...(all > 0 && { 'rope.scaling.yarn_log_multiplier': { f32: 0.1 * all } }),
    };
  },
};

export const GGUF_FAMILIES: ReadonlyMap<string, GgufFamily> = new Map<string, GgufFamily>([
  ['mixtral', { arch: 'llama', neighbours: true, renormalize: true, tiedHead: true }],
  ['qwen2_moe', { arch: 'qwen2moe', renormalize: false }],
  [
    'phimoe',
    {
      arch: 'phimoe',
      renormalize: true,
      note: 'llama.cpp normalises Phi-3.5-MoE by the root mean square, not by mean and variance, and routes by a softmax over all experts, not by the sparse mixer: its results differ from those of the original model',
    },
  ],
  [
    'deepseek',
    {
      arch: 'deepseek',
      neighbours: true,
      renormalize: false,
      leadingDense: true,
      metadata: (_, a) => ({
        leading_dense_block_count: leadingDense(a),
        expert_shared_count: sharedCount(a),
        expert_weights_scale: { f32: 1 },
      }),
    },
  ],
  ['olmoe', { arch: 'olmoe', renormalize: false, equalHeads: true }],
  ['qwen3_moe', { arch: 'qwen3moe', renormalize: true }],
  [
    'granitemoe',
    {
      arch: 'granitemoe',
      neighbours: true,
      renormalize: true,
      metadata: (_, a) => ({
        embedding_scale: { f32: a.embedding.scale },
        residual_scale: { f32: a.layers[0]!.residualScale ?? 1 },
        logit_scale: { f32: 1 / (a.logitScale ?? 1) },
        'attention.scale': { f32: a.layers[0]!.attention.scale },
      }),
    },
  ],
  [
    'glm4_moe',
    {
      arch: 'glm4moe',
      renormalize: 'metadata',
      scores: true,
      ffnNorm: 'post_attention_norm',
      leadingDense: true,
      metadata: (_, a) => ({
        leading_dense_block_count: leadingDense(a),
        expert_shared_count: sharedCount(a),
        expert_weights_scale: { f32: moeLayer(a).router.scale },
      }),
    },
  ],
  ['minimax_m2', { arch: 'minimax-m2', renormalize: true, scores: true }],
  [
    'ernie4_5_moe',
    {
      arch: 'ernie4_5-moe',
      neighbours: true,
      renormalize: true,
      scores: true,
      leadingDense: true,
      metadata: (config, a) => ({
        interleave_moe_layer_step: config.positiveInteger('moe_layer_interval', 1),
        leading_dense_block_count: leadingDense(a),
        expert_shared_count: sharedCount(a),
      }),
    },
  ],
  ['deepseek_v2', deepseek2],
  ['deepseek_v3', deepseek2],
  [
    'gpt_oss',
    {
      arch: 'gpt-oss',
      renormalize: true,
      activation: 'clamped-swiglu',
      gptOss: true,
      yarn: true,
      ffnNorm: 'post_attention_norm',
    },
  ],
  ['hunyuan_v1_moe', { arch: 'hunyuan-moe', renormalize: true }],
]);
