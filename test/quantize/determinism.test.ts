/** Equal arguments give equal bytes, whatever the number of threads. */
import { join } from 'node:path';
import { native } from '../../lib/native';
import { quantizeCheckpoint } from '../../lib/quantize';
import type { QuantizeOptions } from '../../lib/quantize/options';
import { scratch } from '../checkpoint/helpers';
import { FEW, hashes, TRIO } from './helpers';

const dir = scratch();
const threads = native().threads();
let runs = 0;

afterAll(() => native().setThreads(threads));

async function run(options: Partial<QuantizeOptions>): Promise<Record<string, string>> {
  const output = join(dir, String(runs++));
  await quantizeCheckpoint(TRIO, { ...FEW, ...options, output });
  return hashes(output);
}

let first: Record<string, string>;
beforeAll(async () => {
  first = await run({ threads: 2 });
});

test('two runs write the same bytes', async () => {
  expect(Object.keys(first)).toHaveLength(5 + 6);
  expect(await run({ threads: 2 })).toEqual(first);
});

test('one thread, two and three write the same bytes', async () => {
  expect(await run({ threads: 1 })).toEqual(first);
  expect(native().threads()).toBe(1);
  expect(await run({ threads: 3 })).toEqual(first);
});

test('another seed samples other text', async () => {
  const other = await run({ threads: 2, seed: 1 });
  expect(Object.keys(other)).toEqual(Object.keys(first));
  const differing = Object.keys(first).filter((name) => first[name] !== other[name]);
  // All but the first shard, which holds what is not quantized, and the files that do not depend on the data.
  expect(differing).toEqual([
    'eac_moe.json',
    ...[2, 3, 4, 5].map((n) => `model-0000${n}-of-00005.safetensors`),
  ]);
});
