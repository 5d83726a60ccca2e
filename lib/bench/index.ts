/** The benchmarks behind `eac-moe bench`: kernels against what memory and arithmetic of this machine allow. */
import { cpus } from 'node:os';
import type { MachineLimits } from '../../types/native';
import { EacMoeError } from '../errors';
import { cpuInfo, measureLimits, setThreads, threads as poolThreads } from '../kernels';
import { version } from '../version';
import type { Arithmetic, Case, Setting } from './case';
import { KERNELS } from './kernels';
import { parseShape, type LayerShape } from './shapes';
import { measure, type Timing } from './timing';
import { cycleBytes } from './weights';

export interface BenchOptions {
  /** Names or `H,I,E,K`. */
  shapes: string[];
  kernels: string[];
  tokens: number[];
  bits: number[];
  groupSize: number;
  threads: (number | 'all')[];
  activations: 'int8' | 'float32';
  /** To spend on each case; three samples are taken at least. */
  seconds: number;
  seed: number;
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
  settings: Omit<BenchOptions, 'onProgress' | 'signal' | 'shapes'> & {
    shapes: LayerShape[];
    /** Bytes of weights that are gone through before the first come again. */
    cycleBytes: number;
  };
  /** One for each number of threads. */
  limits: MachineLimits[];
  results: BenchResult[];
}

/**
 * Runs benchmarks: measures the machine's limits for each number of threads, then times each kernel.
 *
 * @throws EacMoeError INVALID_ARGUMENT naming the option; OUT_OF_MEMORY when a layer does not fit
 */
export async function runBench(options: BenchOptions): Promise<BenchReport> {
  const { onProgress, signal, ...settings } = options;
  const shapes = options.shapes.map(parseShape);
  for (const kernel of options.kernels) requireKernel(kernel);
  const before = poolThreads();
  const counts = [...new Set(options.threads.map((n) => (n === 'all' ? before : n)))];
  const cycle = cycleBytes(options.bits.length);
  try {
    const limits: MachineLimits[] = [];
    for (const threads of counts) {
      signal?.throwIfAborted();
      onProgress?.({ fraction: 0, message: `limits of the machine, ${plural(threads, 'thread')}` });
      limits.push(await measureLimits({ threads }));
    }
    const results: BenchResult[] = [];
    const jobs = shapes.flatMap((shape) => options.kernels.map((kernel) => ({ shape, kernel })));
    for (const [i, { shape, kernel }] of jobs.entries()) {
      const setting: Setting = { ...settings, shape, cycle };
      const message = (what: string) =>
        onProgress?.({ fraction: i / jobs.length, message: `${kernel}, ${shape.name}: ${what}` });
      message('data');
      for await (const group of KERNELS[kernel]!.groups(setting)) {
        try {
          message(
            Object.entries(group.cases[0]!.parameters)
              .map((entry) => entry.join(' '))
              .join(', '),
          );
          for (const machine of limits) {
            setThreads(machine.threads);
            const timings = await measure(group.cases, { seconds: options.seconds, signal });
            results.push(
              ...group.cases.map((c, j) => ({ kernel, shape: shape.name, ...rate(c, timings[j]!, machine) })),
            );
          }
        } finally {
          group.dispose();
          setThreads(before);
        }
      }
    }
    onProgress?.({ fraction: 1, message: 'done' });
    return {
      version,
      cpu: cpus()[0]?.model.trim() ?? 'unknown',
      isa: cpuInfo().isa,
      settings: { ...settings, shapes, cycleBytes: cycle },
      limits,
      results,
    };
  } finally {
    setThreads(before);
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

/** A case's rates, against the limits of the machine. */
export function rate(c: Case, time: Timing, limits: MachineLimits): Omit<BenchResult, 'kernel' | 'shape'> {
  const { parameters, bytes, operations, arithmetic } = c;
  const { int8Peak, fmaPeak, readBandwidth, threads } = limits;
  const peak = { int8: int8Peak, float32: fmaPeak, float64: fmaPeak / 2 }[arithmetic];
  const bandwidth = bytes / time.median;
  const throughput = operations / time.median;
  const bound = Math.max(bytes / readBandwidth, operations / peak);
  return {
    threads,
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

export function plural(n: number, what: string): string {
  return `${n} ${what}${n === 1 ? '' : 's'}`;
}
