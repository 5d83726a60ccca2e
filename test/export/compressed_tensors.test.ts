import { join } from 'node:path';
import { describe as architectureOf } from '../../lib/architecture';
import { requiredTensors } from '../../lib/architecture/tensors';
import { writeJson } from '../../lib/checkpoint/files';
import { moduleOf, readMatrix } from '../../lib/checkpoint/quantized';
import { openSafetensors, type SafetensorsFile } from '../../lib/checkpoint/safetensors';
import { Checkpoint } from '../../lib/checkpoint/source';
import { exportCheckpoint } from '../../lib/export';
import { transpose } from '../../lib/export/compressed_tensors';
import type { QuantizeOptions } from '../../lib/quantize/options';
import type { QuantMatrix } from '../../types/native';
import { describeWith, expectRejection, readJson, scratch, shared } from '../checkpoint/helpers';
import { rounded } from './helpers';

const dir = scratch();

interface Group {
  targets: string[];
  weights: { num_bits: number; symmetric: boolean; strategy: string; group_size: number | null };
}

/** How readers find a module's setting: by name, then by class; null when ignored. */
function settingOf(config: Record<string, unknown>, module: string): Group['weights'] | null {
  const matches = (pattern: string) =>
    pattern.startsWith('re:') ? new RegExp(pattern.slice(3), 'y').test(module) : pattern === module;
  if ((config.ignore as string[]).some(matches)) return null;
  const groups = Object.values(config.config_groups as Record<string, Group>);
  const found = groups.filter((group) => group.targets.some(matches));
  expect(found.length).toBeLessThan(2);
  return (found[0] ?? groups.find((group) => group.targets.includes('Linear')))!.weights;
}

/**
 * The library's own way back, step by step: split words into 32 / bits values (3 bit: a bit string), subtract 2^(bits - 1), cut the padding,
 * then (value - zero point) * scale by group. Zero points lie along the outputs.
 */
function decompress(file: SafetensorsFile, module: string, args: Group['weights']): Float32Array {
  const bits = args.num_bits;
  const [out, inputs] = [...new BigInt64Array(file.bytes(`${module}.weight_shape`).slice().buffer)].map(
    Number,
  );
  const words = (name: string) => new Uint32Array(file.bytes(`${module}.${name}`).slice().buffer);
  const signed = (line: number[], count: number): number[] => {
    const bit = (at: number): number => (line[at >> 5]! >>> (at & 31)) & 1;
    return Array.from({ length: count }, (_, i) => {
      let value = -(2 ** (bits - 1));
      for (let b = 0; b < bits; b++) value += bit(i * bits + b) << b;
      return value;
    });
  };
  const packed = words('weight_packed');
  const row = packed.length / out!;
  const scale = file.tensor(`${module}.weight_scale`).toArray() as Float32Array;
  const groups = scale.length / out!;
  expect(file.info(`${module}.weight_scale`).shape).toEqual([out, groups]);
  const zeros: number[][] = [];
  if (!args.symmetric) {
    const column = words('weight_zero_point');
    const lines = column.length / groups;
    for (let g = 0; g < groups; g++)
      zeros.push(
        signed(
          Array.from({ length: lines }, (_, l) => column[l * groups + g]!),
          out!,
        ),
      );
  }
  const size = args.group_size ?? inputs!;
  const weights = new Float32Array(out! * inputs!);
  for (let r = 0; r < out!; r++) {
    const values = signed([...packed.subarray(r * row, (r + 1) * row)], inputs!);
    for (const [c, value] of values.entries()) {
      const g = Math.floor(c / size);
      weights[r * inputs! + c] = (value - (zeros[g]?.[r] ?? 0)) * scale[r * groups + g]!;
    }
  }
  return weights;
}

async function compare(source: string, output: string, layer = 1): Promise<void> {
  const config = readJson(join(output, 'config.json')).quantization_config as Record<string, unknown>;
  const checkpoint = Checkpoint.open(source);
  const exported = Checkpoint.open(output);
  let quantized = 0;
  const all = requiredTensors(architectureOf(checkpoint.config));
  for (const { name, shape, layer: l, role } of all) {
    const module = moduleOf(name);
    if (!checkpoint.has(`${module}.qweight`)) {
      expect(exported.tensor(name).toBytes()).toEqual(checkpoint.tensor(name).toBytes());
      if (['router', 'gate', 'head'].includes(role))
        expect([name, settingOf(config, module)]).toEqual([name, null]);
      continue;
    }
    const args = settingOf(config, module)!;
    if (l !== layer) continue;
    const matrix = (await readMatrix(checkpoint, name, shape[0]!, shape[1]!)) as QuantMatrix;
    expect([args.num_bits, args.symmetric]).toEqual([matrix.bits, matrix.symmetric]);
    const file = openSafetensors(join(output, exported.info(`${module}.weight_packed`).file));
    const [found, expected] = [decompress(file, module, args), (await matrix.dequantize()).toArray()];
    expect(Buffer.from(found.buffer).equals(Buffer.from(expected.buffer))).toBe(true);
    quantized++;
    file.dispose();
  }
  expect(quantized).toBeGreaterThan(10);
  checkpoint.dispose();
  exported.dispose();
}

test.each<[string, Partial<QuantizeOptions>]>([
  ['4 bit, symmetric', { bits: 4, symmetric: true }],
  ['4 bit, asymmetric, groups of 32', { bits: 4, groupSize: 32 }],
  ['4 bit experts only', { bits: 4, attentionBits: 16 }],
])('%s: for vLLM, read back by the formula', async (name, options) => {
  const source = await rounded(dir, name, options);
  const output = join(dir, `${name} out`);
  const format = 'compressed-tensors';
  const { types } = await exportCheckpoint(source, { format, output });
  expect(types.find((t) => t.type === '4 bit')!.loss).toBe(0);
  await compare(source, output);
});

test('several widths: config groups by patterns', async () => {
  const bits = ({ layer, role, expert }: { layer: number; role: string; expert?: number }) =>
    role !== 'expert' ? 4 : layer === 0 ? 2 : expert === 3 ? 2 : 3;
  const source = await rounded(dir, 'mixed', { bits, groupSize: 64 });
  const output = join(dir, 'mixed-out');
  const options = { format: 'compressed-tensors', output } as const;
  await expectRejection(
    exportCheckpoint(source, options),
    'UNSUPPORTED_MODEL',
    "'model.layers.0.mlp.experts.0.gate_proj' has 2 bit",
    '4 and 8 bit only',
    '--consumer any',
  );
  await exportCheckpoint(source, { ...options, consumer: 'any' });
  const { config_groups } = readJson(join(output, 'config.json')).quantization_config as {
    config_groups: Record<string, Group>;
  };
  expect(Object.keys(config_groups)).toHaveLength(3);
  const ofLayer0 = Object.values(config_groups).find((g) => g.weights.num_bits === 2)!;
  expect(ofLayer0.targets).toContain('re:^model\\.layers\\.0\\.mlp\\.experts\\..+$');
  await compare(source, output);
});

test('what vLLM runs in one kernel must be alike', async () => {
  const check = async (name: string, options: Partial<QuantizeOptions>, ...texts: string[]) => {
    const source = await rounded(dir, name, options);
    const output = join(dir, `${name}-out`);
    await expectRejection(
      exportCheckpoint(source, { format: 'compressed-tensors', output }),
      'UNSUPPORTED_MODEL',
      ...texts,
    );
  };
  const leave = (what: string) =>
    ({
      bits: ({ projection, layer }: { projection: string; layer: number }) =>
        projection === what && layer === 2 ? 16 : 4,
    }) as const;
  await check('k', leave('k'), "'model.layers.2.self_attn.k_proj' is not quantized", 'alike');
  await check('down', leave('down'), 'model.layers.2.mlp.experts.', 'one setting');
  await check('groups', { bits: 4, groupSize: 96 }, '256 input channels in groups of 96');
  await check('large', { bits: 4, groupSize: 256 }, 'groups of 256', '32, 64, 128');
});

test('symmetric matrices whose zero points are not', async () => {
  const source = await rounded(dir, 'asymmetric', { bits: 4 });
  const path = join(source, 'config.json');
  const config = readJson(path);
  (config.quantization_config as Record<string, unknown>).sym = true;
  await writeJson(path, config);
  await expectRejection(
    exportCheckpoint(source, { format: 'compressed-tensors', output: join(dir, 'odd-out') }),
    'INVALID_CHECKPOINT',
    'symmetric by config.json',
    '.qzeros',
  );
});

test('transpose: any shape, a part of the matrix', () => {
  const [rows, stride, columns] = [3, 71, 70];
  const matrix = Int32Array.from({ length: rows * stride }, (_, i) => i);
  const result = transpose(matrix, stride, rows, columns);
  expect(result).toHaveLength(rows * columns);
  for (let c = 0; c < columns; c++)
    expect([...result.subarray(c * rows, (c + 1) * rows)]).toEqual([c, c + stride, c + 2 * stride]);
});

describeWith('goldens/mixtral', 'experts under other names', () => {
  test("vLLM's names of Mixtral's experts find their setting", async () => {
    const source = await rounded(
      dir,
      'mixtral',
      { bits: 4, sharedBits: 4, groupSize: 64 },
      join(shared, 'goldens/mixtral'),
    );
    const output = join(dir, 'mixtral-out');
    await exportCheckpoint(source, { format: 'compressed-tensors', output });
    await compare(source, output);
    const config = readJson(join(output, 'config.json')).quantization_config as Record<string, unknown>;
    for (const name of ['gate_proj', 'up_proj', 'down_proj'])
      expect(settingOf(config, `model.layers.1.block_sparse_moe.experts.0.${name}`)?.num_bits).toBe(4);
  });
});
