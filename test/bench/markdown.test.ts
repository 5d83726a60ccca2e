/** Tables for the documentation, from reports. */
import type { BenchReport } from '../../lib/bench';
import { markdownReport, mergeReports } from '../../lib/bench/markdown';

const limit = (threads: number, readBandwidth: number) => ({
  threads,
  readBandwidth,
  fmaPeak: 2e11,
  int8Peak: 4e11,
  bufferBytes: 2 ** 30,
  isa: 'avx2',
});

function report(shape: string, limits: BenchReport['limits'], isa = 'avx2'): BenchReport {
  return {
    version: '0.1.0',
    cpu: 'A processor',
    isa,
    shapes: [{ name: shape, hidden: 64, width: 64, experts: 8, topK: 2 }],
    settings: { groupSize: 128, activations: 'int8', seconds: 1, seed: 0, cycleBytes: 2 ** 30 },
    limits,
    results: [
      {
        kernel: 'experts',
        shape,
        threads: 2,
        parameters: { tokens: 1, bits: 4 },
        time: { median: 1e-3, min: 9e-4, p90: 2e-3, samples: 9, relative: 1 },
        bytes: 2e7,
        operations: 7e7,
        arithmetic: 'int8',
        bandwidth: 2e10,
        bandwidthShare: 0.8,
        throughput: 7e10,
        throughputShare: 0.175,
        bound: 8e-4,
        boundShare: 0.8,
      },
    ],
    pesf: [{ shape, threads: 2, bits: 4, tokens: 512, alpha: 0.3, skipped: 0.04, saved: 0.038, ratio: 0.95 }],
  };
}

test('a row names the case, its bound and what bounds it, the time, and what is left', () => {
  const text = markdownReport([report('qwen', [limit(2, 2.5e10)])]);
  expect(text).toContain('### avx2, A processor\n');
  expect(text).toContain('| 2 | 25.0 | 200 | 400 |\n');
  expect(text).toContain(
    '| experts | qwen | tokens 1, bits 4 | 2 | 20.0 | 0.0700 | 800 us (memory) | 1.00 ms | 80 % | 200 us |\n',
  );
  expect(text).toContain('| qwen | 2 | 512 | 4 | 0.3 | 4.0 % | 3.8 % | 0.95 |\n');
  for (const block of text.split('\n\n').filter((part) => part.startsWith('|'))) {
    expect(
      new Set(
        block
          .trim()
          .split('\n')
          .map((line) => line.split('|').length),
      ).size,
    ).toBe(1);
  }
});

test('reports of one machine and instruction set become one', () => {
  const merged = mergeReports([
    report('a', [limit(2, 2e10)]),
    report('b', [limit(2, 3e10), limit(1, 1e10)]),
    report('a', [limit(2, 2e10)], 'avx512'),
  ]);
  expect(merged.map(({ isa }) => isa)).toEqual(['avx2', 'avx512']);
  const [first] = merged;
  expect(first!.shapes.map(({ name }) => name)).toEqual(['a', 'b']);
  expect(first!.results.map(({ shape }) => shape)).toEqual(['a', 'b']);
  expect(first!.pesf).toHaveLength(2);
  expect(first!.limits.map(({ threads, readBandwidth }) => [threads, readBandwidth])).toEqual([
    [2, 3e10],
    [1, 1e10],
  ]);
});
