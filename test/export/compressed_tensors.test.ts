import { join } from 'node:path';
import { writeJson } from '../../lib/checkpoint/files';
import { exportCheckpoint } from '../../lib/export';
import { transpose } from '../../lib/export/compressed_tensors';
import type { QuantizeOptions } from '../../lib/quantize/options';
import { describeWith, expectRejection, readJson, scratch, shared } from '../checkpoint/helpers';
import { compare, settingOf, type Group } from './compressed-layout';
import { rounded } from './helpers';

const dir = scratch();

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
  await compare(source, output, 1);
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
  await compare(source, output, 1);
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
    await compare(source, output, 1);
    const config = readJson(join(output, 'config.json')).quantization_config as Record<string, unknown>;
    for (const name of ['gate_proj', 'up_proj', 'down_proj'])
      expect(settingOf(config, `model.layers.1.block_sparse_moe.experts.0.${name}`)?.num_bits).toBe(4);
  });
});
