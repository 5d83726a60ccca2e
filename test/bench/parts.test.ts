/** What benchmarks are made of: shapes, routing, statistics, loads. */
import { readFileSync } from 'node:fs';
import { EacMoeError } from '../../lib/errors';
import { distinctExperts, uniformSteps } from '../../lib/bench/experts';
import { bundledSource, measureLoads, resampleLoads, sortedShares } from '../../lib/bench/loads';
import { pesfSavings, prunePesf } from '../../lib/bench/pesf';
import {
  inclusionProbabilities,
  loadedRouting,
  rotatingRouting,
  uniformRouting,
} from '../../lib/bench/routing';
import { expertOperations, parseShape, SHAPES } from '../../lib/bench/shapes';
import { measure, summarize } from '../../lib/bench/timing';
import { seededRandom } from '../../lib/model/random';
import { PesfPolicy } from '../../lib/prune/pesf';
import { expertLoads, header } from '../../scripts/cuda/expert-loads';

const counted = (indices: Int32Array, experts: number) => {
  const counts = new Array<number>(experts).fill(0);
  for (const e of indices) counts[e]!++;
  return counts;
};

describe('shapes', () => {
  test('by name and by numbers', () => {
    expect(parseShape('Mixtral')).toEqual({
      name: 'mixtral',
      hidden: 4096,
      width: 14336,
      experts: 8,
      topK: 2,
    });
    expect(parseShape('64, 96,8,2')).toEqual({
      name: '64,96,8,2',
      hidden: 64,
      width: 96,
      experts: 8,
      topK: 2,
    });
    for (const shape of SHAPES) expect(parseShape(shape.name)).toBe(shape);
  });

  test.each([
    ['llama', /qwen1\.5-moe.*H,I,E,K/],
    ['64,64,8', /H,I,E,K/],
    ['64,64,8,2,1', /H,I,E,K/],
    ['64,64,8,0', /H,I,E,K/],
    ['64,64,8,1.5', /H,I,E,K/],
    ['64,,8,2', /H,I,E,K/],
    ['64,40,8,2', /multiples of 32/],
    ['64,64,4,5', /5 experts a token of only 4/],
  ])('%s is no shape', (text, message) => {
    expect(() => parseShape(text)).toThrow(EacMoeError);
    expect(() => parseShape(text)).toThrow(message);
  });

  test('operations: two a weight of gate, up and down', () => {
    // 4 experts of Qwen1.5-MoE: 34.6 million weights.
    expect(expertOperations(SHAPES[0]!, 4)).toBe(69_206_016);
  });
});

describe('routing', () => {
  test('uniform: seeded, different experts a token, all equally likely', () => {
    const [tokens, experts, topK] = [6000, 12, 3];
    const indices = uniformRouting(tokens, experts, topK, seededRandom(3));
    expect(indices).toEqual(uniformRouting(tokens, experts, topK, seededRandom(3)));
    expect(indices).not.toEqual(uniformRouting(tokens, experts, topK, seededRandom(4)));
    for (let t = 0; t < tokens; t++) {
      expect(new Set(indices.subarray(t * topK, (t + 1) * topK)).size).toBe(topK);
    }
    // 1500 each, standard deviation 34.
    for (const count of counted(indices, experts)) expect(Math.abs(count - 1500)).toBeLessThan(170);
  });

  test('rotating: no expert twice before all had their turn', () => {
    const deal = rotatingRouting(12, 4, seededRandom(1));
    for (let round = 0; round < 3; round++) {
      const hands = [deal(), deal(), deal()].flatMap((hand) => [...hand]);
      expect(new Set(hands).size).toBe(12);
    }
    // 60 is no multiple of 8: what is left of a deck is not dealt.
    const odd = rotatingRouting(60, 8, seededRandom(1));
    for (let i = 0; i < 30; i++) expect(distinctExperts(odd())).toBe(8);
  });

  test('steps of a benchmark touch every expert of every layer', () => {
    const shape = parseShape('32,32,12,4');
    const steps = uniformSteps(shape, 1, 5, 0);
    expect(steps).toHaveLength(15);
    for (let layer = 0; layer < 5; layer++) {
      const own = steps.filter((_, i) => i % 5 === layer).flatMap((s) => [...s]);
      expect(new Set(own).size).toBe(12);
    }
    expect(uniformSteps(shape, 8, 5, 0).map((s) => s.length)).toEqual([32, 32, 32, 32, 32]);
  });

  test('under given loads: shares as asked, no expert twice, at most once a token', () => {
    const loads = Float64Array.of(0.6, 0.1, 0.1, 0.1, 0.06, 0.04);
    expect([...inclusionProbabilities(loads, 2)].map((p) => p.toFixed(3))).toEqual(
      ['1.000', '0.250', '0.250', '0.250', '0.150', '0.100'], // the favourite is cut at once a token
    );
    const tokens = 8000;
    const indices = loadedRouting(tokens, loads, 2, seededRandom(5));
    expect(indices).toEqual(loadedRouting(tokens, loads, 2, seededRandom(5)));
    for (let t = 0; t < tokens; t++) expect(indices[2 * t]).not.toBe(indices[2 * t + 1]);
    const shares = counted(indices, 6).map((count) => count / tokens);
    [1, 0.25, 0.25, 0.25, 0.15, 0.1].forEach((want, e) =>
      expect(Math.abs(shares[e]! - want)).toBeLessThan(0.02),
    );
  });
});

describe('timing', () => {
  test('median, minimum and 90th percentile', () => {
    expect(summarize([5, 1, 3])).toEqual({ median: 3, min: 1, p90: 5, samples: 3, relative: 1 });
    expect(summarize([4, 1, 3, 2])).toMatchObject({ median: 2.5, min: 1, p90: 4, samples: 4 });
    expect(summarize(Array.from({ length: 20 }, (_, i) => 20 - i)).p90).toBe(18);
    // Twice the time at first, half of it at the end, whatever the machine did in between.
    expect(summarize([2, 30, 20], [1, 20, 40]).relative).toBe(1.5);
  });

  test('the machine and the cases take turns after one call of warm-up each', async () => {
    const order: string[] = [];
    const rates = { readBandwidth: 1, fmaPeak: 2, int8Peak: 3 };
    const meter = { pass: async () => (order.push('-'), rates) };
    const fake = (name: string) => ({
      parameters: {},
      bytes: 0,
      operations: 0,
      arithmetic: 'float32' as const,
      run: async () => {
        order.push(name);
        const begun = performance.now();
        while (performance.now() - begun < 11);
      },
    });
    const [a, b] = await measure([fake('a'), fake('b')], { seconds: 0.001, meter });
    expect([a!.seconds.length, b!.seconds.length]).toEqual([3, 3]);
    expect(a!.beside).toEqual([rates, rates, rates]);
    expect(Math.min(...a!.seconds)).toBeGreaterThan(0.01);
    expect(order.join('')).toBe('aabb-ab-ab-ab');
    const aborted = measure([fake('a')], { seconds: 1, meter, signal: AbortSignal.abort() });
    await expect(aborted).rejects.toMatchObject({ code: 'ABORTED' });
  });
});

describe('expert loads', () => {
  test('sorted shares of a window', () => {
    expect([...sortedShares(Int32Array.of(2, 0, 2, 1, 2, 0, 2, 0), 4)]).toEqual([0.5, 0.375, 0.125, 0]);
  });

  test('resampled: the same spread over another number of experts', () => {
    const loads = Float64Array.of(0.4, 0.3, 0.2, 0.1);
    expect([...resampleLoads(loads, 4)]).toEqual([...loads].map((v) => expect.closeTo(v, 12) as number));
    expect([...resampleLoads(loads, 2)]).toEqual([expect.closeTo(0.7, 12), expect.closeTo(0.3, 12)]);
    const many = resampleLoads(loads, 60);
    expect(many.reduce((a, b) => a + b)).toBeCloseTo(1, 12);
    expect(many.every((v, i) => i === 0 || v <= many[i - 1]!)).toBe(true);
    expect(many[0]! * 60).toBeCloseTo(0.4 * 4, 1); // relative to the mean, the favourite stays what it was
  });

  test('of the bundled model: skewed, one a layer', async () => {
    const { model, texts } = bundledSource();
    const loads = await measureLoads({ model, texts: texts.slice(0, 1) });
    expect(loads).toHaveLength(4);
    for (const load of loads) {
      expect(load).toHaveLength(16);
      expect(load.reduce((a, b) => a + b)).toBeCloseTo(1, 6);
      expect(load[0]!).toBeGreaterThan(2 * load[15]!);
    }
  });

  test('those of the CUDA check program are as measured: npm run cuda:loads', async () => {
    const table = readFileSync(header, 'utf8').split('expert_loads = {')[1]!;
    const entries = table.split('}}').map((entry) => entry.match(/[\d.]+/g)?.map(Number));
    const written = entries.filter((entry) => entry !== undefined);
    const measured = await expertLoads();
    expect(written).toHaveLength(measured.length);
    for (const [i, { experts, topK, layers }] of measured.entries()) {
      const numbers = [experts, topK, ...layers.flatMap((layer) => [...layer])];
      // Instruction sets round differently: a few choices of thousands differ.
      expect(written[i]).toEqual(numbers.map((v) => expect.closeTo(v, 2) as number));
    }
  });

  test('errors name what is missing', async () => {
    const { model, texts } = bundledSource();
    await expect(measureLoads({ model: '/nowhere', texts })).rejects.toMatchObject({
      code: 'FILE_NOT_FOUND',
      message: expect.stringContaining('--model') as string,
    });
    const short = { model, texts: [`${model}/config.json`] };
    await expect(measureLoads(short)).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
  });
});

describe('PESF', () => {
  test('prunes what the policy of the library prunes', () => {
    const [tokens, experts, topK] = [64, 12, 2];
    const loads = Float64Array.from({ length: experts }, (_, e) => (e + 1) / 78);
    const indices = loadedRouting(tokens, loads, topK, seededRandom(2));
    expect(prunePesf(indices, tokens, topK, experts, 0)).toEqual(indices);
    for (const alpha of [0.3, 0.7, 1]) {
      const keep = new Uint8Array(experts);
      const counts = Int32Array.from(counted(indices, experts));
      new PesfPolicy({ alpha }).select({ layer: 0, tokens, topK, experts, counts }, keep);
      const pruned = prunePesf(indices, tokens, topK, experts, alpha);
      expect(pruned).toEqual(indices.map((e) => (keep[e] ? e : -1)));
      expect(pruned).toContain(-1);
    }
  });

  test('savings: time against work, of the same shape, threads and width', () => {
    const result = (threads: number, bits: number, alpha: number, operations: number, relative: number) => ({
      kernel: 'pesf',
      shape: 's',
      threads,
      parameters: { tokens: 512, bits, alpha },
      operations,
      time: { relative },
    });
    const savings = pesfSavings([
      result(1, 4, 0, 100, 1),
      result(1, 4, 0.3, 90, 0.91),
      result(2, 4, 0, 100, 1),
      result(2, 4, 0.3, 90, 0.8),
      { ...result(1, 4, 0.3, 50, 1), kernel: 'experts' },
    ]);
    expect(savings).toMatchObject([
      {
        threads: 1,
        alpha: 0.3,
        skipped: expect.closeTo(0.1),
        saved: expect.closeTo(0.09),
        ratio: expect.closeTo(0.9),
      },
      {
        threads: 2,
        alpha: 0.3,
        skipped: expect.closeTo(0.1),
        saved: expect.closeTo(0.2),
        ratio: expect.closeTo(2),
      },
    ]);
  });
});
