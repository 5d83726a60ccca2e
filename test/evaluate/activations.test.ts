/** What int8 activations cost: perplexity of the bundled model on the texts of the demo. */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { evaluate, MoeModel, quantizeMoE } from '../../lib';

const root = join(__dirname, '../..');
const trained = join(root, 'models/trio-moe-9m');
let dir: string;
beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), 'eac-moe-activations-'));
});
afterAll(() => rmSync(dir, { recursive: true, force: true }));

describe.each([2, 4] as const)('%i bit', (bits) => {
  let model: MoeModel;
  beforeAll(async () => {
    const output = join(dir, String(bits));
    ({ model } = await quantizeMoE(trained, { output, bits, method: 'rtn', router: false }));
  });
  afterAll(() => model.dispose());

  it.each(['prose', 'math', 'code'])('moves the perplexity of %s by less than 0.3 %%', async (domain) => {
    const text = readFileSync(join(root, 'scripts/data', `${domain}.txt`), 'utf8');
    const options = { perplexity: text, maxTokens: 16 * 512 };
    const exact = (await evaluate(model, options)).perplexity!;
    const int8 = (await evaluate(model, { ...options, activations: 'int8' })).perplexity!;
    expect(int8).not.toBe(exact); // it is really another path
    expect(Math.abs(int8 / exact - 1)).toBeLessThan(0.003);
  });

  it('is the default of forward and not of evaluate', async () => {
    const ids = Array.from({ length: 40 }, (_, i) => 100 + i);
    using exact = model.withActivations('float32');
    using int8 = model.withActivations('int8');
    const logits = async (m: MoeModel) => (await m.forward(ids)).logits;
    expect(await logits(model)).toEqual(await logits(int8));
    expect(await logits(model)).not.toEqual(await logits(exact));
    const options = { perplexity: [...ids, ...ids], seqLen: 40 };
    const plain = await evaluate(model, options);
    expect(plain).toEqual(await evaluate(exact, { ...options, activations: 'float32' }));
  });
});

it('names the option that is wrong', async () => {
  await expect(MoeModel.load(trained, { activations: 'int4' as never })).rejects.toMatchObject({
    code: 'INVALID_ARGUMENT',
    message: expect.stringContaining("'int4'") as string,
  });
  await expect(MoeModel.load(trained, { headBits: 3 as never })).rejects.toMatchObject({
    code: 'INVALID_ARGUMENT',
    message: expect.stringContaining('headBits must be 4 or 16') as string,
  });
});

it('rounds the head on request', async () => {
  using plain = await MoeModel.load(trained);
  using rounded = await MoeModel.load(trained, { headBits: 4 });
  const perplexity = readFileSync(join(root, 'scripts/data/code.txt'), 'utf8');
  const options = { perplexity, maxTokens: 8 * 512, reference: plain };
  const { kl, perplexity: value } = await evaluate(rounded, options);
  const original = (await evaluate(plain, { perplexity, maxTokens: 8 * 512 })).perplexity!;
  expect(kl).toBeGreaterThan(0);
  expect(kl).toBeLessThan(0.02);
  expect(Math.abs(value! / original - 1)).toBeLessThan(0.03);
});
