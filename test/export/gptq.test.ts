import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { exportCheckpoint } from '../../lib/export';
import { MoeModel } from '../../lib/model/model';
import { expectRejection, readJson, scratch } from '../checkpoint/helpers';
import { hashes, logitsOf, randomIds, TRIO } from '../quantize/helpers';
import { rounded } from './helpers';

const dir = scratch();
const plan = { bits: 3, attentionBits: 4, groupSize: 32 } as const;

async function logits(path: string): Promise<Float32Array> {
  const model = await MoeModel.load(path);
  try {
    return await logitsOf(model, randomIds(4096, 1, 32)[0]!);
  } finally {
    model.dispose();
  }
}

test('version 2 is what quantize wrote', async () => {
  const source = await rounded(dir, 'a', plan);
  const output = join(dir, 'a-v2');
  const report = await exportCheckpoint(source, { format: 'gptq', output });
  expect(hashes(output)).toEqual(hashes(source));
  expect(report.types.map((t) => [t.type, t.tensors, t.loss])).toEqual([
    ['3 bit', 4 * 16 * 3, 0],
    ['BF16', 4 * 7 + 2, 0],
    ['4 bit', 4 * 7, 0],
  ]);
  const weights = readdirSync(output).filter((name) => name.endsWith('.safetensors'));
  expect(weights).toHaveLength(5);
});

test('version 1: another checkpoint_format and other zero points, the same model; and back', async () => {
  const source = await rounded(dir, 'b', { ...plan, symmetric: true });
  const [first, second] = [join(dir, 'b-v1'), join(dir, 'b-v2')];
  const progress: number[] = [];
  const onProgress = ({ fraction }: { fraction: number }) => progress.push(fraction);
  await exportCheckpoint(source, { format: 'gptq', output: first, gptqVersion: 1, onProgress });
  const config = readJson(join(first, 'config.json')).quantization_config as Record<string, unknown>;
  expect(config).toEqual({
    ...(readJson(join(source, 'config.json')).quantization_config as object),
    checkpoint_format: 'gptq',
  });
  expect(config).toMatchObject({ sym: true, desc_act: false, bits: 3, group_size: 32 });
  expect(Object.values(config.dynamic as object)).toContainEqual({ bits: 4, group_size: 32, sym: true });
  expect(hashes(first)).not.toEqual(hashes(source));
  expect(await logits(first)).toEqual(await logits(source));
  await exportCheckpoint(first, { format: 'gptq', output: second });
  expect(hashes(second)).toEqual(hashes(source));
  expect(progress).toEqual([...progress].sort((a, b) => a - b));
  expect(progress.at(-1)).toBe(1);
});

test('what is in the way, not quantized or not asked for properly', async () => {
  const source = await rounded(dir, 'c', { ...plan, symmetric: true });
  const output = join(dir, 'c-out');
  const gptq = { format: 'gptq', output } as const;
  await expectRejection(exportCheckpoint(TRIO, gptq), 'UNSUPPORTED_MODEL', 'not quantized');
  await expectRejection(exportCheckpoint(source, { ...gptq, output: source }), 'OUTPUT', 'already exists');
  await expectRejection(
    exportCheckpoint(source, { ...gptq, maxLoss: 0.1 }),
    'INVALID_ARGUMENT',
    'maxLoss applies to format gguf',
  );
  await expectRejection(
    exportCheckpoint(source, { ...gptq, format: 'awq' as 'gptq' }),
    'INVALID_ARGUMENT',
    'gptq, compressed-tensors, gguf',
  );
  const controller = new AbortController();
  const onProgress = ({ fraction }: { fraction: number }) => fraction > 0.5 && controller.abort();
  await expectRejection(
    exportCheckpoint(source, { ...gptq, signal: controller.signal, onProgress }),
    'ABORTED',
    'abort',
  );
  expect(existsSync(output)).toBe(false);
  expect(readdirSync(dir).filter((name) => name.includes('.tmp-'))).toEqual([]);
});
