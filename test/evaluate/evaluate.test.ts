/** Evaluation against the definitions, computed here from plain logits, and against the reference's figures. */
import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { evaluate, type EvaluateOptions, type EvaluateProgress } from '../../lib/evaluate';
import { MoeModel } from '../../lib/model/model';
import { pruneExperts } from '../../lib/prune/pesf';
import { describeWith, expectRejection, scratch, shared } from '../checkpoint/helpers';

const bundled = join(__dirname, '../../models/trio-moe-9m');
const dir = scratch();
const text =
  'The ship sailed along the coast for three days, and 12 + 7 = 19.\ndef add(a, b):\n    return a + b\n'.repeat(
    9,
  );

let model: MoeModel;
/** The same model with noise in its weights. */
let noisy: MoeModel;
let ids: number[];

beforeAll(async () => {
  model = await MoeModel.load(bundled);
  noisy = await MoeModel.load(withNoise(join(dir, 'noisy')));
  ids = model.tokenizer.encode(text);
});
afterAll(() => {
  model.dispose();
  noisy.dispose();
});

/** A copy of the model whose routers and experts have their lower mantissa bits turned over. */
function withNoise(copy: string): string {
  cpSync(bundled, copy, { recursive: true });
  const file = join(copy, 'model.safetensors');
  const bytes = readFileSync(file);
  const begin = 8 + Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.toString('utf8', 8, begin)) as Record<
    string,
    { data_offsets?: [number, number] }
  >;
  for (const [name, { data_offsets: at }] of Object.entries(header)) {
    if (!at || !/mlp\.(gate|experts)/.test(name)) continue;
    for (let i = begin + at[0]; i < begin + at[1]; i += 2) bytes[i] = bytes[i]! ^ (i % 7 === 0 ? 0x50 : 0x08);
  }
  writeFileSync(file, bytes);
  return copy;
}

/** log softmax of one row of logits, in double precision. */
function logSoftmax(logits: Float32Array, row: number, vocab: number): Float64Array {
  const values = Float64Array.from(logits.subarray(row * vocab, (row + 1) * vocab));
  const max = values.reduce((a, b) => Math.max(a, b));
  const sum = values.reduce((a, b) => a + Math.exp(b - max), 0);
  return values.map((v) => v - max - Math.log(sum));
}

describe('on a text', () => {
  const seqLen = 48;

  test('perplexity, KL and shift are what their definitions say', async () => {
    const vocab = model.architecture.vocabSize;
    const windows = 3;
    let [nll, kl, n] = [0, 0, 0];
    const changed = new Float64Array(4);
    for (let w = 0; w < windows; w++) {
      const window = ids.slice(w * seqLen, (w + 1) * seqLen);
      const p = await model.forward(window, { routing: true });
      const q = await noisy.forward(window, { routing: true });
      for (let t = 0; t + 1 < seqLen; t++, n++) {
        const [lp, lq] = [logSoftmax(p.logits, t, vocab), logSoftmax(q.logits, t, vocab)];
        nll -= lq[window[t + 1]!]!;
        for (let j = 0; j < vocab; j++) kl += Math.exp(lp[j]!) * (lp[j]! - lq[j]!);
      }
      for (const [l, { indices }] of p.routing!.entries()) {
        for (let t = 0; t < seqLen; t++) {
          const set = (i: Int32Array) => [...i.subarray(t * 4, t * 4 + 4)].sort((a, b) => a - b).join();
          if (set(indices) !== set(q.routing![l]!.indices)) changed[l]! += 1 / (windows * seqLen);
        }
      }
    }
    const result = await evaluate(noisy, {
      perplexity: text,
      seqLen,
      maxTokens: windows * seqLen + 5,
      reference: model,
    });
    expect(result).toMatchObject({ tokens: windows * seqLen, windows });
    expect(result.perplexity).toBeCloseTo(Math.exp(nll / n), 3);
    expect(result.kl).toBeGreaterThan(0.001);
    expect(result.kl).toBeCloseTo(kl / n, 5);
    expect(result.expertShift!.layers.map((l) => l.changedAny)).toEqual(
      [...changed].map((c) => expect.closeTo(c, 9)),
    );
    expect(result.expertShift!.changedAny).toBeGreaterThan(0.01);
    expect(result.expertShift!.changedAny).toBeCloseTo(changed.reduce((a, b) => a + b, 0) / 4, 9);
    expect(result.prunedExperts).toBeUndefined();
  });

  test('the last, shorter window is dropped, and ids do as well as their text', async () => {
    const whole = await evaluate(model, { perplexity: ids, seqLen });
    expect(whole.tokens).toBe(Math.floor(ids.length / seqLen) * seqLen);
    const cut = await evaluate(model, { perplexity: Int32Array.from(ids.slice(0, whole.tokens)), seqLen });
    expect(cut.perplexity).toBe(whole.perplexity);
    expect((await evaluate(model, { perplexity: text, seqLen })).perplexity).toBe(whole.perplexity);
  });

  test('a model does not differ from itself', async () => {
    const { kl, expertShift } = await evaluate(model, { perplexity: ids, seqLen, reference: model });
    expect(kl).toBeCloseTo(0, 9);
    expect(expertShift).toMatchObject({ changedAny: 0, changedHalf: 0, changedAll: 0 });
  });

  test('of a pruned model: what was skipped, and the routers before pruning', async () => {
    using pruned = pruneExperts(model, { alpha: 0.7 });
    const one = { perplexity: ids.slice(0, seqLen), seqLen };
    const result = await evaluate(pruned, { ...one, reference: model });
    const { routing } = await pruned.forward(ids.slice(0, seqLen), { routing: true, logits: 'none' });
    const skipped = routing!.map(({ indices }) => indices.filter((e) => e < 0).length);
    const unused = routing!.map(
      ({ indices, experts }) => experts - new Set(indices.filter((e) => e >= 0)).size,
    );
    expect(result.prunedPairs).toBeCloseTo(skipped.reduce((a, b) => a + b) / (4 * 4 * seqLen), 9);
    expect(result.prunedExperts).toBeCloseTo(unused.reduce((a, b) => a + b) / (4 * 16), 9);
    expect(result.expertShift!.layers[0]!.changedAny).toBe(0);
    expect(result.kl).toBeGreaterThan(0);
  });

  test('causal: the second half, under counts of the first', async () => {
    const half = seqLen / 2;
    const window = ids.slice(0, seqLen);
    const vocab = model.architecture.vocabSize;
    const { logits, routing } = await model.forward(window, { routing: true });
    const from = (l: Float32Array, first: number, row: number) =>
      -logSoftmax(l, row - first, vocab)[window[row + 1]!]!;
    const plain = await evaluate(model, { perplexity: window, seqLen, causal: true });
    let nll = 0;
    for (let t = half - 1; t + 1 < seqLen; t++) nll += from(logits, 0, t);
    expect(plain.causal).toEqual({
      perplexity: expect.closeTo(Math.exp(nll / half), 3) as number,
      tokens: half,
    });

    // The same by hand: unpruned first half into a cache, then a second half that may use only the experts that the first used enough.
    const keep = routing!.map(({ indices, experts }) => {
      const counts = new Int32Array(experts);
      for (const e of indices.subarray(0, half * 4)) counts[e]!++;
      return Uint8Array.from(counts, (c) => (c < ((half * 4) / experts) * 0.7 ? 0 : 1));
    });
    using byHand = model.withPolicy({
      mode: 'drop',
      select: ({ layer }, mask) => {
        mask.set(keep[layer]!);
        return true;
      },
    });
    const cache = model.createCache();
    const first = await model.forward(window.slice(0, half), { cache, logits: 'last' });
    const second = await byHand.forward(window.slice(half), { cache });
    nll = from(first.logits, half - 1, half - 1);
    for (let t = half; t + 1 < seqLen; t++) nll += from(second.logits, half, t);
    using pruned = pruneExperts(model, { alpha: 0.7 });
    const { causal } = await evaluate(pruned, { perplexity: window, seqLen, causal: true });
    expect(causal!.perplexity).toBeCloseTo(Math.exp(nll / half), 3);
    expect(causal!.perplexity).not.toBeCloseTo(plain.causal!.perplexity, 3);
  });
});

describe('multiple choice', () => {
  const rows = [
    { context: 'The ship sailed along the', choices: [' coast', ' of of of of'], answer: 0 },
    { context: 'def add(a, b):\n    return', choices: [' a', ' a + b\n', ' zebra zebra'], answer: 1 },
    { context: 'a', choices: ['b', ' man'], answer: 1 },
  ];

  test('is the likelihood of each choice, by itself and by the byte', async () => {
    const vocab = model.architecture.vocabSize;
    let [acc, accuracy] = [0, 0];
    for (const { context, choices, answer } of rows) {
      const likelihoods: number[] = [];
      for (const choice of choices) {
        const before = model.tokenizer.encode(context);
        const all = [...before, ...model.tokenizer.encode(choice)];
        const { logits } = await model.forward(all);
        let sum = 0;
        for (let t = before.length; t < all.length; t++) sum += logSoftmax(logits, t - 1, vocab)[all[t]!]!;
        likelihoods.push(sum);
      }
      const best = (values: number[]) => values.indexOf(Math.max(...values));
      if (best(likelihoods) === answer) acc++;
      if (best(likelihoods.map((l, i) => l / Buffer.byteLength(choices[i]!))) === answer) accuracy++;
    }
    const result = await evaluate(model, { choices: rows });
    expect(result.choices).toEqual({ accuracy: accuracy / 3, acc: acc / 3, n: 3 });
    expect(result.perplexity).toBeUndefined();
  });

  test('of a pruned model counts context and choice together', async () => {
    const tokens: number[] = [];
    using spied = model.withPolicy({
      mode: 'drop',
      select: (selection) => {
        if (selection.layer === 0) tokens.push(selection.tokens);
        return false;
      },
    });
    const [row] = rows;
    const plain = await evaluate(model, { choices: rows });
    expect((await evaluate(spied, { choices: rows })).choices).toEqual(plain.choices);
    const length = (t: string) => model.tokenizer.encode(t).length;
    expect(tokens.slice(0, 2)).toEqual(
      row!.choices.map((choice) => length(row!.context) + length(choice) - 1),
    );
  });

  test.each([
    [[], 'at least one row'],
    [[{ context: '', choices: ['a', 'b'], answer: 0 }], 'row 1: context'],
    [[{ context: 'a', choices: ['a'], answer: 0 }], 'row 1: choices'],
    [[rows[0], { context: 'a', choices: ['a', ''], answer: 0 }], 'row 2: choices'],
    [
      [{ context: 'a', choices: ['a', 'b'], answer: 2 }],
      'row 1: answer must be an integer from 0 to 1; found 2',
    ],
    [[{ context: 'a', choices: ['a', 'b'], answer: '0' }], 'row 1: answer'],
    [[null], 'row 1: context'],
    [[{ context: 'word '.repeat(2000), choices: ['a', 'b'], answer: 0 }], 'the model was made for 1024'],
  ])('%j is refused', async (choices, message) => {
    await expectRejection(
      evaluate(model, { choices: choices as EvaluateOptions['choices'] }),
      'INVALID_ARGUMENT',
      message,
    );
  });
});

describe('options', () => {
  test.each([
    [{}, 'nothing to evaluate'],
    [{ perplexity: 'short' }, 'fewer than one window of seqLen 512'],
    [{ perplexity: '' }, '0 tokens'],
    [{ perplexity: [1, 2, 4096], seqLen: 3 }, 'perplexity[2] is 4096'],
    [{ perplexity: text, seqLen: 1 }, 'seqLen'],
    [{ perplexity: text, seqLen: 1025 }, '1024'],
    [{ perplexity: text, seqLen: 3, causal: true }, 'from 4'],
    [{ perplexity: text, seqLen: 64, maxTokens: 63 }, 'maxTokens'],
    [{ choices: [{ context: 'a', choices: ['b', 'c'], answer: 0 }], causal: true }, 'causal needs a text'],
  ] as [EvaluateOptions, string][])('%j is refused', async (options, message) => {
    await expectRejection(evaluate(model, options), 'INVALID_ARGUMENT', message);
  });

  test('a reference must fit', async () => {
    await expectRejection(
      evaluate(model, { choices: [], reference: model }),
      'INVALID_ARGUMENT',
      'reference needs a text',
    );
  });

  test('progress grows to 1', async () => {
    const seen: EvaluateProgress[] = [];
    await evaluate(model, {
      perplexity: ids,
      seqLen: 64,
      reference: model,
      causal: true,
      choices: [{ context: 'a', choices: ['b', 'c'], answer: 0 }],
      onProgress: (p) => seen.push(p),
    });
    expect(new Set(seen.map((p) => p.stage))).toEqual(new Set(['perplexity', 'causal', 'choices']));
    const fractions = seen.map((p) => p.fraction);
    expect(fractions).toEqual([...fractions].sort((a, b) => a - b));
    expect(fractions.at(-1)).toBeCloseTo(1, 9);
  });

  test('an AbortSignal stops it', async () => {
    const controller = new AbortController();
    const onProgress = () => controller.abort();
    const options = { perplexity: ids, seqLen: 64, causal: true, onProgress, signal: controller.signal };
    await expectRejection(evaluate(model, options), 'ABORTED');
    await expectRejection(evaluate(model, { perplexity: text, signal: AbortSignal.abort() }), 'ABORTED');
  });
});

describeWith('goldens/qwen2_moe', 'a reference of another shape', () => {
  test('is refused', async () => {
    using other = await MoeModel.load(join(shared, 'goldens/qwen2_moe'));
    await expectRejection(
      evaluate(model, { perplexity: text, reference: other }),
      'INVALID_ARGUMENT',
      'reference',
      'qwen2_moe',
    );
  });
});

describeWith('data/heldout', 'the reference figures', () => {
  // transformers 5, float32, the first 8 windows of 512 tokens.
  test.each([
    ['prose', 51.65389],
    ['math', 20.95613],
    ['code', 14.4755],
  ])('perplexity of %s', async (domain, expected) => {
    const heldout = readFileSync(join(shared, `data/heldout/${domain}.txt`), 'utf8');
    const { perplexity } = await evaluate(model, { perplexity: heldout, maxTokens: 8 * 512 });
    expect(Math.abs(perplexity! / expected - 1)).toBeLessThan(1e-4);
  });
});
