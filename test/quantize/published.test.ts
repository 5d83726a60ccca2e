/** Models as published, in FP8, MXFP4 or with fused experts: the same as plainer twins, from loading to the last quantized byte. */
import { cpSync, readdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { openSafetensors } from '../../lib/checkpoint/safetensors';
import { MoeModel } from '../../lib/model/model';
import { quantizeCheckpoint } from '../../lib/quantize';
import { inspectModel } from '../../lib/quantize/inspect';
import type { QuantizeOptions } from '../../lib/quantize/options';
import { expectRejection, readJson, scratch } from '../checkpoint/helpers';
import {
  bf16Bytes,
  decodeFp8,
  decodeMxfp4,
  encodeFp8,
  encodeMxfp4,
  fp8Entries,
  fromBf16,
  fuseExperts,
  type Size,
} from '../formats';
import { writeSynthetic, type SyntheticOptions } from '../synthetic';
import { hashes, randomIds } from './helpers';

const root = scratch();
const BLOCK: Size = [128, 128];
const COMMON = {
  torch_dtype: 'bfloat16',
  vocab_size: 96,
  num_hidden_layers: 2,
  num_attention_heads: 6,
  num_key_value_heads: 2,
  head_dim: 32,
  max_position_embeddings: 256,
  rms_norm_eps: 1e-5,
  rope_theta: 10000,
  sliding_window: null,
  tie_word_embeddings: false,
  hidden_act: 'silu',
};
/** Sizes of which none is a multiple of 128. */
const MIXTRAL = {
  ...COMMON,
  model_type: 'mixtral',
  hidden_size: 192,
  intermediate_size: 160,
  num_local_experts: 4,
  num_experts_per_tok: 2,
};
const DEEPSEEK = {
  ...COMMON,
  model_type: 'deepseek_v3',
  hidden_size: 96,
  num_key_value_heads: 6,
  q_lora_rank: 96,
  kv_lora_rank: 64,
  qk_nope_head_dim: 32,
  qk_rope_head_dim: 16,
  v_head_dim: 32,
  intermediate_size: 192,
  moe_intermediate_size: 64,
  n_routed_experts: 8,
  n_shared_experts: 1,
  num_experts_per_tok: 2,
  n_group: 4,
  topk_group: 2,
  first_k_dense_replace: 1,
  norm_topk_prob: true,
  routed_scaling_factor: 2.5,
};
const GPT_OSS = {
  ...COMMON,
  model_type: 'gpt_oss',
  hidden_size: 96,
  intermediate_size: 64,
  num_local_experts: 4,
  num_experts_per_tok: 2,
  sliding_window: 16,
};
const GRANITE = {
  ...COMMON,
  model_type: 'granitemoe',
  hidden_size: 96,
  intermediate_size: 64,
  num_local_experts: 4,
  num_experts_per_tok: 2,
  residual_multiplier: 0.5,
};
const FP8_CONFIG = {
  activation_scheme: 'dynamic',
  fmt: 'e4m3',
  quant_method: 'fp8',
  weight_block_size: BLOCK,
  modules_to_not_convert: ['lm_head'],
};

type Model = { config: Record<string, unknown> } & SyntheticOptions;

/** Numbers of a tensor replaced by what is left of them. */
const becomes =
  (change: (numbers: Float32Array, size: Size) => Float32Array): SyntheticOptions['edit'] =>
  (tensor, values) => {
    if (!tensor.projection) return;
    const changed = bf16Bytes(change(fromBf16(values), tensor.shape as Size));
    values.set(new Uint16Array(changed.buffer));
  };

const fp8: Pick<Model, 'store'> = {
  store: ({ name, shape, projection }, values) =>
    projection && fp8Entries(name, fromBf16(values), shape as Size, BLOCK),
};
const likeFp8 = {
  edit: becomes((numbers, size) => {
    const { codes, scales } = encodeFp8(numbers, size, BLOCK);
    return decodeFp8(codes, scales, size, BLOCK);
  }),
};
const expertsLikeMxfp4: Pick<Model, 'edit'> = {
  edit: (tensor, values) => {
    if (tensor.role !== 'expert') return;
    const round = becomes((numbers) => {
      const { blocks, scales } = encodeMxfp4(numbers);
      return decodeMxfp4(blocks, scales);
    });
    round!(tensor, values);
  },
};

/** Each as it is published, and a twin that holds the same numbers as plainer bf16. */
const MODELS: Record<string, { dtype: string; published: () => Model; twin: () => Model }> = {
  'mixtral in FP8': {
    dtype: 'fp8',
    published: () => ({ config: { ...MIXTRAL, quantization_config: FP8_CONFIG }, ...fp8 }),
    twin: () => ({ config: MIXTRAL, ...likeFp8 }),
  },
  'deepseek_v3 in FP8': {
    dtype: 'fp8',
    published: () => ({ config: { ...DEEPSEEK, quantization_config: FP8_CONFIG }, ...fp8 }),
    twin: () => ({ config: DEEPSEEK, ...likeFp8 }),
  },
  'gpt_oss in MXFP4': {
    dtype: 'mxfp4',
    published: () => ({
      config: { ...GPT_OSS, quantization_config: { quant_method: 'mxfp4', modules_to_not_convert: [] } },
      store: fuseExperts('mxfp4'),
    }),
    twin: () => ({ config: GPT_OSS, store: fuseExperts('bf16'), ...expertsLikeMxfp4 }),
  },
  'granitemoe with its experts in two tensors a layer': {
    dtype: 'bfloat16',
    published: () => ({ config: GRANITE, store: fuseExperts('bf16') }),
    twin: () => ({ config: GRANITE }),
  },
};

/** A whole matrix of each kind stays at 16 bit. */
const OPTIONS: Omit<QuantizeOptions, 'output'> = {
  bits: ({ role, expert, projection }) =>
    projection === 'o' || (role === 'expert' && expert === 1 && projection !== 'up') ? 16 : 3,
  calibration: randomIds(COMMON.vocab_size),
};

/** All but the report, which holds the source's name and fingerprint. */
function written(dir: string): Record<string, string> {
  const { 'eac_moe.json': _report, ...rest } = hashes(dir);
  return rest;
}

describe.each(Object.entries(MODELS))('%s and its twin', (title, { dtype, ...models }) => {
  const published = join(root, title);
  const twin = join(root, `${title}-twin`);

  beforeAll(async () => {
    for (const [dir, make] of [
      [published, models.published],
      [twin, models.twin],
    ] as const) {
      const { config, ...options } = make();
      await writeSynthetic(dir, config, options);
    }
  });

  test('give the same logits and routing, bit for bit', async () => {
    const [a, b] = [await MoeModel.load(published), await MoeModel.load(twin)];
    const [ids] = randomIds(COMMON.vocab_size, 1, 40) as [Int32Array];
    const [found, expected] = [
      await a.forward(ids, { routing: true }),
      await b.forward(ids, { routing: true }),
    ];
    expect(new Set(found.logits).size).toBeGreaterThan(1000);
    expect(found).toEqual(expected);
    a.dispose();
    b.dispose();
  });

  test('have the same parameters; `inspect` names the format', async () => {
    const [found, expected] = [await inspectModel(published), await inspectModel(twin)];
    expect([found.dtype, expected.dtype]).toEqual([dtype, 'bfloat16']);
    expect(found.quantization).toBeUndefined();
    for (const key of ['parameters', 'activeParameters', 'sizes'] as const)
      expect(found[key]).toEqual(expected[key]);
  });

  test('become the same quantized checkpoint, byte for byte', async () => {
    const [a, b] = [`${published}-3bit`, `${twin}-3bit`];
    await quantizeCheckpoint(published, { ...OPTIONS, output: a });
    await quantizeCheckpoint(twin, { ...OPTIONS, output: b });
    expect(written(a)).toEqual(written(b));
    expect(readJson(join(a, 'config.json')).quantization_config).toMatchObject({ quant_method: 'gptq' });
    const index = readJson(join(a, 'model.safetensors.index.json')).weight_map as Record<string, string>;
    const names = Object.keys(index);
    expect(names.filter((name) => /scale_inv|_blocks|_scales|proj$|linear/.test(name))).toEqual([]);
    const left = names.find((name) => /1\..*experts\.1\.(down_proj|w2)\.weight$/.test(name))!;
    const shard = openSafetensors(join(a, index[left]!));
    expect(shard.info(left)).toMatchObject({ dtype: 'BF16' });
    shard.dispose();
    expect((await inspectModel(a)).dtype).toBe('bfloat16');
    const model = await MoeModel.load(a);
    expect((await model.forward([1, 2, 3])).logits.every(Number.isFinite)).toBe(true);
    model.dispose();
  });

  test('are quantized layer by layer: given calibration, the whole model is never loaded', async () => {
    const load = jest.spyOn(MoeModel, 'load');
    await quantizeCheckpoint(published, { ...OPTIONS, output: `${published}-unloaded` });
    expect(load).not.toHaveBeenCalled();
    load.mockRestore();
  });

  test.each([
    ['round to nearest', { method: 'rtn', router: false }],
    ['gptq', {}],
  ] as const)('a killed run continues (%s)', async (method, extra) => {
    const [whole, killed] = [`${published}-${method}`, `${published}-killed-${method}`];
    const options = { ...OPTIONS, ...extra };
    await quantizeCheckpoint(published, { ...options, output: whole });
    await expectRejection(startOnly(published, killed, options), 'ABORTED');
    expect(readdirSync(killed)).toContain('model-00002-of-00003.safetensors');
    await quantizeCheckpoint(published, { ...options, output: killed });
    expect(hashes(killed)).toEqual(hashes(whole));
  });
});

/** A run that is aborted in its second layer. */
async function startOnly(source: string, output: string, options: Omit<QuantizeOptions, 'output'>) {
  const { signal, abort } = stoppable();
  const onProgress: QuantizeOptions['onProgress'] = ({ layer }) => layer === 1 && abort();
  return quantizeCheckpoint(source, { ...options, output, signal, onProgress });
}

function stoppable(): { signal: AbortSignal; abort: () => void } {
  const controller = new AbortController();
  return { signal: controller.signal, abort: () => controller.abort() };
}

const published = join(root, 'mixtral in FP8');
const EXPERT = 'model.layers.1.block_sparse_moe.experts.2.w2.weight';

/** A copy of the FP8 model in which the shard that holds `name` is changed. */
function changed(title: string, name: string, change: (shard: Buffer) => void): string {
  const dir = join(root, title);
  cpSync(published, dir, { recursive: true });
  const index = readJson(join(dir, 'model.safetensors.index.json')).weight_map as Record<string, string>;
  const path = join(dir, index[name]!);
  const bytes = readFileSync(path);
  change(bytes);
  writeFileSync(path, bytes);
  return dir;
}

/** The bytes of a tensor within its file. */
function bytesOf(shard: Buffer, name: string): Buffer {
  const length = Number(shard.readBigUInt64LE());
  const header = JSON.parse(shard.toString('utf8', 8, 8 + length)) as Record<string, { data_offsets: Size }>;
  const [begin, end] = header[name]!.data_offsets;
  return shard.subarray(8 + length + begin, 8 + length + end);
}

test('another scale is another source', async () => {
  const output = join(root, 'unfinished');
  await expectRejection(startOnly(published, output, OPTIONS), 'ABORTED');
  const scale = `${EXPERT}_scale_inv`;
  const other = changed('other-scale', scale, (shard) => bytesOf(shard, scale).writeFloatLE(0.01, 4));
  await expectRejection(quantizeCheckpoint(other, { ...OPTIONS, output }), 'OUTPUT', 'another source');
});

describe('a broken model says what is broken', () => {
  const quantize = (dir: string) => quantizeCheckpoint(dir, { ...OPTIONS, output: `${dir}-out` });

  test('NaN codes and scales', async () => {
    const nan = changed('nan', EXPERT, (shard) => (bytesOf(shard, EXPERT)[3 * 160 + 7] = 0xff));
    for (const run of [MoeModel.load(nan), quantize(nan)])
      await expectRejection(run, 'NON_FINITE', `'${EXPERT}'`, 'code at [3, 7] is NaN');
    const scale = `${EXPERT}_scale_inv`;
    const infinite = changed('infinite', scale, (shard) => bytesOf(shard, scale).writeFloatLE(Infinity, 8));
    await expectRejection(quantize(infinite), 'NON_FINITE', `'${EXPERT}'`, 'scale at [1, 0]');
    // Finite, and yet the weights are not.
    const huge = changed('huge', scale, (shard) => bytesOf(shard, scale).writeFloatLE(3e38, 0));
    await expectRejection(quantize(huge), 'NON_FINITE', `'${EXPERT}'`, 'NaN or infinity at [0, ');
  });

  test('an expert under another name, an expert without scales', async () => {
    for (const [title, name] of [
      ['renamed', EXPERT],
      ['unscaled', `${EXPERT}_scale_inv`],
    ] as const) {
      const other = name.replace('experts.2', 'experts.9');
      const dir = changed(title, name, (shard) => {
        shard.write(shard.toString('latin1').replace(`"${name}"`, `"${other}"`), 'latin1');
      });
      const index = join(dir, 'model.safetensors.index.json');
      writeFileSync(`${index}.new`, readFileSync(index, 'utf8').replace(`"${name}"`, `"${other}"`));
      renameSync(`${index}.new`, index);
      const missing = `'${name}' (layer 1, expert 2) is missing`;
      await expectRejection(inspectModel(dir), 'INVALID_TENSOR', missing);
      await expectRejection(MoeModel.load(dir), 'INVALID_TENSOR', missing);
      await expectRejection(quantize(dir), 'INVALID_TENSOR', missing);
    }
  });
});
