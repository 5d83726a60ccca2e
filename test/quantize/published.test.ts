/** Models published in FP8: the same as their bf16 twins, from loading to the last byte of the quantized checkpoint. */
import { cpSync, readdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { RequiredTensor } from '../../lib/architecture/tensors';
import { openSafetensors } from '../../lib/checkpoint/safetensors';
import { MoeModel } from '../../lib/model/model';
import { quantizeCheckpoint } from '../../lib/quantize';
import { inspectModel } from '../../lib/quantize/inspect';
import type { QuantizeOptions } from '../../lib/quantize/options';
import { expectError, expectRejection, readJson, scratch } from '../checkpoint/helpers';
import { bf16Bytes, decodeFp8, encodeFp8, fp8Entries, fromBf16, type Size } from '../formats';
import { writeSynthetic } from '../synthetic';
import { hashes, randomIds } from './helpers';

const root = scratch();
const BLOCK: Size = [128, 128];
/** Sizes of which none is a multiple of 128. */
const CONFIG = {
  model_type: 'mixtral',
  torch_dtype: 'bfloat16',
  vocab_size: 96,
  hidden_size: 192,
  intermediate_size: 160,
  num_hidden_layers: 2,
  num_attention_heads: 6,
  num_key_value_heads: 2,
  head_dim: 32,
  num_local_experts: 4,
  num_experts_per_tok: 2,
  max_position_embeddings: 256,
  rms_norm_eps: 1e-5,
  rope_theta: 10000,
  sliding_window: null,
  tie_word_embeddings: false,
  hidden_act: 'silu',
};
const FP8 = {
  ...CONFIG,
  quantization_config: {
    activation_scheme: 'dynamic',
    fmt: 'e4m3',
    quant_method: 'fp8',
    weight_block_size: BLOCK,
    modules_to_not_convert: ['lm_head'],
  },
};
const published = join(root, 'fp8');
const twin = join(root, 'bf16');
const EXPERT = 'model.layers.1.block_sparse_moe.experts.2.w2.weight';

beforeAll(async () => {
  await writeSynthetic(published, FP8, {
    store: ({ name, shape, projection }, values) =>
      projection && fp8Entries(name, fromBf16(values), shape as Size, BLOCK),
  });
  const edit = ({ shape, projection }: RequiredTensor, values: Uint16Array) => {
    if (!projection) return;
    const { codes, scales } = encodeFp8(fromBf16(values), shape as Size, BLOCK);
    const bytes = bf16Bytes(decodeFp8(codes, scales, shape as Size, BLOCK));
    values.set(new Uint16Array(bytes.buffer));
  };
  await writeSynthetic(twin, CONFIG, { edit });
});

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

test('the same logits and routing, bit for bit', async () => {
  const [a, b] = [await MoeModel.load(published), await MoeModel.load(twin)];
  const [ids] = randomIds(CONFIG.vocab_size, 1, 40) as [Int32Array];
  const [found, expected] = [
    await a.forward(ids, { routing: true }),
    await b.forward(ids, { routing: true }),
  ];
  expect(new Set(found.logits).size).toBeGreaterThan(1000);
  expect(found).toEqual(expected);
  a.dispose();
  b.dispose();
});

test('inspect names the format and counts what the twin has', async () => {
  const [found, expected] = [await inspectModel(published), await inspectModel(twin)];
  expect([found.dtype, expected.dtype]).toEqual(['fp8', 'bfloat16']);
  expect(found.quantization).toBeUndefined();
  expect(found.bytes).toBeLessThan(0.75 * expected.bytes);
  for (const key of ['parameters', 'activeParameters', 'sizes'] as const)
    expect(found[key]).toEqual(expected[key]);
});

/** A whole matrix of each kind stays at 16 bit. */
const OPTIONS: Omit<QuantizeOptions, 'output'> = {
  bits: ({ role, expert, projection }) =>
    projection === 'v' || (role === 'expert' && expert === 1 && projection !== 'up') ? 16 : 3,
  calibration: randomIds(CONFIG.vocab_size),
};

/** All but the report, which holds the source's name and fingerprint. */
function written(dir: string): Record<string, string> {
  const { 'eac_moe.json': _report, ...rest } = hashes(dir);
  return rest;
}

test('quantize writes what it writes for the twin, and no trace of FP8', async () => {
  const [a, b] = [join(root, 'fp8-3bit'), join(root, 'bf16-3bit')];
  await quantizeCheckpoint(published, { ...OPTIONS, output: a });
  await quantizeCheckpoint(twin, { ...OPTIONS, output: b });
  expect(written(a)).toEqual(written(b));
  expect(readJson(join(a, 'config.json')).quantization_config).toMatchObject({ quant_method: 'gptq' });
  const shard = openSafetensors(join(a, 'model-00002-of-00003.safetensors'));
  const left = 'model.layers.0.block_sparse_moe.experts.1.w1.weight';
  expect(shard.info(left)).toMatchObject({ dtype: 'BF16', shape: [160, 192] });
  expect([...shard.tensors.keys()].filter((name) => name.includes('scale_inv'))).toEqual([]);
  shard.dispose();
  expect(inspectModel(a)).toMatchObject({ dtype: 'bfloat16', quantization: { matrices: { 3: 26, 16: 6 } } });
  const model = await MoeModel.load(a);
  expect((await model.forward([1, 2, 3])).logits.every(Number.isFinite)).toBe(true);
  model.dispose();
});

test.each([
  ['round to nearest', { method: 'rtn', router: false }],
  ['gptq', {}],
] as const)('a killed run continues (%s)', async (method, extra) => {
  const [whole, killed] = [join(root, `whole-${method}`), join(root, `killed-${method}`)];
  const options = { ...OPTIONS, ...extra };
  await quantizeCheckpoint(published, { ...options, output: whole });
  const controller = new AbortController();
  const run = quantizeCheckpoint(published, {
    ...options,
    output: killed,
    signal: controller.signal,
    onProgress: ({ layer }) => layer === 1 && controller.abort(),
  });
  await expectRejection(run, 'ABORTED');
  expect(readdirSync(killed)).toContain('model-00002-of-00003.safetensors');
  await quantizeCheckpoint(published, { ...options, output: killed });
  expect(hashes(killed)).toEqual(hashes(whole));
});

test('another scale is another source', async () => {
  const output = join(root, 'unfinished');
  const controller = new AbortController();
  const first = quantizeCheckpoint(published, {
    ...OPTIONS,
    output,
    signal: controller.signal,
    onProgress: ({ layer }) => layer === 1 && controller.abort(),
  });
  await expectRejection(first, 'ABORTED');
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
      expectError(() => inspectModel(dir), 'INVALID_TENSOR', missing);
      await expectRejection(MoeModel.load(dir), 'INVALID_TENSOR', missing);
      await expectRejection(quantize(dir), 'INVALID_TENSOR', missing);
    }
  });
});
