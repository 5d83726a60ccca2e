/** Generation on the bundled model: limits, stop texts, sampling, chunks, interruption. */
import { cpSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { GenerateOptions, GenerateResult } from '../../lib/model/generate';
import { MoeModel } from '../../lib/model/model';
import { expectRejection, scratch } from '../checkpoint/helpers';

const prompt = 'Question: A farmer has 12 cows and buys 7 more. How many cows does he have?\nAnswer:';
const scratchDir = scratch();
let model: MoeModel;

beforeAll(async () => {
  model = await MoeModel.load(join(__dirname, '../../models/trio-moe-9m'));
});
afterAll(() => model.dispose());

async function generate(options: GenerateOptions, from: string | number[] = prompt, by = model) {
  const pieces: string[] = [];
  const iterator = by.generate(from, options);
  let next = await iterator.next();
  for (; !next.done; next = await iterator.next()) pieces.push(next.value);
  return { ...(next.value satisfies GenerateResult), text: pieces.join(''), pieces };
}

test('greedy decoding takes the likeliest token of the whole sequence each time', async () => {
  const { ids, newTokens, promptTokens, reason } = await generate({ maxNewTokens: 8, ignoreEos: true });
  expect([newTokens, reason]).toEqual([8, 'length']);
  const all = model.tokenizer.encode(prompt);
  expect(promptTokens).toBe(all.length);
  for (const id of ids) {
    const { logits } = await model.forward(all, { logits: 'last' });
    expect(logits.indexOf(Math.max(...logits))).toBe(id);
    all.push(id);
  }
});

test('the pieces join to the text of the ids', async () => {
  const { ids, text } = await generate({ maxNewTokens: 24, ignoreEos: true });
  expect(text).toBe(model.tokenizer.decode(ids));
});

test('a token limit of one', async () => {
  expect(await generate({ maxNewTokens: 1 })).toMatchObject({ newTokens: 1, reason: 'length' });
});

test('chunks of the prompt change nothing', async () => {
  const whole = await generate({ maxNewTokens: 12, ignoreEos: true });
  for (const prefillChunk of [1, 7, 1000]) {
    expect((await generate({ maxNewTokens: 12, ignoreEos: true, prefillChunk })).ids).toEqual(whole.ids);
  }
});

test('the same seed gives the same text, another seed another', async () => {
  const options = { maxNewTokens: 16, temperature: 1, ignoreEos: true };
  const first = await generate({ ...options, seed: 7 });
  expect((await generate({ ...options, seed: 7 })).ids).toEqual(first.ids);
  expect((await generate({ ...options, seed: 8 })).ids).not.toEqual(first.ids);
  expect((await generate({ ...options, seed: 7 + 2 ** 32 })).ids).not.toEqual(first.ids);
});

test('top-k and top-p keep the likeliest tokens', async () => {
  const options = { maxNewTokens: 12, temperature: 3, ignoreEos: true };
  const greedy = await generate({ maxNewTokens: 12, ignoreEos: true });
  expect((await generate({ ...options, topK: 1 })).ids).toEqual(greedy.ids);
  expect((await generate({ ...options, topP: 1e-9 })).ids).toEqual(greedy.ids);
  const { ids } = await generate({ ...options, topK: 3, seed: 5 });
  const all = model.tokenizer.encode(prompt);
  for (const id of ids) {
    const { logits } = await model.forward(all, { logits: 'last' });
    const third = [...logits].sort((a, b) => b - a)[2]!;
    expect(logits[id]).toBeGreaterThanOrEqual(third);
    all.push(id);
  }
});

test('sampled tokens have the frequencies of the softmax', async () => {
  const { logits } = await model.forward(model.tokenizer.encode(prompt), { logits: 'last' });
  const weights = [...logits].map((l) => Math.exp(l / 0.7));
  const total = weights.reduce((a, b) => a + b, 0);
  const likeliest = logits.indexOf(Math.max(...logits));
  let hits = 0;
  const draws = 200;
  for (let seed = 0; seed < draws; seed++) {
    const { ids } = await generate({ maxNewTokens: 1, temperature: 0.7, seed, ignoreEos: true });
    if (ids[0] === likeliest) hits++;
  }
  const p = weights[likeliest]! / total;
  expect(Math.abs(hits / draws - p)).toBeLessThan(4 * Math.sqrt((p * (1 - p)) / draws) + 1e-9);
});

describe('stop texts', () => {
  test('end the text before them, also across pieces', async () => {
    const { text } = await generate({ maxNewTokens: 24, ignoreEos: true });
    for (const [from, length] of [
      [3, 4],
      [6, 1],
      [8, 9],
    ] as const) {
      const stop = text.slice(from, from + length);
      const stopped = await generate({
        maxNewTokens: 24,
        ignoreEos: true,
        stop: ['never in the text \u0000', stop],
      });
      expect(stopped.text).toBe(text.slice(0, text.indexOf(stop)));
      expect(stopped.reason).toBe('stop');
    }
  });

  test('that begin and do not come hold nothing back in the end', async () => {
    const { text } = await generate({ maxNewTokens: 8, ignoreEos: true });
    const stop = `${text.slice(-2)}\u0000`;
    expect(await generate({ maxNewTokens: 8, ignoreEos: true, stop })).toMatchObject({
      text,
      reason: 'length',
    });
  });
});

test('an end-of-text token ends the text, unless ignored', async () => {
  const { ids } = await generate({ maxNewTokens: 8, ignoreEos: true });
  const eos = ids.find((id, i) => i > 1 && !ids.slice(0, i).includes(id))!;
  // The same model, with one of the tokens that it is about to say as its end-of-text token.
  const copy = join(scratchDir, 'eos');
  cpSync(model.path, copy, { recursive: true });
  writeFileSync(join(copy, 'generation_config.json'), JSON.stringify({ eos_token_id: [4095, eos] }));
  using other = await MoeModel.load(copy);
  const ended = await generate({ maxNewTokens: 8 }, prompt, other);
  expect(ended).toMatchObject({ reason: 'eos', ids: ids.slice(0, ids.indexOf(eos)) });
  expect(ended.text).toBe(model.tokenizer.decode(ended.ids));
  expect((await generate({ maxNewTokens: 8, ignoreEos: true }, prompt, other)).ids).toEqual(ids);
});

test('an AbortSignal ends it, before and in between', async () => {
  await expectRejection(generate({ signal: AbortSignal.abort() }), 'ABORTED');
  const controller = new AbortController();
  const iterator = model.generate(prompt, { maxNewTokens: 500, ignoreEos: true, signal: controller.signal });
  await iterator.next();
  controller.abort();
  await expectRejection(
    (async () => {
      while (!(await iterator.next()).done);
    })(),
    'ABORTED',
  );
  expect((await generate({ maxNewTokens: 2, ignoreEos: true })).newTokens).toBe(2);
});

test('a reader may leave early', async () => {
  for await (const piece of model.generate(prompt, { maxNewTokens: 100, ignoreEos: true })) {
    expect(piece).not.toBe('');
    break;
  }
});

test.each([
  [{ maxNewTokens: 0 }, 'maxNewTokens'],
  [{ temperature: -1 }, 'temperature'],
  [{ temperature: NaN }, 'temperature'],
  [{ topK: 1.5 }, 'topK'],
  [{ topP: 0 }, 'topP'],
  [{ topP: 1.1 }, 'topP'],
  [{ seed: -1 }, 'seed'],
  [{ prefillChunk: 0 }, 'prefillChunk'],
  [{ stop: '' }, 'stop'],
] as [GenerateOptions, string][])('%p is refused', async (options, name) => {
  await expectRejection(generate(options), 'INVALID_ARGUMENT', name);
});

test('ids outside the vocabulary are refused', async () => {
  await expectRejection(generate({}, [1, 4096]), 'INVALID_ARGUMENT', '4096', '4095');
});

test('a key-value cache serves one run at a time, and is free again after one that was aborted', async () => {
  const ids = model.tokenizer.encode(prompt);
  const cache = model.createCache();
  const abort = new AbortController();
  const aborted = model.forward(ids, { cache, signal: abort.signal });
  const second = model.forward(ids, { cache });
  abort.abort();
  await expectRejection(second, 'INVALID_ARGUMENT', 'cache is in use by another run');
  await expectRejection(aborted, 'ABORTED');
  expect(cache.length).toBe(0);
  for (const n of [1, 2]) {
    await model.forward(ids, { cache, logits: 'none' });
    expect(cache.length).toBe(n * ids.length);
  }
  cache.dispose();
});
