/** Benchmarks from end to end, on shapes that take no time. */
import { rate, runBench, type BenchOptions } from '../../lib/bench';
import type { Case, Setting } from '../../lib/bench/case';
import { recordExperts } from '../../lib/bench/experts';
import { KERNELS } from '../../lib/bench/kernels';
import { bundledSource } from '../../lib/bench/loads';
import { duration, significant, table, textReport } from '../../lib/bench/report';
import { parseShape } from '../../lib/bench/shapes';
import { randomLayers } from '../../lib/bench/weights';
import { cpuInfo, measureLimits, randomMatrix, setIsa, threads } from '../../lib/kernels';

const shape = parseShape('64,96,8,2');
const base: BenchOptions = {
  shapes: ['64,96,8,2'],
  kernels: ['experts'],
  tokens: [1, 16],
  bits: [2, 4],
  groupSize: 32,
  threads: [1, 2],
  activations: 'int8',
  seconds: 0.005,
  seed: 0,
  cycleBytes: 2 ** 20,
};
const setting: Setting = { ...base, shape, cycle: 2 ** 17, loads: bundledSource() };

describe('measureLimits', () => {
  const { isa, isas } = cpuInfo();
  afterAll(() => setIsa(isa));

  test.each(isas)('%s: positive and finite', async (name) => {
    setIsa(name);
    const before = threads();
    const limits = await measureLimits({ threads: 2, bufferBytes: 2 ** 24 });
    expect(limits).toMatchObject({ isa: name, threads: 2, bufferBytes: 2 ** 24 });
    const { readBandwidth, fmaPeak, int8Peak } = limits;
    for (const value of [readBandwidth, fmaPeak, int8Peak]) {
      expect(Number.isFinite(value)).toBe(true);
      expect(value).toBeGreaterThan(1e6);
    }
    expect(threads()).toBe(before);
  });

  test.each([{ threads: 0 }, { threads: 1025 }, { threads: NaN }, { bufferBytes: -1 }])(
    'refuses %o',
    async (options) => {
      await expect((async () => measureLimits(options))()).rejects.toMatchObject({
        code: 'INVALID_ARGUMENT',
      });
    },
  );
});

describe('randomMatrix', () => {
  test('is quantized or dense, and the same for the same seed', async () => {
    const kind = { bits: 3, groupSize: 32 };
    const [a, b, c] = [
      await randomMatrix(20, 64, kind, 1),
      await randomMatrix(20, 64, kind, 1),
      await randomMatrix(20, 64, kind, 2),
    ];
    const codes = async (m: typeof a) => [...((await m.codes()).toArray() as Uint8Array)];
    expect(await codes(a)).toEqual(await codes(b));
    expect(await codes(a)).not.toEqual(await codes(c));
    expect(Math.max(...(await codes(a)))).toBe(7);
    const dense = await randomMatrix(3, 40, { dtype: 'bf16' }, 1);
    expect([dense.dtype, dense.shape]).toEqual(['bf16', [3, 40]]);
  });

  test.each([
    [4, 40, { bits: 4 }, 0],
    [4, 32, { bits: 5 }, 0],
    [0, 32, { bits: 4 }, 0],
    [4, 64, { bits: 4, groupSize: 48 }, 0],
    [4, 32, { bits: 4 }, -1],
  ])('refuses %i x %i %o with seed %i', async (rows, cols, kind, seed) => {
    await expect((async () => randomMatrix(rows, cols, kind, seed))()).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
    });
  });
});

describe('the expert layer', () => {
  test('bytes and operations are those of the experts that tokens chose', async () => {
    const weights = await randomLayers(shape, { bits: 4, groupSize: 32 }, 0, 0);
    // An expert: 3 * 64 * 96 codes of half a byte; a scale of 2 bytes and a zero point of 1 for each 32 channels.
    const expert = (3 * 64 * 96) / 2 + ((3 * 64 * 96) / 32) * 3;
    expect(weights.expertBytes).toBe(expert);
    expect([weights.layers.length, weights.bytes]).toEqual([1, 8 * expert]);

    // Two calls: 3 experts for 6 pairs; 2 experts for 5 pairs, one being pruned.
    const steps = [Int32Array.of(0, 1, 1, 2, 2, 0), Int32Array.of(3, 4, 4, 3, -1, 3)];
    const one = recordExperts(setting, weights, 3, steps);
    expect(one.bytes).toBe(2.5 * expert);
    expect(one.operations).toBe(5.5 * 2 * 3 * 64 * 96);
    await one.run(5);
    one.dispose();
    weights.dispose();
  });

  test('as many layers as the cycle asks for, within reason', async () => {
    const options = { bits: 2, groupSize: 32 };
    const one = await randomLayers(shape, options, 0, 0);
    const several = await randomLayers(shape, options, 2.5 * one.bytes, 0);
    expect(several.layers).toHaveLength(3);
    expect(several.bytes).toBe(3 * one.bytes);
    const most = await randomLayers(parseShape('32,32,2,1'), options, 1e12, 0);
    expect(most.layers).toHaveLength(64);
    for (const w of [one, several, most]) w.dispose();
    const huge = parseShape('1048576,1048576,8,1');
    await expect(randomLayers(huge, options, 0, 0)).rejects.toMatchObject({
      code: 'OUT_OF_MEMORY',
      message: expect.stringContaining('fewer or smaller experts') as string,
    });
  });
});

describe('runBench', () => {
  test('a report with limits and every case', async () => {
    const before = threads();
    const messages: string[] = [];
    const report = await runBench({ ...base, onProgress: ({ message }) => messages.push(message) });
    expect(threads()).toBe(before);
    expect(report.limits.map((l) => l.threads)).toEqual([1, 2]);
    expect(report.settings).toEqual({
      groupSize: 32,
      activations: 'int8',
      seconds: 0.005,
      seed: 0,
      cycleBytes: 2 ** 20,
    });
    const cells = report.results.map((r) => [r.parameters.tokens, r.threads, r.parameters.bits]);
    expect(cells).toEqual([
      [1, 1, 2],
      [1, 1, 4],
      [1, 2, 2],
      [1, 2, 4],
      [16, 1, 2],
      [16, 1, 4],
      [16, 2, 2],
      [16, 2, 4],
    ]);
    for (const r of report.results) {
      expect(r.time.min).toBeGreaterThan(0);
      expect(r.time.min).toBeLessThanOrEqual(r.time.median);
      expect(r.time.median).toBeLessThanOrEqual(r.time.p90);
      expect(r.operations).toBe(2 * 3 * 64 * 96 * 2 * Number(r.parameters.tokens));
      // the longer of the two in each turn, so its median is never below either's
      expect(r.boundShare).toBeGreaterThanOrEqual(Math.max(r.bandwidthShare, r.throughputShare));
    }
    expect(messages).toContain('experts, 64,96,8,2: tokens 16, bits 2');
    const text = textReport(report);
    expect(text).toContain('experts, 64,96,8,2: hidden 64, expert width 96, 8 experts, 2 a token');
    expect(text).toMatch(/^threads +tokens +bits +median +min +p90 +GB\/s +of read/m);
  });

  test('every kernel', async () => {
    const kernels = Object.keys(KERNELS);
    const report = await runBench({
      ...base,
      shapes: ['64,64,8,2'],
      kernels,
      tokens: [8],
      bits: [3],
      threads: [1],
    });
    expect([...new Set(report.results.map(({ kernel }) => kernel))]).toEqual(kernels);
    for (const r of report.results) {
      for (const value of [r.bytes, r.operations, r.time.median, r.bound]) {
        expect(Number.isFinite(value)).toBe(true);
        expect(value).toBeGreaterThan(0);
      }
    }
    expect(report.pesf.map(({ alpha }) => alpha)).toEqual([0.3, 0.7]);
  });

  test('errors come before any work', async () => {
    const late = jest.fn();
    for (const bad of [{ kernels: ['gemmm'] }, { shapes: ['x'] }]) {
      await expect(runBench({ ...base, ...bad, onProgress: late })).rejects.toMatchObject({
        code: 'INVALID_ARGUMENT',
      });
    }
    expect(late).not.toHaveBeenCalled();
    const signal = AbortSignal.abort();
    await expect(runBench({ ...base, signal })).rejects.toMatchObject({ code: 'ABORTED' });
  });
});

test('rates: against memory and the peak of the arithmetic beside each sample', () => {
  const machine = { readBandwidth: 1e9, fmaPeak: 4e9, int8Peak: 8e9 };
  const samples = { seconds: [0.5, 0.4, 0.6], beside: [machine, machine, machine] };
  const one = (arithmetic: Case['arithmetic'], bytes: number, operations: number): Case => ({
    parameters: {},
    bytes,
    operations,
    arithmetic,
    run: async () => {},
  });
  expect(rate(one('int8', 1e8, 2e9), samples)).toMatchObject({
    bandwidth: 2e8,
    bandwidthShare: 0.2,
    throughput: 4e9,
    throughputShare: 0.5,
    bound: 0.25,
    boundShare: 0.5,
  });
  expect(rate(one('float32', 1e8, 1e9), samples).throughputShare).toBe(0.5);
  expect(rate(one('float64', 4e8, 1e8), samples)).toMatchObject({
    throughputShare: 0.1,
    bound: 0.4,
    boundShare: 0.8,
  });
  // A machine that was half as fast for one sample, and for what was measured beside it: the same share.
  const half = { readBandwidth: 5e8, fmaPeak: 2e9, int8Peak: 4e9 };
  const disturbed = { seconds: [0.5, 1, 1], beside: [machine, half, half] };
  expect(rate(one('int8', 1e8, 2e9), disturbed)).toMatchObject({
    throughput: 2e9,
    boundShare: 0.5,
    bound: 0.5,
  });
});

test('numbers for people', () => {
  expect([0.00012345, 0.0123, 1.5, 123].map(duration)).toEqual(['123 us', '12.3 ms', '1.50 s', '123 s']);
  expect([123.4, 99.96, 1.234, 0.01234].map(significant)).toEqual(['123', '100', '1.23', '0.0123']);
  expect(
    table(
      [
        ['a', 'bb'],
        ['ccc', 'd'],
      ],
      1,
    ),
  ).toBe('a    bb\nccc   d\n');
});
