/** GPTQ and compressed-tensors directories of every family, read back by the definitions of the formats. */
import { mkdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { SUPPORTED_MODEL_TYPES, describe as architectureOf } from '../../lib/architecture';
import { requiredTensors } from '../../lib/architecture/tensors';
import { moduleOf, readMatrix } from '../../lib/checkpoint/quantized';
import { Checkpoint } from '../../lib/checkpoint/source';
import { exportCheckpoint } from '../../lib/export';
import { MoeModel } from '../../lib/model/model';
import type { QuantMatrix } from '../../types/native';
import { describeWith, scratch, shared } from '../checkpoint/helpers';
import { shows } from '../families/shows';
import { dequantize } from '../quantize/gptq-layout';
import { logitsOf, randomIds } from '../quantize/helpers';
import { compare, expectPlain } from './compressed-layout';
import { rounded } from './helpers';

const dir = scratch();

async function logits(path: string): Promise<Float32Array> {
  using model = await MoeModel.load(path);
  return await logitsOf(model, randomIds(model.architecture.vocabSize, 1, 24)[0]!);
}

/** Every matrix of the GPTQ checkpoint `output` is that of `source`. Returns how many are quantized. */
async function compareGptq(source: string, output: string): Promise<number> {
  using before = Checkpoint.open(source);
  using after = Checkpoint.open(output);
  let quantized = 0;
  expectPlain(before, after);
  for (const { name, shape } of requiredTensors(architectureOf(before.config))) {
    const module = moduleOf(name);
    if (!before.has(`${module}.qweight`)) continue;
    const matrix = (await readMatrix(before, name, shape[0]!, shape[1]!)) as QuantMatrix;
    const expected = (await matrix.dequantize()).toArray();
    const found = dequantize(after, module, matrix.bits);
    expect([name, Buffer.from(found.buffer).equals(Buffer.from(expected.buffer))]).toEqual([name, true]);
    matrix.dispose();
    quantized++;
  }
  return quantized;
}

test('who may read other new directories may read an exported one', async () => {
  const source = await rounded(dir, 'readable', { bits: 4 });
  const [output, other] = [join(dir, 'readable-gptq'), join(dir, 'other')];
  await exportCheckpoint(source, { format: 'gptq', output });
  mkdirSync(other);
  expect(statSync(output).mode).toBe(statSync(other).mode);
});

for (const family of SUPPORTED_MODEL_TYPES) {
  describeWith(`goldens/${family}/config.json`, `${family} for other programs`, () => {
    const golden = join(shared, 'goldens', family);

    test(`gptq ${shows(family, 'gptq')}`, async () => {
      const source = await rounded(
        dir,
        `${family}-3bit`,
        { bits: 3, groupSize: 32, symmetric: true },
        golden,
      );
      const [second, first] = [join(dir, `${family}-v2`), join(dir, `${family}-v1`)];
      await exportCheckpoint(source, { format: 'gptq', output: second });
      expect(await compareGptq(source, second)).toBeGreaterThan(10);
      await exportCheckpoint(source, { format: 'gptq', output: first, gptqVersion: 1 });
      expect(await logits(first)).toEqual(await logits(source));
    });

    test(`compressed-tensors, by the rules of vLLM's kernels ${shows(family, 'compressed-tensors')}`, async () => {
      const source = await rounded(
        dir,
        `${family}-4bit`,
        { bits: 4, groupSize: 32, symmetric: true },
        golden,
      );
      const output = join(dir, `${family}-compressed`);
      await exportCheckpoint(source, { format: 'compressed-tensors', output });
      await compare(source, output);
    });
  });
}
