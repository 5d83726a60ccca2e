/**
 * The same random model twice: as a checkpoint of ours and as a GGUF file. Equal shapes, and equal embeddings and routers, so that both
 * programs send the same tokens to the same experts. Weights are random bits, scaled so that the residual stream stays near the
 * embedding: tokens stay apart and routing stays close to uniform.
 */
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { describe } from '../../lib/architecture';
import { requiredTensors, type RequiredTensor } from '../../lib/architecture/tensors';
import type { LayerShape } from '../../lib/bench/shapes';
import { normaliseConfig } from '../../lib/checkpoint/config';
import { writeJson } from '../../lib/checkpoint/files';
import {
  moduleOf,
  quantizationConfig,
  quantizedTensors,
  type ModuleQuantization,
} from '../../lib/checkpoint/quantized';
import { writeSafetensors, type TensorEntry } from '../../lib/checkpoint/safetensors';
import { seededRandom } from '../../lib/model/random';
import { makePlan, planModules } from '../../lib/quantize/plan';
import {
  f16,
  GGML_TYPES,
  RandomBlocks,
  writeGguf,
  type GgmlTypeName,
  type GgufTensor,
  type GgufValue,
} from './gguf';

/** The peer's type nearest to a bit width. */
export const PEER_TYPES: Readonly<Record<number, GgmlTypeName>> = { 4: 'Q4_0', 3: 'Q3_K', 2: 'Q2_K' };

/** What both writers need to know of a model, in config.json's words. */
export interface ModelConfig extends Record<string, unknown> {
  model_type: 'mixtral' | 'qwen2_moe';
  vocab_size: number;
  hidden_size: number;
  num_hidden_layers: number;
  num_attention_heads: number;
  head_dim: number;
  num_experts_per_tok: number;
  intermediate_size: number;
  max_position_embeddings: number;
  rms_norm_eps: number;
  rope_theta: number;
  /** mixtral; the experts' width is intermediate_size */
  num_local_experts?: number;
  /** qwen2_moe */
  num_experts?: number;
  moe_intermediate_size?: number;
  shared_expert_intermediate_size?: number;
}

const COMMON = { torch_dtype: 'bfloat16', hidden_act: 'silu', rms_norm_eps: 1e-5, rope_theta: 1e6 };

/**
 * A model that is hardly more than its MoE layers: one attention head of 64 channels, 512 tokens in the vocabulary, head tied to the
 * embedding. Mixtral's architecture, which leaves hidden size, expert width, number of experts and top-k free.
 */
export function layerConfig(shape: LayerShape, layers: number): ModelConfig {
  return {
    ...COMMON,
    model_type: 'mixtral',
    vocab_size: 512,
    hidden_size: shape.hidden,
    num_hidden_layers: layers,
    num_attention_heads: 1,
    num_key_value_heads: 1,
    head_dim: 64,
    num_local_experts: shape.experts,
    num_experts_per_tok: shape.topK,
    intermediate_size: shape.width,
    max_position_embeddings: 1024,
    tie_word_embeddings: true,
  };
}

/** Qwen1.5-MoE-A2.7B cut to `layers`, with a vocabulary of 32,000 in place of 151,936 so that the head does not hide the layers. */
export function wholeConfig(layers = 2): ModelConfig {
  return {
    ...COMMON,
    model_type: 'qwen2_moe',
    vocab_size: 32_000,
    hidden_size: 2048,
    num_hidden_layers: layers,
    num_attention_heads: 16,
    num_key_value_heads: 16,
    head_dim: 128,
    num_experts: 60,
    num_experts_per_tok: 4,
    moe_intermediate_size: 1408,
    shared_expert_intermediate_size: 5632,
    intermediate_size: 5632,
    norm_topk_prob: false,
    max_position_embeddings: 1024,
    tie_word_embeddings: false,
  };
}

/** Prime, so that rows cut from it differ. */
const RING = 1_000_003;
let ring: Float32Array | undefined;

/** Uniform numbers of standard deviation 1 that bf16 holds exactly. */
function uniformRing(): Float32Array {
  if (ring) return ring;
  const random = seededRandom(1);
  const bits = Uint32Array.from({ length: RING }, () => {
    const x = (2 * random() - 1) * Math.sqrt(3);
    return new Uint32Array(Float32Array.of(x).buffer)[0]! & 0xffff0000;
  });
  return (ring = new Float32Array(bits.buffer));
}

type Role = 'norm' | 'embedding' | 'head' | 'router' | 'other';

/** Powers of two keep bf16 numbers exact. */
function deviation(role: Role, inputs: number): number {
  if (role === 'embedding') return 1;
  return 2 ** Math.round(Math.log2((role === 'router' ? 2 : 0.5) / Math.sqrt(inputs)));
}

/** Number `place` of the model's dense tensors; equal on both sides for embedding (0) and routers (1 + layer). */
function denseValues(role: Role, place: number, count: number, inputs: number): Float32Array {
  if (role === 'norm') return new Float32Array(count).fill(1);
  const numbers = uniformRing();
  const factor = deviation(role, inputs);
  const values = new Float32Array(count);
  for (let i = 0, at = (place * 50_021) % RING; i < count; i++, at = at + 1 === RING ? 0 : at + 1)
    values[i] = numbers[at]! * factor;
  return values;
}

// ---- ours

function bf16Bytes(values: Float32Array): Uint8Array {
  const words = new Uint16Array(values.buffer);
  const bits = new Uint16Array(values.length);
  for (let i = 0; i < bits.length; i++) bits[i] = words[2 * i + 1]!;
  return new Uint8Array(bits.buffer);
}

function denseEntry(tensor: RequiredTensor): TensorEntry {
  const { name, shape, role, layer } = tensor;
  const known: Role =
    role === 'norm' || role === 'embedding' || role === 'head' || role === 'router' ? role : 'other';
  const place = role === 'embedding' ? 0 : role === 'router' ? 1 + layer! : 1009 + name.length;
  const data = () =>
    bf16Bytes(
      denseValues(
        known,
        place,
        shape.reduce((a, b) => a * b, 1),
        shape.at(-1)!,
      ),
    );
  return { name, dtype: 'BF16', shape, data };
}

/** Random codes and zero points under one scale. */
function quantizedEntry(
  words: Uint32Array,
  place: number,
  q: ModuleQuantization,
  tensor: RequiredTensor,
): TensorEntry[] {
  const [out, inputs] = tensor.shape as [number, number];
  const levels = 2 ** q.bits;
  // Codes and zero points both vary over the levels.
  const scale = f16(0.5 / Math.sqrt(inputs) / Math.sqrt((levels ** 2 - 1) / 6));
  return quantizedTensors(moduleOf(tensor.name), q, out, inputs)
    .filter((t) => !t.optional)
    .map(({ name, dtype, shape }) => ({
      name,
      dtype,
      shape,
      data: () => {
        const count = shape.reduce((a, b) => a * b, 1);
        if (dtype === 'F16') return new Uint8Array(new Uint16Array(count).fill(scale).buffer);
        const values = new Uint32Array(count);
        for (let at = 0, from = (place * 10_007) % RING; at < count; from = 0) {
          const piece = words.subarray(from, from + count - at);
          values.set(piece, at);
          at += piece.length;
        }
        return new Uint8Array(values.buffer);
      },
    }));
}

/** Writes a checkpoint: experts at `bits`, everything else as `quantize` does by default. */
export async function writeCheckpoint(dir: string, config: ModelConfig, bits: 2 | 3 | 4): Promise<void> {
  const architecture = describe(normaliseConfig(config));
  const plan = makePlan(architecture, { bits });
  const random = seededRandom(2);
  const words = Uint32Array.from({ length: RING }, () => random() * 2 ** 32);
  const entries = requiredTensors(architecture).flatMap((tensor, place) => {
    const q = plan.get(tensor.name);
    return q ? quantizedEntry(words, place, q, tensor) : [denseEntry(tensor)];
  });
  await mkdir(dir, { recursive: true });
  await writeSafetensors(join(dir, 'model.safetensors'), entries);
  const quantization = quantizationConfig(planModules(architecture, plan), 'bench:peers');
  await writeJson(join(dir, 'config.json'), { ...config, quantization_config: quantization });
}

// ---- the peer's

export interface PeerModel {
  metadata: Record<string, GgufValue>;
  tensors: GgufTensor[];
}

function metadata(config: ModelConfig): Record<string, GgufValue> {
  const arch = config.model_type === 'mixtral' ? 'llama' : 'qwen2moe';
  const own: Record<string, GgufValue> = {
    context_length: config.max_position_embeddings,
    embedding_length: config.hidden_size,
    block_count: config.num_hidden_layers,
    feed_forward_length: config.intermediate_size,
    'attention.head_count': config.num_attention_heads,
    'attention.head_count_kv': config.num_attention_heads,
    'attention.key_length': config.head_dim,
    'attention.value_length': config.head_dim,
    'attention.layer_norm_rms_epsilon': config.rms_norm_eps,
    'rope.dimension_count': config.head_dim,
    'rope.freq_base': { f32: config.rope_theta },
    expert_count: config.num_local_experts ?? config.num_experts!,
    expert_used_count: config.num_experts_per_tok,
    vocab_size: config.vocab_size,
  };
  if (arch === 'qwen2moe') {
    own.expert_feed_forward_length = config.moe_intermediate_size!;
    own.expert_shared_feed_forward_length = config.shared_expert_intermediate_size!;
  }
  return {
    'general.architecture': arch,
    'general.name': 'random weights',
    ...Object.fromEntries(Object.entries(own).map(([key, value]) => [`${arch}.${key}`, value])),
    // Nothing is ever tokenized, but llama.cpp looks for the line feed's token.
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.tokens': Array.from({ length: config.vocab_size }, (_, id) => `<0x${hex(id)}>`),
  };
}

const hex = (id: number) => id.toString(16).toUpperCase().padStart(2, '0');

/** As llama-quantize does: rows that are not whole super-blocks of 256 take IQ4_NL. */
export function typeFor(type: GgmlTypeName, inputs: number): GgmlTypeName {
  return inputs % GGML_TYPES[type].values === 0 ? type : 'IQ4_NL';
}

class PeerTensors {
  readonly list: GgufTensor[] = [];
  readonly #blocks = new RandomBlocks(3);
  readonly #type: GgmlTypeName;

  constructor(type: GgmlTypeName) {
    this.#type = type;
  }

  dense(name: string, role: Role, place: number, shape: number[]): void {
    const data = () => [
      new Uint8Array(
        denseValues(
          role,
          place,
          shape.reduce((a, b) => a * b, 1),
          shape[0]!,
        ).buffer,
      ),
    ];
    this.list.push({ name, type: 'F32', shape, data });
  }

  /** `shape`: [in, out], or [in, out, experts]. */
  matrix(name: string, shape: number[], type: GgmlTypeName = typeFor(this.#type, shape[0]!)): void {
    this.list.push({ name, type, shape, data: this.#blocks.tensor(type, shape, 0.5 / Math.sqrt(shape[0]!)) });
  }

  glu(suffix: string, hidden: number, width: number, experts: number[]): void {
    this.matrix(`ffn_gate${suffix}`, [hidden, width, ...experts]);
    this.matrix(`ffn_up${suffix}`, [hidden, width, ...experts]);
    this.matrix(`ffn_down${suffix}`, [width, hidden, ...experts]);
  }
}

function pushLayer(t: PeerTensors, config: ModelConfig, layer: number): void {
  const { hidden_size: hidden, num_attention_heads: heads, head_dim: headDim } = config;
  const qwen = config.model_type === 'qwen2_moe';
  const experts = config.num_local_experts ?? config.num_experts!;
  const from = t.list.length;
  t.dense('attn_norm.weight', 'norm', 0, [hidden]);
  for (const name of ['attn_q', 'attn_k', 'attn_v']) {
    t.matrix(`${name}.weight`, [hidden, heads * headDim]);
    if (qwen) t.dense(`${name}.bias`, 'other', 2003 + layer, [heads * headDim]);
  }
  t.matrix('attn_output.weight', [heads * headDim, hidden]);
  t.dense('ffn_norm.weight', 'norm', 0, [hidden]);
  t.dense('ffn_gate_inp.weight', 'router', 1 + layer, [hidden, experts]);
  t.glu('_exps.weight', hidden, qwen ? config.moe_intermediate_size! : config.intermediate_size, [experts]);
  if (qwen) {
    t.dense('ffn_gate_inp_shexp.weight', 'other', 3001 + layer, [hidden]);
    t.glu('_shexp.weight', hidden, config.shared_expert_intermediate_size!, []);
  }
  for (const tensor of t.list.slice(from)) tensor.name = `blk.${layer}.${tensor.name}`;
}

/**
 * The GGUF of a model, every matrix of one type. Mixtral: embedding and tied head f32, equal to ours. Qwen2-MoE: embedding of that type,
 * head `headType`.
 */
export function peerModel(
  config: ModelConfig,
  type: GgmlTypeName,
  headType: GgmlTypeName = 'Q6_K',
): PeerModel {
  const { hidden_size: hidden, vocab_size: vocab } = config;
  const t = new PeerTensors(type);
  if (config.model_type === 'mixtral') t.dense('token_embd.weight', 'embedding', 0, [hidden, vocab]);
  else {
    t.matrix('token_embd.weight', [hidden, vocab]);
    t.matrix('output.weight', [hidden, vocab], headType);
  }
  for (let layer = 0; layer < config.num_hidden_layers; layer++) pushLayer(t, config, layer);
  t.dense('output_norm.weight', 'norm', 0, [hidden]);
  return { metadata: metadata(config), tensors: t.list };
}

export async function writePeerModel(path: string, model: PeerModel): Promise<number> {
  return writeGguf(path, model.metadata, model.tensors);
}
