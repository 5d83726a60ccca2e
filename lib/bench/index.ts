/** The benchmarks behind `eac-moe bench`: kernels against what memory and arithmetic of this machine allow. */
import { cpus } from 'node:os';
import type { Activations, MachineLimits } from '../../types/native';
import { EacMoeError } from '../errors';
import { cpuInfo, measureLimits, setThreads, threads as poolThreads } from '../kernels';
import { version } from '../version';
import type { Arithmetic, Case, Group, Setting } from './case';
import { KERNELS } from './kernels';
import { bundledSource, type LoadSource } from './loads';
import { pesfSavings, type PesfSaving } from './pesf';
import { parseShape, type LayerShape } from './shapes';
import { measure, stopIfAborted, type Timing } from './timing';
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
  /** bytes / median, in bytes a second; and as a share of the read bandwidth. */
  bandwidth: number;
  bandwidthShare: number;
  /** operations / median, in operations a second; and as a share of the peak of this arithmetic. */
  throughput: number;
  throughputShare: number;
  /** The time that the machine's limits allow, in seconds: that of memory or of arithmetic, whichever is longer; and it / median. */
  bound: number;
  boundShare: number;
}

export interface BenchReport {
  version: string;
  cpu: string;
  isa: string;
  shapes: LayerShape[];
  settings: Pick<BenchOptions, 'groupSize' | 'activations' | 'seconds' | 'seed'> & { cycleBytes: number };
  /** One for each number of threads, the better of a measurement before and one after. */
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
  time: Timing;
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
  try {
    const before = await limitsOf(counts, 0, options);
    const timed: Timed[] = [];
    const jobs = shapes.flatMap((shape) => options.kernels.map((kernel) => ({ shape, kernel })));
    for (const [i, { shape, kernel }] of jobs.entries()) {
      const setting: Setting = { ...options, shape, cycle, loads: options.loads ?? bundledSource() };
      const say = (what: string) =>
        options.onProgress?.({ fraction: i / jobs.length, message: `${kernel}, ${shape.name}: ${what}` });
      say('data');
      for await (const group of KERNELS[kernel]!.groups(setting)) {
        say(parameterText(group.cases[0]!));
        for (const { threads, one, time } of await timeGroup(group, counts, all, options)) {
          timed.push({ kernel, shape: shape.name, threads, one, time });
        }
      }
    }
    const after = await limitsOf(counts, 1, options);
    const limits = before.map((l, i) => betterOf(l, after[i]!));
    const results = timed.map(({ kernel, shape, threads, one, time }) => ({
      kernel,
      shape,
      threads,
      ...rate(
        one,
        time,
        limits.find((l) => l.threads === threads)!,
      ),
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
  counts: number[],
  fraction: number,
  { cycleBytes, signal, onProgress }: BenchOptions,
): Promise<MachineLimits[]> {
  const limits: MachineLimits[] = [];
  for (const threads of counts) {
    stopIfAborted(signal);
    onProgress?.({ fraction, message: `limits of the machine with ${plural(threads, 'thread')}` });
    limits.push(await measureLimits({ threads, bufferBytes: cycleBytes }));
  }
  return limits;
}

/** What else the machine does can only lower a limit. */
export function betterOf(a: MachineLimits, b: MachineLimits): MachineLimits {
  return {
    ...a,
    readBandwidth: Math.max(a.readBandwidth, b.readBandwidth),
    fmaPeak: Math.max(a.fmaPeak, b.fmaPeak),
    int8Peak: Math.max(a.int8Peak, b.int8Peak),
  };
}

/** Times a group with each number of threads, and disposes of it; its data is made with `all`. */
async function timeGroup(
  group: Group,
  counts: readonly number[],
  all: number,
  { seconds, signal }: BenchOptions,
): Promise<Pick<Timed, 'threads' | 'one' | 'time'>[]> {
  const timed = [];
  try {
    for (const threads of counts) {
      setThreads(threads);
      const times = await measure(group.cases, { seconds, signal });
      timed.push(...group.cases.map((one, i) => ({ threads, one, time: times[i]! })));
    }
    return timed;
  } finally {
    group.dispose();
    setThreads(all);
  }
}

/** A case's rates, against the limits of the machine. */
export function rate(
  c: Case,
  time: Timing,
  limits: MachineLimits,
): Omit<BenchResult, 'kernel' | 'shape' | 'threads'> {
  const { parameters, bytes, operations, arithmetic } = c;
  const { int8Peak, fmaPeak, readBandwidth } = limits;
  const peak = { int8: int8Peak, float32: fmaPeak, float64: fmaPeak / 2 }[arithmetic];
  const bandwidth = bytes / time.median;
  const throughput = operations / time.median;
  const bound = Math.max(bytes / readBandwidth, operations / peak);
  return {
    parameters,
    time,
    bytes,
    operations,
    arithmetic,
    bandwidth,
    bandwidthShare: bandwidth / readBandwidth,
    throughput,
    throughputShare: throughput / peak,
    bound,
    boundShare: bound / time.median,
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
