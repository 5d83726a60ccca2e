/**
 * Every supported family against Hugging Face transformers in float32: logits, hidden states after each layer, what the routers say,
 * and greedy continuation, however the tokens are fed.
 */
import { cpSync, existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { SUPPORTED_MODEL_TYPES } from '../../lib/architecture';
import { openSafetensors } from '../../lib/checkpoint/safetensors';
import { MoeModel } from '../../lib/model/model';
import type { KvCache, Tensor } from '../../types/native';
import { describeWith, scratch, shared } from '../checkpoint/helpers';
import { shows } from '../families/shows';

/** Largest difference of the logits, relative to their standard deviation. */
const TOLERANCE = 2e-4;

const ROWS = 2;
const LENGTH = 40;

/** The outputs of one row, [LENGTH, width] each. */
interface Outputs {
  logits: number[];
  /** By layer; entry 0 is the embedding, the last one comes after the final norm. */
  hidden: number[][];
  /** By layer that has a router. */
  router: Map<number, { logits: number[]; weights: number[]; indices: number[] }>;
}

interface Golden {
  ids: Int32Array[];
  rows: Outputs[];
  greedy: number[];
}

function readGolden(dir: string, experts: number): Golden {
  const file = openSafetensors(join(dir, 'golden.safetensors'));
  const all = (name: string) => Array.from(file.tensor(name).toArray());
  const row = (name: string, r: number) => {
    const values = all(name);
    const size = values.length / ROWS;
    return values.slice(r * size, (r + 1) * size);
  };
  const names = [...file.tensors.keys()];
  const layers = new Set(names.flatMap((n) => /^router:model\.layers\.(\d+)\./.exec(n)?.[1] ?? []));
  const router = (layer: string, r: number) => {
    const of = names.filter((n) => n.startsWith(`router:model.layers.${layer}.`));
    const info = (n: string) => file.info(n);
    const pick = (found: (n: string) => boolean) => row(of.find(found)!, r);
    const isLogits = (n: string) => info(n).dtype === 'F32' && info(n).shape[1] === experts;
    return {
      logits: pick(isLogits),
      weights: pick((n) => info(n).dtype === 'F32' && !isLogits(n)),
      indices: pick((n) => info(n).dtype === 'I32'),
    };
  };
  const golden = {
    ids: [0, 1].map((r) => Int32Array.from(row('input_ids', r))),
    rows: [0, 1].map((r) => ({
      logits: row('logits', r),
      hidden: names
        .filter((n) => n.startsWith('hidden.'))
        .sort()
        .map((n) => row(n, r)),
      router: new Map([...layers].map((layer) => [Number(layer), router(layer, r)])),
    })),
    greedy: all('greedy_ids'),
  };
  file.dispose();
  return golden;
}

/** The final norm on rows of hidden states, in doubles. */
function finalNorm(model: MoeModel, hidden: number[]): number[] {
  const { norm } = model.architecture;
  const weight = model.checkpoint.tensor(norm.weight).toArray();
  const bias = norm.bias ? model.checkpoint.tensor(norm.bias).toArray() : undefined;
  const out: number[] = [];
  for (let at = 0; at < hidden.length; at += norm.size) {
    const row = hidden.slice(at, at + norm.size);
    const mean = norm.kind === 'layer' ? row.reduce((a, b) => a + b, 0) / norm.size : 0;
    const variance = row.reduce((sum, v) => sum + (v - mean) ** 2, 0) / norm.size;
    for (const [i, v] of row.entries()) {
      out.push(((v - mean) / Math.sqrt(variance + norm.eps)) * weight[i]! + (bias?.[i] ?? 0));
    }
  }
  return out;
}

function emptyOutputs(model: MoeModel): Outputs {
  const moe = model.architecture.layers.flatMap((layer, i) => (layer.feedForward.kind === 'moe' ? [i] : []));
  return {
    logits: [],
    hidden: Array.from({ length: model.architecture.layers.length + 1 }, () => []),
    router: new Map(moe.map((i) => [i, { logits: [], weights: [], indices: [] }])),
  };
}

function append(to: number[], values: ArrayLike<number>): void {
  for (let i = 0; i < values.length; i++) to.push(values[i]!);
}

/** One sequence, in pieces of these lengths. */
async function forward(model: MoeModel, ids: Int32Array, pieces: number[]): Promise<Outputs> {
  const outputs = emptyOutputs(model);
  const cache = pieces.length > 1 ? model.createCache() : undefined;
  let at = 0;
  for (const length of pieces) {
    const piece = ids.subarray(at, (at += length));
    const { logits, hiddenStates, routing } = await model.forward(piece, {
      cache,
      hiddenStates: true,
      routing: true,
    });
    append(outputs.logits, logits);
    hiddenStates!.forEach((h, i) => append(outputs.hidden[i]!, h));
    for (const { layer, ...said } of routing!) {
      for (const key of ['logits', 'weights', 'indices'] as const)
        append(outputs.router.get(layer)![key], said[key]);
    }
  }
  expect(at).toBe(ids.length);
  cache?.dispose();
  outputs.hidden.push(finalNorm(model, outputs.hidden.pop()!));
  return outputs;
}

/** Both sequences in one batch at a time: `steps` are their lengths in each. */
async function forwardBatches(model: MoeModel, rows: Int32Array[], steps: number[][]): Promise<Outputs[]> {
  const { decoder } = model;
  const outputs = rows.map(() => emptyOutputs(model));
  const caches = rows.map(() => model.createCache());
  const at = rows.map(() => 0);
  /** Gives each sequence its rows of a register that holds one row a token. */
  const share = (values: ArrayLike<number>, lengths: number[], to: (r: number) => number[]) => {
    const width = values.length / lengths.reduce((a, b) => a + b, 0);
    let begin = 0;
    for (const [r, length] of lengths.entries()) {
      append(to(r), Array.prototype.slice.call(values, begin * width, (begin + length) * width));
      begin += length;
    }
  };
  for (const lengths of steps) {
    const sequences = lengths.map((length, r) => ({ length, cache: caches[r]! }));
    const ids = rows.flatMap((row, r) => [...row.subarray(at[r]!, (at[r]! += lengths[r]!))]);
    const batch = { ids: Int32Array.from(ids), sequences };
    share(
      await decoder.embed({ ids: batch.ids, sequences: [{ length: ids.length }] }),
      lengths,
      (r) => outputs[r]!.hidden[0]!,
    );
    await decoder.run(
      batch,
      {
        onLayer: (layer, { registers }, frame) => {
          share(frame.read(decoder.h), lengths, (r) => outputs[r]!.hidden[layer + 1]!);
          if (!registers.moe) return;
          for (const key of ['logits', 'weights', 'indices'] as const) {
            share(frame.read(registers.moe[key]), lengths, (r) => outputs[r]!.router.get(layer)![key]);
          }
        },
      },
      async (frame) => {
        const logits: number[] = [];
        await decoder.logits(frame.tensor(decoder.h), (part: Tensor) => append(logits, part.toArray()));
        share(logits, lengths, (r) => outputs[r]!.logits);
      },
    );
  }
  for (const cache of caches) cache.dispose();
  for (const o of outputs) o.hidden.push(finalNorm(model, o.hidden.pop()!));
  return outputs;
}

const deviation = (values: number[]) => {
  const mean = values.reduce((a, b) => a + b, 0) / values.length;
  return Math.sqrt(values.reduce((sum, v) => sum + (v - mean) ** 2, 0) / values.length);
};

/** Largest difference, relative to `scale`. */
function difference(found: number[], expected: number[], scale = deviation(expected)): number {
  expect(found.length).toBe(expected.length);
  return found.reduce((d, v, i) => Math.max(d, Math.abs(v - expected[i]!)), 0) / scale;
}

/** The chosen experts of each token by rising index. */
function byExpert(
  weights: number[],
  indices: number[],
  topK: number,
): { weights: number[]; indices: number[] } {
  const order = indices
    .map((_, i) => i)
    .sort((a, b) => Math.floor(a / topK) - Math.floor(b / topK) || indices[a]! - indices[b]!);
  return { weights: order.map((i) => weights[i]!), indices: order.map((i) => indices[i]!) };
}

function expectOutputs(found: Outputs, expected: Outputs, topK: number): void {
  expect(difference(found.logits, expected.logits)).toBeLessThan(TOLERANCE);
  expect(found.hidden.length).toBe(expected.hidden.length);
  for (const [i, h] of found.hidden.entries())
    expect(difference(h, expected.hidden[i]!)).toBeLessThan(TOLERANCE);
  expect([...found.router.keys()].sort()).toEqual([...expected.router.keys()].sort());
  for (const [layer, { logits, weights, indices }] of found.router) {
    const golden = expected.router.get(layer)!;
    expect(difference(logits, golden.logits)).toBeLessThan(TOLERANCE);
    // Some families' reference leaves the chosen experts in no order.
    const [ours, theirs] = [byExpert(weights, indices, topK), byExpert(golden.weights, golden.indices, topK)];
    expect(ours.indices).toEqual(theirs.indices);
    expect(difference(ours.weights, theirs.weights, 1)).toBeLessThan(TOLERANCE);
  }
}

function argmax(values: Float32Array): number {
  return values.reduce((best, v, i) => (v > values[best]! ? i : best), 0);
}

/** Greedy continuation of the first tokens, fed in pieces of these lengths. */
async function continueGreedily(
  model: MoeModel,
  prompt: number[],
  pieces: number[],
  count: number,
): Promise<number[]> {
  const cache: KvCache = model.createCache();
  const ids: number[] = [];
  let [at, last] = [0, 0];
  for (const length of pieces) {
    const { logits } = await model.forward(prompt.slice(at, (at += length)), { cache, logits: 'last' });
    last = argmax(logits);
  }
  while (ids.push(last) < count)
    last = argmax((await model.forward([last], { cache, logits: 'last' })).logits);
  cache.dispose();
  return ids;
}

const tokenByToken = (n: number) => Array<number>(n).fill(1);

const WAYS: [string, number[]][] = [
  ['in one prefill', [LENGTH]],
  ['in a chunked prefill', [7, 20, 13]],
  ['token by token', tokenByToken(LENGTH)],
];

const BATCHES: [string, number[][]][] = [
  ['in one prefill', [[LENGTH, LENGTH]]],
  ['in uneven pieces', [[25, 3], [1, 30], [14, 7]]], // prettier-ignore
  ['token by token', tokenByToken(LENGTH).map(() => [1, 1])],
];

for (const family of SUPPORTED_MODEL_TYPES) {
  const title = `${family} gives what transformers gives ${shows(family, 'forward')}`;
  describeWith(`goldens/${family}/golden.safetensors`, title, () => {
    const dir = join(shared, 'goldens', family);
    let model: MoeModel;
    let golden: Golden;
    let topK: number;
    beforeAll(async () => {
      model = await MoeModel.load(dir);
      const [router] = model.architecture.layers.flatMap(({ feedForward: f }) =>
        f.kind === 'moe' ? [f.router] : [],
      );
      topK = router!.topK;
      golden = readGolden(dir, router!.out);
    });
    afterAll(() => model.dispose());

    const copy = scratch();
    test('an expert under another name is missed by its own', async () => {
      cpSync(dir, copy, { recursive: true });
      const file = readdirSync(copy).find((name) => /^model.*safetensors$/.test(name))!;
      const bytes = readFileSync(join(copy, file));
      const header = bytes.subarray(8, 8 + Number(bytes.readBigUInt64LE(0)));
      const tensor = /"([^"]*(experts\.\d|experts\.down_proj|output_linear)[^"]*)"/.exec(
        header.toString('latin1'),
      )![1]!;
      const renamed = header.toString('latin1').replace(`"${tensor}"`, `"${tensor.slice(0, -1)}X"`);
      header.write(renamed, 'latin1');
      writeFileSync(join(copy, file), bytes);
      const index = join(copy, 'model.safetensors.index.json');
      if (existsSync(index)) {
        writeFileSync(index, readFileSync(index, 'utf8').replace(`"${tensor}"`, `"${tensor.slice(0, -1)}X"`));
      }
      await expect(MoeModel.load(copy)).rejects.toMatchObject({
        code: 'INVALID_TENSOR',
        message: expect.stringContaining(tensor) as string,
      });
    });

    test.each(WAYS)('%s', async (_, pieces) => {
      for (const [r, ids] of golden.ids.entries())
        expectOutputs(await forward(model, ids, pieces), golden.rows[r]!, topK);
    });

    test.each(BATCHES)('as a batch of two, %s', async (_, steps) => {
      const found = await forwardBatches(model, golden.ids, steps);
      for (const [r, outputs] of found.entries()) expectOutputs(outputs, golden.rows[r]!, topK);
    });

    test.each([
      ['in one prefill', [16]],
      ['in a chunked prefill', [3, 8, 5]],
      ['token by token', tokenByToken(16)],
    ])('greedy continuation, prompt %s', async (_, pieces) => {
      const { greedy } = golden;
      expect(await continueGreedily(model, greedy.slice(0, 16), pieces, 24)).toEqual(greedy.slice(16));
    });
  });
}
