/** What quantizeMoE says to wrong input: a code, the culprit by name, and nothing left behind. */
import { execFileSync } from 'node:child_process';
import {
  closeSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { ErrorCode } from '../../lib/errors';
import { quantizeCheckpoint } from '../../lib/quantize';
import type { QuantizeOptions } from '../../lib/quantize/options';
import { expectRejection, readJson, scratch } from '../checkpoint/helpers';
import { bf16, TINY_CONFIG, writeSynthetic, type SyntheticOptions } from '../synthetic';
import { FEW, hashes, randomIds, TRIO } from './helpers';

const dir = scratch();
const tiny = join(dir, 'tiny');
const calibration = randomIds(TINY_CONFIG.vocab_size);
/** Layer 0 of the tiny model. */
const SHARD = 'model-00002-of-00003.safetensors';
const UP = 'model.layers.0.mlp.experts.3.up_proj.weight';
let count = 0;

beforeAll(() => writeSynthetic(tiny, TINY_CONFIG));

/** Any options, right or wrong. */
type AnyOptions = { [K in keyof QuantizeOptions]?: unknown };

/** Expects a rejection that leaves nothing behind. */
async function expectRefused(
  source: string,
  options: AnyOptions,
  code: ErrorCode,
  ...texts: string[]
): Promise<void> {
  const output = join(dir, `output-${count++}`);
  const all = { ...FEW, calibration, ...options, output } as QuantizeOptions;
  await expectRejection(quantizeCheckpoint(source, all), code, ...texts);
  expect(existsSync(output)).toBe(false);
}

/** A copy of the tiny model, changed. */
function changed(change: (dir: string) => void): string {
  const copy = join(dir, `source-${count++}`);
  cpSync(tiny, copy, { recursive: true });
  change(copy);
  return copy;
}

type Header = Record<string, { dtype: string; shape: number[]; data_offsets: [number, number] }>;

/** A copy whose shard of layer 0 has another header before the same data. */
function withHeader(change: (header: Header) => void): string {
  return changed((copy) => {
    const path = join(copy, SHARD);
    const bytes = readFileSync(path);
    const end = 8 + Number(bytes.readBigUInt64LE());
    const header = JSON.parse(bytes.subarray(8, end).toString()) as Header;
    change(header);
    const json = Buffer.from(JSON.stringify(header));
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(BigInt(json.byteLength));
    writeFileSync(path, Buffer.concat([length, json, bytes.subarray(end)]));
  });
}

function withConfig(fields: Record<string, unknown>): string {
  return changed((copy) =>
    writeFileSync(join(copy, 'config.json'), JSON.stringify({ ...TINY_CONFIG, ...fields })),
  );
}

async function withWeights(edit: SyntheticOptions['edit']): Promise<string> {
  const source = join(dir, `source-${count++}`);
  await writeSynthetic(source, TINY_CONFIG, { edit });
  return source;
}

describe('the source', () => {
  test('no directory, no config.json, no JSON', async () => {
    await expectRefused(join(dir, 'none'), {}, 'FILE_NOT_FOUND', join(dir, 'none'));
    await expectRefused(
      changed((d) => rmSync(join(d, 'config.json'))),
      {},
      'FILE_NOT_FOUND',
      'config.json',
    );
    await expectRefused(
      changed((d) => writeFileSync(join(d, 'config.json'), '{')),
      {},
      'INVALID_CHECKPOINT',
      'config.json',
    );
  });

  test('missing shard', () =>
    expectRefused(
      changed((d) => rmSync(join(d, SHARD))),
      {},
      'FILE_NOT_FOUND',
      SHARD,
      'missing',
    ));

  test.each([1, 1000, 1e9])('shard that lacks its last %d bytes', (bytes) => {
    const cut = changed((d) => {
      const { size } = statSync(join(d, SHARD));
      truncateSync(join(d, SHARD), Math.max(0, size - bytes));
    });
    return expectRefused(cut, {}, 'INVALID_CHECKPOINT', SHARD, 'truncated');
  });

  test('lying offsets', async () => {
    const beyond = withHeader(
      (h) => (h[UP]!.data_offsets = h[UP]!.data_offsets.map((x) => x + 2 ** 30) as [number, number]),
    );
    await expectRefused(beyond, {}, 'INVALID_CHECKPOINT', SHARD, UP, 'data_offsets');
    const short = withHeader((h) => (h[UP]!.data_offsets[1] -= 2));
    await expectRefused(short, {}, 'INVALID_CHECKPOINT', SHARD, UP, 'data_offsets');
    const negative = withHeader((h) => (h[UP]!.data_offsets[0] = -2));
    await expectRefused(negative, {}, 'INVALID_CHECKPOINT', SHARD, UP, 'data_offsets');
  });

  test('overlapping tensors', () => {
    const gate = 'model.layers.0.mlp.experts.3.gate_proj.weight';
    const source = withHeader((h) => (h[UP]!.data_offsets = [...h[gate]!.data_offsets]));
    return expectRefused(source, {}, 'INVALID_CHECKPOINT', SHARD, UP, gate, 'overlap');
  });

  test('wrong dtype', () =>
    expectRefused(
      withHeader((h) => (h[UP]!.dtype = 'I16')),
      {},
      'INVALID_TENSOR',
      UP,
      'I16',
      'BF16',
    ));

  test('wrong shape', () =>
    expectRefused(
      withHeader((h) => h[UP]!.shape.reverse()),
      {},
      'INVALID_TENSOR',
      UP,
      '[64, 32]',
      '[32, 64]',
    ));

  test('tensors missing or left over', async () => {
    const renamed = withHeader((h) => {
      h.other = h[UP]!;
      delete h[UP];
    });
    await expectRefused(renamed, {}, 'INVALID_CHECKPOINT', UP, SHARD);
    await expectRefused(
      withConfig({ num_experts: 9 }),
      {},
      'INVALID_TENSOR',
      'gate.weight',
      '[8, 64]',
      '[9, 64]',
    );
    await expectRefused(withConfig({ num_hidden_layers: 1 }), {}, 'INVALID_TENSOR', 'model.layers.1.');
    await expectRefused(
      withConfig({ num_hidden_layers: 3 }),
      {},
      'INVALID_TENSOR',
      'model.layers.2.',
      'missing',
    );
  });

  test.each([
    ['NaN in an expert', UP, 0x7fc0, 64 + 5, '[1, 5]'],
    ['infinity in a norm', 'model.layers.1.input_layernorm.weight', 0x7f80, 7, '[7]'],
    ['negative infinity in the embedding', 'model.embed_tokens.weight', 0xff80, 0, '[0, 0]'],
    ['NaN in the head', 'lm_head.weight', 0x7f81, 95 * 64 + 63, '[95, 63]'],
  ])('%s', async (_, name, bits, index, where) => {
    const source = await withWeights((tensor, values) => {
      if (tensor.name === name) values[index] = bits;
    });
    await expectRefused(source, {}, 'NON_FINITE', name, where, '.safetensors');
    await expectRefused(source, { method: 'rtn', router: false }, 'NON_FINITE', name, where);
  });

  test('activations that overflow', async () => {
    const source = await withWeights(({ name }, values) => {
      if (name === 'model.layers.1.input_layernorm.weight') values.fill(bf16(3e38));
    });
    const run = quantizeCheckpoint(source, { ...FEW, calibration, output: join(dir, 'overflow') });
    const name = "'model.layers.1.self_attn.q_proj.weight'";
    await expectRejection(run, 'NOT_POSITIVE_DEFINITE', name, 'NaN or infinity');
  });

  test('a model of an unknown or dense kind', async () => {
    await expectRefused(withConfig({ model_type: 'newmoe' }), {}, 'UNSUPPORTED_MODEL', "'newmoe'", 'mixtral');
    await expectRefused(withConfig({ num_experts: 0 }), {}, 'UNSUPPORTED_MODEL', 'dense');
    const llama = changed((d) =>
      writeFileSync(join(d, 'config.json'), JSON.stringify({ model_type: 'llama', hidden_size: 64 })),
    );
    await expectRefused(llama, {}, 'UNSUPPORTED_MODEL', "'llama'", 'dense');
  });

  test('quantized before, by whomever', async () => {
    const awq = withConfig({ quantization_config: { quant_method: 'awq', bits: 4, group_size: 128 } });
    await expectRefused(awq, {}, 'UNSUPPORTED_MODEL', 'config.json', '"awq"');
    const v1 = withConfig({ quantization_config: { quant_method: 'gptq', bits: 4, group_size: 128 } });
    await expectRefused(v1, {}, 'UNSUPPORTED_MODEL', 'already quantized');
    const ours = join(dir, 'ours');
    await quantizeCheckpoint(tiny, { ...FEW, calibration, output: ours });
    await expectRefused(ours, {}, 'UNSUPPORTED_MODEL', ours, 'already quantized', 'eac-moe');
  });
});

describe('calibration', () => {
  test('texts need a tokenizer, sampling does not', async () => {
    await expectRefused(tiny, { calibration: ['some text'] }, 'TOKENIZER', join(tiny, 'tokenizer.json'));
    const output = join(dir, 'sampled');
    const report = await quantizeCheckpoint(tiny, { ...FEW, output });
    expect(report.calibration).toEqual({ sequences: 4, seqLen: 64, tokens: 256 });
  });

  test.each<[string, unknown]>([
    ['no text', []],
    ['an empty text', ['']],
    ['blank texts', [' ', '\n\t']],
  ])('%s', (_, texts) => expectRefused(TRIO, { calibration: texts }, 'CALIBRATION', 'empty'));

  test.each<[string, unknown, string]>([
    ['no tokens', [[]], 'empty'],
    ['an id outside the vocabulary', [[1, 2, 96]], 'calibration[0]: 96'],
    ['a negative id', [[1], [-1]], 'calibration[1]: -1'],
    ['a fraction', [[1.5]], '1.5'],
    ['texts and tokens mixed', ['text', [1, 2]], 'calibration[0]'],
    ['something else', 7, "'self'"],
    ['another word', 'selves', "'self'"],
  ])('%s', (_, value, text) => expectRefused(tiny, { calibration: value }, 'CALIBRATION', text));
});

describe('options', () => {
  test.each<[AnyOptions, string]>([
    [{ bits: 5 }, 'bits must be 2, 2.5, 3, 4'],
    [{ bits: '3' }, "'3'"],
    [{ bits: () => 5 }, 'found 5'],
    [{ bits: () => 16 }, 'nothing to quantize'],
    [{ groupSize: 0 }, 'groupSize'],
    [{ groupSize: 33 }, 'groupSize'],
    [{ attentionBits: 5 }, 'attentionBits'],
    [{ sharedBits: 1 }, 'sharedBits'],
    [{ symmetric: 'yes' }, 'symmetric'],
    [{ method: 'awq' }, 'method'],
    [{ samples: 0 }, 'samples'],
    [{ seqLen: 1 }, 'seqLen'],
    [{ seed: -1 }, 'seed'],
    [{ damping: 0 }, 'damping'],
    [{ damping: NaN }, 'damping'],
    [{ routingWeightPower: -1 }, 'routingWeightPower'],
    [{ minExpertTokens: 0.5 }, 'minExpertTokens'],
    [{ actOrder: 1 }, 'actOrder'],
    [{ twoStreamTargets: 'no' }, 'twoStreamTargets'],
    [{ clipSearch: 0 }, 'clipSearch'],
    [{ router: { loss: 'kl' } }, 'router.loss'],
    [{ router: { k: -1 } }, 'router.k'],
    [{ router: { ridge: 0 } }, 'router.ridge'],
    [{ threads: 0 }, 'threads'],
    [{ device: 'tpu' }, 'device'],
  ])('%p', (options, text) => expectRefused(tiny, options, 'INVALID_ARGUMENT', text));

  test('no output', () =>
    expectRejection(quantizeCheckpoint(tiny, { output: '' }), 'INVALID_ARGUMENT', 'output'));
});

describe('the output directory', () => {
  const to = (output: string, source = tiny) => quantizeCheckpoint(source, { ...FEW, calibration, output });

  test('holds something else', async () => {
    const output = join(dir, 'occupied');
    mkdirSync(output);
    writeFileSync(join(output, 'thesis.tex'), 'precious');
    await expectRejection(to(output), 'OUTPUT', output, 'thesis.tex');
    await expectRejection(
      quantizeCheckpoint(tiny, { ...FEW, calibration, output, resume: false }),
      'OUTPUT',
      output,
      'thesis.tex',
    );
    expect(readdirSync(output)).toEqual(['thesis.tex']);
    expect(readFileSync(join(output, 'thesis.tex'), 'utf8')).toBe('precious');
  });

  test('is the source', async () => {
    const before = hashes(tiny);
    await expectRejection(to(tiny), 'OUTPUT', tiny);
    expect(hashes(tiny)).toEqual(before);
  });

  test('holds a quantized model', async () => {
    const output = join(dir, 'done');
    await to(output);
    const before = hashes(output);
    await expectRejection(to(output), 'OUTPUT', output, 'already holds a quantized checkpoint');
    expect(hashes(output)).toEqual(before);
  });

  test('holds a damaged note of an unfinished run', async () => {
    const output = join(dir, 'damaged');
    mkdirSync(output);
    const partial = join(output, 'eac_moe.partial.json');
    writeFileSync(partial, '{"version": ');
    await expectRejection(to(output), 'INVALID_CHECKPOINT', partial);
    writeFileSync(partial, '{}');
    await expectRejection(to(output), 'OUTPUT', output, 'another version');
  });

  test('is a file, or below one', async () => {
    const file = join(dir, 'file');
    writeFileSync(file, '');
    await expectRejection(to(file), 'OUTPUT', file);
    await expectRejection(to(join(file, 'below')), 'OUTPUT', join(file, 'below'));
    expect(readFileSync(file, 'utf8')).toBe('');
  });

  test('is empty, or below directories that do not exist yet', async () => {
    const empty = join(dir, 'empty');
    mkdirSync(empty);
    await to(empty);
    const deep = join(dir, 'a', 'b', 'c');
    await to(deep);
    expect(hashes(deep)).toEqual(hashes(empty));
  });
});

/** A file system of this size, or null where this process may not mount one. */
function mountSmall(mib: number): string | null {
  const at = mkdtempSync(join(tmpdir(), 'eac-moe-small-'));
  try {
    execFileSync('mount', ['-t', 'tmpfs', '-o', `size=${mib}m`, 'tmpfs', at], { stdio: 'ignore' });
  } catch {
    console.warn('SKIPPED: disk full: mounting a tmpfs needs root');
    rmSync(at, { recursive: true });
    return null;
  }
  mounted.push(at);
  return at;
}

const mounted: string[] = [];
afterEach(() => {
  for (const at of mounted.splice(0)) {
    execFileSync('umount', [at]);
    rmSync(at, { recursive: true });
  }
});

/** Writes a file until the disk is full, then leaves `spare` bytes. */
function fillDisk(path: string, spare: number): void {
  const fd = openSync(path, 'w');
  let size = 0;
  try {
    for (;;) size += writeSync(fd, Buffer.alloc(4096, 1));
  } catch (error) {
    expect((error as NodeJS.ErrnoException).code).toBe('ENOSPC');
  }
  closeSync(fd);
  truncateSync(path, size - spare);
}

describe('disk full', () => {
  test('from the start', async () => {
    const disk = mountSmall(1);
    if (!disk) return;
    const output = join(disk, 'output');
    const run = quantizeCheckpoint(TRIO, { ...FEW, output });
    await expectRejection(run, 'OUTPUT', output, 'MB free', 'needs about');
    expect(readdirSync(disk)).toEqual([]);
  });

  test('during the run, which can be continued', async () => {
    const disk = mountSmall(16);
    if (!disk) return;
    const output = join(disk, 'output');
    const filler = join(disk, 'filler');
    const run = quantizeCheckpoint(TRIO, {
      ...FEW,
      output,
      onProgress: ({ layer, message }) => {
        if (layer === 2 && message.includes('forward')) fillDisk(filler, 2 ** 16);
      },
    });
    await expectRejection(run, 'OUTPUT', join(output, 'model-00004-of-00005.safetensors'), 'disk is full');
    expect(readdirSync(output).sort()).toEqual([
      'eac_moe.partial.json',
      'eac_moe.partial.safetensors',
      'model-00002-of-00005.safetensors',
      'model-00003-of-00005.safetensors',
    ]);
    rmSync(filler);
    await quantizeCheckpoint(TRIO, { ...FEW, output });
    const reference = join(dir, 'enough-space');
    await quantizeCheckpoint(TRIO, { ...FEW, output: reference });
    expect(hashes(output)).toEqual(hashes(reference));
  });

  test('at the very end', async () => {
    const disk = mountSmall(16);
    if (!disk) return;
    const output = join(disk, 'output');
    const run = quantizeCheckpoint(TRIO, {
      ...FEW,
      output,
      onProgress: ({ message }) => {
        if (message === 'finishing') fillDisk(join(disk, 'filler'), 2 ** 16);
      },
    });
    await expectRejection(run, 'OUTPUT', join(output, 'model-00001-of-00005.safetensors'), 'disk is full');
    expect(existsSync(join(output, 'config.json'))).toBe(false);
    expect(readJson(join(output, 'eac_moe.partial.json')).layers).toHaveLength(4);
  });
});

test('a source with a Git LFS pointer for a shard', () => {
  const source = changed((d) => {
    writeFileSync(join(d, SHARD), 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n');
  });
  return expectRefused(source, {}, 'INVALID_CHECKPOINT', SHARD, 'git lfs pull');
});
