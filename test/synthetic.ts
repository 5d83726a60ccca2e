/** Checkpoints of random weights, in any shape that a family's config.json can describe. Equal arguments give equal bytes. */
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { describe as describeModel } from '../lib/architecture';
import { requiredTensors, type RequiredTensor } from '../lib/architecture/tensors';
import { normaliseConfig } from '../lib/checkpoint/config';
import { writeJson } from '../lib/checkpoint/files';
import { writeSafetensors, type TensorEntry } from '../lib/checkpoint/safetensors';
import { seededRandom } from '../lib/model/random';

/** A small qwen2_moe: 2 layers, 8 experts of which 2 are chosen, a shared expert. */
export const TINY_CONFIG = {
  model_type: 'qwen2_moe',
  torch_dtype: 'bfloat16',
  vocab_size: 96,
  hidden_size: 64,
  num_hidden_layers: 2,
  num_attention_heads: 2,
  num_key_value_heads: 2,
  num_experts: 8,
  num_experts_per_tok: 2,
  moe_intermediate_size: 32,
  shared_expert_intermediate_size: 64,
  intermediate_size: 64,
  norm_topk_prob: false,
  max_position_embeddings: 256,
  rms_norm_eps: 1e-6,
  rope_theta: 10000,
  tie_word_embeddings: false,
  hidden_act: 'silu',
};

/** The bits of the bf16 number nearest to zero's side of x. */
export function bf16(x: number): number {
  return new Uint32Array(Float32Array.of(x).buffer)[0]! >>> 16;
}

const ONE = bf16(1);

/** Normally distributed bf16 numbers of standard deviation 0.05: all tensors are cut from this ring, each from a place of its own. */
function randomRing(size: number, seed: number): Uint16Array {
  const random = seededRandom(seed);
  const ring = new Uint16Array(size);
  for (let i = 0; i < size; i += 2) {
    const radius = 0.05 * Math.sqrt(-2 * Math.log(1 - random()));
    const angle = 2 * Math.PI * random();
    ring[i] = bf16(radius * Math.cos(angle));
    ring[i + 1] = bf16(radius * Math.sin(angle));
  }
  return ring;
}

function fill(tensor: RequiredTensor, place: number, ring: Uint16Array): Uint16Array {
  const values = new Uint16Array(tensor.shape.reduce((a, b) => a * b, 1));
  if (tensor.role === 'norm') return values.fill(ONE);
  for (let at = 0; at < values.length;) {
    const from = (place * 104_729 + at) % ring.length;
    const piece = ring.subarray(from, from + values.length - at);
    values.set(piece, at);
    at += piece.length;
  }
  return values;
}

export interface SyntheticOptions {
  seed?: number;
  /** Random numbers to draw; larger tensors repeat them. Default 2^16. */
  ring?: number;
  /** Changes a tensor's bf16 numbers in place before they are written. */
  edit?: (tensor: RequiredTensor, values: Uint16Array) => void;
  /** How a tensor is stored, if not as it is: gives the entries of the file. */
  store?: (tensor: RequiredTensor, values: Uint16Array) => TensorEntry[] | undefined;
}

/** Writes config.json, an index, and one shard a layer. Holds one tensor at a time. */
export async function writeSynthetic(
  dir: string,
  config: Record<string, unknown>,
  { seed = 0, ring: size = 2 ** 16, edit, store }: SyntheticOptions = {},
): Promise<void> {
  mkdirSync(dir, { recursive: true });
  const tensors = requiredTensors(describeModel(normaliseConfig(config)));
  const places = new Map(tensors.map((tensor, i) => [tensor, i + 1]));
  const layers = [...new Set(tensors.map((t) => t.layer))];
  const ring = randomRing(size, seed);
  const map: Record<string, string> = {};
  for (const [i, layer] of layers.entries()) {
    const number = (n: number) => String(n).padStart(5, '0');
    const file = `model-${number(i + 1)}-of-${number(layers.length)}.safetensors`;
    const entries = tensors
      .filter((t) => t.layer === layer)
      .flatMap((tensor): TensorEntry[] => {
        const values = () => {
          const numbers = fill(tensor, places.get(tensor)!, ring);
          edit?.(tensor, numbers);
          return numbers;
        };
        const data = () => new Uint8Array(values().buffer);
        const plain = { name: tensor.name, dtype: 'BF16', shape: tensor.shape, data };
        return (store && store(tensor, values())) ?? [plain];
      });
    const { names } = await writeSafetensors(join(dir, file), entries);
    for (const name of names) map[name] = file;
  }
  await writeJson(join(dir, 'model.safetensors.index.json'), { metadata: {}, weight_map: map });
  await writeJson(join(dir, 'config.json'), config);
}
