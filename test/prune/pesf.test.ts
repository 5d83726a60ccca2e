/** PESF: Eq. 6, what is skipped, and that skipping an expert is the same as the expert giving nothing. */
import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { openSafetensors } from '../../lib/checkpoint/safetensors';
import { MoeModel } from '../../lib/model/model';
import type { ExpertPolicy } from '../../lib/model/policy';
import { keepsExpert, PesfPolicy, pruneExperts, pruneReport, type PruneMode } from '../../lib/prune/pesf';
import { expectError, scratch } from '../checkpoint/helpers';

const bundled = join(__dirname, '../../models/trio-moe-9m');
const text =
  'In the beginning the army marched along the river, and the ships followed it to the sea. '.repeat(8);

describe('Eq. 6', () => {
  test('is strict: an expert that reaches the threshold stays', () => {
    // 64 tokens, 4 of 16 experts: an even load of 16.
    expect(keepsExpert(8, 64, 4, 16, 0.5)).toBe(true);
    expect(keepsExpert(7, 64, 4, 16, 0.5)).toBe(false);
    expect(keepsExpert(16, 64, 4, 16, 1)).toBe(true);
    expect(keepsExpert(15, 64, 4, 16, 1)).toBe(false);
    expect(keepsExpert(0, 1, 1, 64, 1e-9)).toBe(false);
  });

  test('agrees with the formula in exact arithmetic for every alpha of two decimals', () => {
    for (const [tokens, topK, experts] of [
      [100, 1, 1],
      [512, 4, 60],
      [300, 6, 64],
      [17, 2, 8],
      [2048, 8, 128],
    ] as const) {
      for (let hundredths = 1; hundredths <= 100; hundredths++) {
        const threshold = (tokens * topK * hundredths) / (100 * experts);
        for (const count of [
          Math.floor(threshold) - 1,
          Math.floor(threshold),
          Math.ceil(threshold),
          Math.ceil(threshold) + 1,
        ]) {
          if (count < 0) continue;
          const pruned = count * experts * 100 < tokens * topK * hundredths; // integers: exact
          expect([count, hundredths, keepsExpert(count, tokens, topK, experts, hundredths / 100)]).toEqual([
            count,
            hundredths,
            !pruned,
          ]);
        }
      }
    }
  });

  test('the policy applies it to each expert and counts what it prunes', () => {
    const policy = new PesfPolicy({ alpha: 0.5 });
    const keep = new Uint8Array(4).fill(1);
    const selection = { layer: 3, tokens: 8, topK: 2, experts: 4, counts: Int32Array.of(2, 1, 0, 13) };
    expect(policy.select(selection, keep)).toBe(true); // threshold 2
    expect([...keep]).toEqual([1, 0, 0, 1]);
    expect(policy.select({ ...selection, counts: Int32Array.of(4, 4, 4, 4) }, keep)).toBe(false);
    expect([...keep]).toEqual([1, 1, 1, 1]);
    const layer = { layer: 3, sequences: 2, experts: 2 / 8, pairs: 1 / 32 };
    expect(policy.report()).toMatchObject({ alpha: 0.5, experts: 2 / 8, pairs: 1 / 32, layers: [layer] });
    policy.reset();
    expect(policy.report()).toMatchObject({ experts: 0, pairs: 0, layers: [] });
  });

  test('minTokens spares short sequences', () => {
    const policy = new PesfPolicy({ alpha: 1, minTokens: 9 });
    const keep = new Uint8Array(2).fill(1);
    const counts = Int32Array.of(8, 0);
    expect(policy.select({ layer: 0, tokens: 8, topK: 1, experts: 2, counts }, keep)).toBe(false);
    expect([...keep]).toEqual([1, 1]);
    expect(policy.report().layers).toEqual([]);
  });

  test.each([0, -0.1, 1.0001, NaN, Infinity, '0.3', undefined])('alpha %p is refused', (alpha) => {
    expectError(() => new PesfPolicy({ alpha: alpha as number }), 'INVALID_ARGUMENT', 'alpha', '(0, 1]');
  });

  test('other options out of range are refused by name', () => {
    expectError(
      () => new PesfPolicy({ alpha: 0.3, mode: 'mask' as PruneMode }),
      'INVALID_ARGUMENT',
      'mode',
      "'mask'",
    );
    expectError(() => new PesfPolicy({ alpha: 0.3, minTokens: 0 }), 'INVALID_ARGUMENT', 'minTokens');
  });
});

describe('a pruned model', () => {
  let model: MoeModel;
  let ids: number[];
  const dir = scratch();

  beforeAll(async () => {
    model = await MoeModel.load(bundled);
    ids = model.tokenizer.encode(text).slice(0, 128);
  });
  afterAll(() => model.dispose());

  /** Experts of each layer that the sequence chose less often than alpha allows. */
  function rare(indices: Int32Array, experts: number, alpha: number): Set<number> {
    const counts = new Int32Array(experts);
    for (const e of indices) if (e >= 0) counts[e]!++;
    const all = Array.from(counts.keys());
    return new Set(all.filter((e) => counts[e]! < (indices.length / experts) * alpha));
  }

  test('leaves out exactly the pairs of the rare experts of its first layer', async () => {
    const full = await model.forward(ids, { routing: true, logits: 'none' });
    using pruned = pruneExperts(model, { alpha: 0.7 });
    const result = await pruned.forward(ids, { routing: true, logits: 'none' });
    const [before, after] = [full.routing![0]!, result.routing![0]!];
    const gone = rare(before.indices, before.experts, 0.7);
    expect(gone.size).toBeGreaterThan(0);
    expect([...after.indices]).toEqual([...before.indices].map((e) => (gone.has(e) ? -1 : e)));
    expect([...after.weights]).toEqual(
      [...before.weights].map((w, i) => (gone.has(before.indices[i]!) ? 0 : w)),
    );
    const pairs = [...after.indices].filter((e) => e < 0).length / after.indices.length;
    const [layer] = pruneReport(pruned).layers;
    expect(layer).toEqual({ layer: 0, sequences: 1, experts: gone.size / after.experts, pairs });
    expect(pruneReport(pruned, { reset: true }).layers).toHaveLength(4);
    expect(pruneReport(pruned).layers).toEqual([]);
  });

  test('equals the model whose pruned experts give nothing', async () => {
    using pruned = pruneExperts(model, { alpha: 0.7 });
    const { logits, routing } = await pruned.forward(ids, { routing: true });
    // A copy of the checkpoint in which the down projections of what each layer pruned are zero.
    const copy = join(dir, 'zeroed');
    cpSync(bundled, copy, { recursive: true });
    const file = join(copy, 'model.safetensors');
    const bytes = readFileSync(file);
    const dataBegin = 8 + Number(bytes.readBigUInt64LE(0));
    const header = JSON.parse(bytes.toString('utf8', 8, dataBegin)) as Record<
      string,
      { data_offsets: [number, number] }
    >;
    let zeroed = 0;
    for (const { layer, experts, logits: raw, topK, indices } of routing!) {
      const kept = new Set(indices);
      for (let e = 0; e < experts; e++) {
        if (kept.has(e)) continue;
        const [begin, end] = header[`model.layers.${layer}.mlp.experts.${e}.down_proj.weight`]!.data_offsets;
        bytes.fill(0, dataBegin + begin, dataBegin + end);
        zeroed++;
      }
      expect(raw).toHaveLength((indices.length / topK) * experts);
    }
    expect(zeroed).toBeGreaterThan(4);
    writeFileSync(file, bytes);
    openSafetensors(file).dispose();
    using other = await MoeModel.load(copy);
    const expected = await other.forward(ids);
    let difference = 0;
    for (let i = 0; i < logits.length; i++)
      difference = Math.max(difference, Math.abs(logits[i]! - expected.logits[i]!));
    expect(difference).toBeLessThan(1e-4);
  });

  test('renormalize keeps the sum of the weights, reselect the number of experts', async () => {
    const full = (await model.forward(ids, { routing: true, logits: 'none' })).routing![0]!;
    using scaled = pruneExperts(model, { alpha: 0.7, mode: 'renormalize' });
    const renormalized = (await scaled.forward(ids, { routing: true, logits: 'none' })).routing![0]!;
    const sum = (weights: Float32Array, t: number) =>
      weights.subarray(t * 4, t * 4 + 4).reduce((a, b) => a + b, 0);
    for (let t = 0; t < ids.length; t++) {
      if (renormalized.indices.subarray(t * 4, t * 4 + 4).every((e) => e < 0)) continue;
      expect(sum(renormalized.weights, t)).toBeCloseTo(sum(full.weights, t), 5);
    }
    using moved = pruneExperts(model, { alpha: 0.7, mode: 'reselect' });
    const reselected = (await moved.forward(ids, { routing: true, logits: 'none' })).routing![0]!;
    const gone = rare(full.indices, full.experts, 0.7);
    expect([...reselected.indices].some((e) => e < 0 || gone.has(e))).toBe(false);
  });

  test.each(['drop', 'renormalize', 'reselect'] as const)(
    'mode %s: the layers prune by themselves as when the policy is asked',
    async (mode) => {
      const lengths = [60, 1, 7, 40];
      const batch = {
        ids: Int32Array.from(ids.slice(0, 108)),
        sequences: lengths.map((length) => ({ length })),
      };
      const run = async (policy: ExpertPolicy) =>
        model.decoder.run(batch, { policy }, (frame) => frame.read(model.decoder.h));
      const [own, asked] = [1, 2].map(() => new PesfPolicy({ alpha: 0.7, mode, minTokens: 8 })) as [
        PesfPolicy,
        PesfPolicy,
      ];
      const result = await run(own);
      expect(result).toEqual(await run({ mode, select: (...args) => asked.select(...args) }));
      expect(own.report()).toEqual(asked.report());
      expect(own.report().layers[0]).toMatchObject({ sequences: 2 });
      expect(own.report().experts).toBeGreaterThan(0);
    },
  );

  test('counts each sequence by itself', async () => {
    const seen: number[][] = [];
    const spy: ExpertPolicy = {
      mode: 'drop',
      select: ({ layer, tokens, counts }) => {
        if (layer === 0) seen.push([tokens, counts.reduce((a, b) => a + b, 0)]);
        return false;
      },
    };
    const batch = { ids: Int32Array.from(ids), sequences: [{ length: 100 }, { length: 27 }, { length: 1 }] };
    await model.decoder.run(batch, { policy: spy }, () => undefined);
    expect(seen).toEqual([
      [100, 400],
      [27, 108],
    ]);
  });

  test('shares the weights, and does not prune while decoding', async () => {
    const pruned = pruneExperts(model, { alpha: 0.3 });
    const pieces = pruned.generate(ids, { maxNewTokens: 4, ignoreEos: true });
    while (!(await pieces.next()).done);
    expect(pruneReport(pruned).layers.map((l) => l.sequences)).toEqual([1, 1, 1, 1]);
    pruned.dispose();
    await expect(model.forward(ids.slice(0, 2))).resolves.toBeDefined();
    expectError(() => pruneReport(model), 'INVALID_ARGUMENT', 'pruneExperts');
  });

  test("a policy of one's own prunes what it says", async () => {
    const policy: ExpertPolicy = {
      mode: 'drop',
      select: ({ layer }, keep) => {
        if (layer !== 2) return false;
        keep.fill(0);
        return true;
      },
    };
    using custom = model.withPolicy(policy);
    const { routing } = await custom.forward(ids, { routing: true, logits: 'none' });
    expect(routing!.map(({ indices }) => indices.every((e) => e < 0))).toEqual([false, false, true, false]);
  });
});
