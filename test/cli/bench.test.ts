/** `eac-moe bench` as users run it, on a shape that takes no time. */
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import type { BenchReport } from '../../lib/bench';

const cli = join(__dirname, '../../dist/cli/index.js');
const tiny = ['--shape', '64,64,8,2', '--cycle', '1', '--seconds', '0.005', '--group-size', '32'];

function run(...args: string[]) {
  const { EAC_MOE_DEBUG: _, ...env } = process.env;
  const { status, stdout, stderr } = spawnSync(process.execPath, [cli, 'bench', ...args], {
    encoding: 'utf8',
    env,
  });
  return { status, stdout, stderr };
}

test('--json: one document with the machine, its limits and each case', () => {
  const { status, stdout } = run(...tiny, '--tokens', '1,8', '--bits', '3', '--threads', '1,2', '--json');
  expect(status).toBe(0);
  const report = JSON.parse(stdout) as BenchReport;
  const number = expect.any(Number) as number;
  expect(Object.keys(report)).toEqual([
    'version',
    'cpu',
    'isa',
    'shapes',
    'settings',
    'limits',
    'results',
    'pesf',
  ]);
  expect(report.shapes).toEqual([{ name: '64,64,8,2', hidden: 64, width: 64, experts: 8, topK: 2 }]);
  expect(report.settings).toMatchObject({ activations: 'int8', groupSize: 32, cycleBytes: 2 ** 20 });
  expect(report.limits).toMatchObject([{ threads: 1, readBandwidth: number }, { threads: 2 }]);
  expect(report.results).toHaveLength(4);
  expect(report.results[0]).toEqual({
    kernel: 'experts',
    shape: '64,64,8,2',
    threads: 1,
    parameters: { tokens: 1, bits: 3 },
    time: { median: number, min: number, p90: number, samples: number, relative: 1 },
    bytes: number,
    operations: 2 * 3 * 64 * 64 * 2,
    arithmetic: 'int8',
    bandwidth: number,
    bandwidthShare: number,
    throughput: number,
    throughputShare: number,
    bound: number,
    boundShare: number,
  });
});

test('tables, as text and as Markdown', () => {
  const few = [...tiny, '--tokens', '64', '--bits', '4', '--threads', '1', '--kernel', 'norm', '--pesf'];
  const text = run(...few);
  expect(text.status).toBe(0);
  expect(text.stdout).toMatch(/^threads +read GB\/s +float32 GFLOP\/s +int8 GOP\/s$/m);
  expect(text.stdout).toMatch(/^norm, 64,64,8,2: hidden 64/m);
  expect(text.stdout).toMatch(/^64,64,8,2 +1 +64 +4 +0\.7 +\d/m);
  const { status, stdout } = run(...few, '--markdown');
  expect(status).toBe(0);
  expect(stdout).toMatch(/^\| norm \| 64,64,8,2 \| norm rms, tokens 64 \| 1 \|/m);
  expect(stdout).toMatch(/^\| 64,64,8,2 \| 1 \| 64 \| 4 \| 0\.3 \|/m);
});

test.each([
  [['--shape', 'gpt'], /unknown shape 'gpt'.*qwen1\.5-moe/],
  [['--shape', '64,64,2,3'], /3 experts a token of only 2/],
  [['--kernel', 'gemmm'], /unknown kernel 'gemmm'.*gemm/],
  [['--tokens', '1,0'], /positive integer/],
  [['--tokens', '8,8'], /no value twice/],
  [['--tokens', ''], /positive integer/],
  [['--bits', '5'], /Allowed are 2, 3, 4/],
  [['--group-size', '48'], /multiple of 32/],
  [['--threads', 'many'], /positive integer/],
  [['--activations', 'int4'], /Allowed are int8, float32/],
  [['--seconds', '0'], /above 0/],
  [['--threads', '5000'], /between 1 and 1024/],
])('%j exits with 2', (args, message) => {
  const { status, stdout, stderr } = run(...args);
  expect([status, stdout]).toEqual([2, '']);
  expect(stderr).toMatch(message);
});

test('expert loads need a model and texts', () => {
  const { status, stderr } = run(...tiny, '--pesf', '--model', 'nowhere');
  expect(status).toBe(1);
  expect(stderr).toMatch(/nowhere does not exist: .*--model/);
});
