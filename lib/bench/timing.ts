/** Timing of kernels: warmed up, interleaved, medians. */
import { abortError } from '../native';
import type { MachineRates } from '../../types/native';
import type { Case } from './case';
import type { LimitMeter } from './limits';

/** Seconds a call. */
export interface Timing {
  median: number;
  min: number;
  /** 90 % of the samples took at most this. */
  p90: number;
  samples: number;
  /** Median of the ratios to the first case of the group, each to the sample beside it: what disturbs both does not count. */
  relative: number;
}

/** Samples of a case, in seconds a call, and what the machine allowed in the same turn. */
export interface Samples {
  seconds: number[];
  beside: MachineRates[];
}

export interface TimingOptions {
  /** Seconds to spend on each case. */
  seconds: number;
  /** Measures the machine's rates once a turn. */
  meter: Pick<LimitMeter, 'pass'>;
  signal?: AbortSignal;
}

/** A sample is at least so long, so that the call from JavaScript and the clock do not count. */
const SAMPLE_SECONDS = 0.01;
const MIN_SAMPLES = 3;
const MAX_SAMPLES = 200;

/**
 * Times cases against each other: the machine's rates and one sample of each in turn, so that what the machine does meanwhile hits all
 * alike. The first call of each warms it up and does not count.
 */
export async function measure(cases: Case[], { seconds, meter, signal }: TimingOptions): Promise<Samples[]> {
  const calls: number[] = [];
  for (const one of cases) {
    stopIfAborted(signal);
    await one.run(1);
    const once = await timed(one, 1);
    calls.push(Math.max(1, Math.ceil(SAMPLE_SECONDS / once)));
  }
  const samples: Samples[] = cases.map(() => ({ seconds: [], beside: [] }));
  const spent = cases.map(() => 0);
  const wanted = (i: number) => {
    const taken = samples[i]!.seconds.length;
    return taken < MIN_SAMPLES || (spent[i]! < seconds && taken < MAX_SAMPLES);
  };
  while (cases.some((_, i) => wanted(i))) {
    stopIfAborted(signal);
    const rates = await meter.pass();
    for (const [i, one] of cases.entries()) {
      if (!wanted(i)) continue;
      stopIfAborted(signal);
      const elapsed = await timed(one, calls[i]!);
      samples[i]!.seconds.push(elapsed / calls[i]!);
      samples[i]!.beside.push(rates);
      spent[i]! += elapsed;
    }
  }
  return samples;
}

async function timed(one: Case, calls: number): Promise<number> {
  const begun = performance.now();
  await one.run(calls);
  return (performance.now() - begun) / 1000;
}

/** Median, minimum and 90th percentile (nearest rank); `base`: the samples that were taken beside these. */
export function summarize(samples: readonly number[], base = samples): Timing {
  const sorted = [...samples].sort((a, b) => a - b);
  const n = sorted.length;
  const ratios = samples.slice(0, base.length).map((value, i) => value / base[i]!);
  return {
    median: median(samples),
    min: sorted[0]!,
    p90: sorted[Math.ceil(0.9 * n) - 1]!,
    samples: n,
    relative: median(ratios),
  };
}

/** The mean of the two in the middle, where there are two. */
export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const n = sorted.length;
  return (sorted[Math.floor((n - 1) / 2)]! + sorted[Math.floor(n / 2)]!) / 2;
}

/** @throws EacMoeError ABORTED */
export function stopIfAborted(signal: AbortSignal | undefined): void {
  if (signal?.aborted) throw abortError(signal);
}
