/** The benchmarks behind `eac-moe bench`: kernels against what memory and arithmetic of this machine allow. */
import { cpus } from 'node:os';
import type { Activations } from '../../types/native';
import { EacMoeError } from '../errors';
import { cpuInfo, setThreads, threads as poolThreads } from '../kernels';
import { version } from '../version';
import type { Arithmetic, Case, Group, Setting } from './case';
import { KERNELS } from './kernels';
import { bestLimits, betterOf, LimitMeter, type MachineLimits } from './limits';
import { bundledSource, type LoadSource } from './loads';
import { pesfSavings, type PesfSaving } from './pesf';
import { parseShape, type LayerShape } from './shapes';
import { measure, median, stopIfAborted, summarize, type Samples, type Timing } from './timing';
import { defaultCycle } from './weights';

export interface BenchOptions {
  /** Names or `H,I,E,K`. */
  shapes: string[];
  /** Keys of KERNELS. */
  kernels: string[];
  tokens: number[];
  bits: number[];
  groupSize: number;
  threads: (number | 'all')[];
  activations: Activations;
  /** To spend on each case; three samples are taken at least. */
  seconds: number;
  seed: number;
  /**
   * Bytes of weights to go through before the first come again, and to measure the read bandwidth on; default: four last-level caches, and
   * what `measureLimits` takes.
   */
  cycleBytes?: number;
  /** Of the expert loads of `pesf`; default: those of the repository. */
  loads?: LoadSource;
  onProgress?: (progress: { fraction: number; message: string }) => void;
  signal?: AbortSignal;
}

export interface BenchResult {
  kernel: string;
  shape: string;
  threads: number;
  parameters: Record<string, string | number>;
  /** Seconds a call. */
  time: Timing;
  /** That a call must at least move; for weights, those of the experts that tokens chose. */
  bytes: number;
  operations: number;
  arithmetic: Arithmetic;
  /** bytes / median, in bytes a second. */
  bandwidth: number;
  /** operations / median, in operations a second. */
  throughput: number;
  /**
   * Shares of what the machine allowed in the same turn, medians over the turns: of the read bandwidth; of the peak of this arithmetic; and of
   * the time that these allow, memory's or arithmetic's, whichever is longer.
   */
  bandwidthShare: number;
  throughputShare: number;
  boundShare: number;
  /** That time in seconds, the median of the turns. */
  bound: number;
}

export interface BenchReport {
  version: string;
  cpu: string;
  isa: string;
  shapes: LayerShape[];
  settings: Pick<BenchOptions, 'groupSize' | 'activations' | 'seconds' | 'seed'> & { cycleBytes: number };
  /** One for each number of threads: the best of passes before and after all else. */
  limits: MachineLimits[];
  results: BenchResult[];
  /** Of the kernel `pesf`: pruned against unpruned. */
  pesf: PesfSaving[];
}

interface Timed {
  kernel: string;
  shape: string;
  threads: number;
  one: Case;
  samples: Samples;
  /** The samples of the group's first case. */
  base: Samples;
}

/**
 * Runs benchmarks: measures the machine's limits for each number of threads, then times each kernel, then the limits again.
 *
 * @throws EacMoeError INVALID_ARGUMENT naming the option; OUT_OF_MEMORY when a layer does not fit
 */
export async function runBench(options: BenchOptions): Promise<BenchReport> {
  const { groupSize, activations, seconds, seed } = options;
  const shapes = options.shapes.map(parseShape);
  for (const kernel of options.kernels) requireKernel(kernel);
  const all = poolThreads();
  const counts = [...new Set(options.threads.map((n) => (n === 'all' ? all : n)))];
  const cycle = options.cycleBytes ?? defaultCycle(options.bits.length);
  const meter = await LimitMeter.create(options.cycleBytes);
  try {
    const before = await limitsOf(meter, counts, 0, options);
    const timed: Timed[] = [];
    const jobs = shapes.flatMap((shape) => options.kernels.map((kernel) => ({ shape, kernel })));
    for (const [i, { shape, kernel }] of jobs.entries()) {
      const setting: Setting = { ...options, shape, cycle, loads: options.loads ?? bundledSource() };
      const say = (what: string) =>
        options.onProgress?.({ fraction: i / jobs.length, message: `${kernel}, ${shape.name}: ${what}` });
      say('data');
      for await (const group of KERNELS[kernel]!.groups(setting)) {
        say(parameterText(group.cases[0]!));
        for (const one of await timeGroup(group, meter, counts, all, options)) {
          timed.push({ kernel, shape: shape.name, ...one });
        }
      }
    }
    const after = await limitsOf(meter, counts, 1, options);
    const limits = before.map((l, i) => betterOf(l, after[i]!));
    const results = timed.map(({ kernel, shape, threads, one, samples, base }) => ({
      kernel,
      shape,
      threads,
      ...rate(one, samples, base),
    }));
    return {
      version,
      cpu: cpus()[0]?.model.trim() ?? 'unknown',
      isa: cpuInfo().isa,
      shapes,
      settings: { groupSize, activations, seconds, seed, cycleBytes: cycle },
      limits,
      results,
      pesf: pesfSavings(results),
    };
  } finally {
    meter.dispose();
    setThreads(all);
  }
}

/** @throws EacMoeError INVALID_ARGUMENT */
export function requireKernel(name: string): void {
  if (Object.hasOwn(KERNELS, name)) return;
  throw new EacMoeError(
    'INVALID_ARGUMENT',
    `unknown kernel '${name}'; there are ${Object.keys(KERNELS).join(', ')}`,
  );
}

async function limitsOf(
  meter: LimitMeter,
  counts: number[],
  fraction: number,
  { signal, onProgress }: BenchOptions,
): Promise<MachineLimits[]> {
  const limits: MachineLimits[] = [];
  for (const threads of counts) {
    stopIfAborted(signal);
    onProgress?.({ fraction, message: `limits of the machine with ${plural(threads, 'thread')}` });
    setThreads(threads);
    limits.push(await bestLimits(meter));
  }
  return limits;
}

/** Times a group with each number of threads, and disposes of it; its data is made with `all`. */
async function timeGroup(
  group: Group,
  meter: LimitMeter,
  counts: readonly number[],
  all: number,
  { seconds, signal }: BenchOptions,
): Promise<Pick<Timed, 'threads' | 'one' | 'samples' | 'base'>[]> {
  const timed = [];
  try {
    for (const threads of counts) {
      setThreads(threads);
      const taken = await measure(group.cases, { seconds, meter, signal });
      timed.push(...group.cases.map((one, i) => ({ threads, one, samples: taken[i]!, base: taken[0]! })));
    }
    return timed;
  } finally {
    group.dispose();
    setThreads(all);
  }
}

/** A case's rates, against what the machine allowed beside each sample. */
export function rate(
  { parameters, bytes, operations, arithmetic }: Case,
  samples: Samples,
  base = samples,
): Omit<BenchResult, 'kernel' | 'shape' | 'threads'> {
  const time = summarize(samples.seconds, base.seconds);
  const memory = samples.beside.map((r) => bytes / r.readBandwidth);
  const compute = samples.beside.map(
    (r) => operations / { int8: r.int8Peak, float32: r.fmaPeak, float64: r.fmaPeak / 2 }[arithmetic],
  );
  const bounds = memory.map((seconds, i) => Math.max(seconds, compute[i]!));
  const share = (allowed: number[]) => median(allowed.map((seconds, i) => seconds / samples.seconds[i]!));
  return {
    parameters,
    time,
    bytes,
    operations,
    arithmetic,
    bandwidth: bytes / time.median,
    bandwidthShare: share(memory),
    throughput: operations / time.median,
    throughputShare: share(compute),
    bound: median(bounds),
    boundShare: share(bounds),
  };
}

function parameterText({ parameters }: Case): string {
  return Object.entries(parameters)
    .map((entry) => entry.join(' '))
    .join(', ');
}

export function plural(n: number, what: string): string {
  return `${n} ${what}${n === 1 ? '' : 's'}`;
}
