/** What this machine can do: the measure of all benchmarks. */
import type { MachineRates, Tensor } from '../../types/native';
import { native } from '../native';

/** What this machine can do at best, and how that was measured. */
export interface MachineLimits extends MachineRates {
  /** Size of the buffer that was read. */
  bufferBytes: number;
  threads: number;
  isa: string;
}

const PASSES = 40;

/** Measures the machine's rates again and again, with the threads of the pool and the instruction set in use. */
export class LimitMeter {
  readonly #buffer: Tensor;
  #passes = 0;
  private constructor(buffer: Tensor) {
    this.#buffer = buffer;
  }

  /** @param bufferBytes read from; 0: 1 GiB, or a quarter of the machine's memory where that is less */
  static async create(bufferBytes = 0): Promise<LimitMeter> {
    return new LimitMeter(await native().limitBuffer(bufferBytes));
  }
  get bufferBytes(): number {
    return this.#buffer.byteLength;
  }
  /** The rates just now, in some 20 milliseconds. */
  pass(): Promise<MachineRates> {
    return native().limitPass(this.#buffer, this.#passes++);
  }
  dispose(): void {
    this.#buffer.dispose();
  }
}

/** What else the machine does can only lower a rate. */
export function betterOf<T extends MachineRates>(a: T, b: MachineRates): T {
  return {
    ...a,
    readBandwidth: Math.max(a.readBandwidth, b.readBandwidth),
    fmaPeak: Math.max(a.fmaPeak, b.fmaPeak),
    int8Peak: Math.max(a.int8Peak, b.int8Peak),
  };
}

/** The best of several passes; the first is warm-up and does not count. */
export async function bestLimits(meter: LimitMeter): Promise<MachineLimits> {
  const { isa } = native().info();
  await meter.pass();
  let best = await meter.pass();
  for (let i = 1; i < PASSES; i++) best = betterOf(best, await meter.pass());
  return { ...best, bufferBytes: meter.bufferBytes, threads: native().threads(), isa };
}

/**
 * What this machine can do at best, in one to three seconds: read bandwidth (bytes/s), float32 and 8-bit arithmetic (operations/s, a multiply-add is
 * two), with the instruction set in use. Each the best of several passes. The pool has `threads` threads meanwhile: run nothing beside it.
 *
 * @param options.threads 1 to 1024; default: those of the pool
 * @param options.bufferBytes read from; default 1 GiB, or a quarter of the machine's memory where that is less
 */
export async function measureLimits(
  options: { threads?: number; bufferBytes?: number } = {},
): Promise<MachineLimits> {
  const before = native().threads();
  native().setThreads(options.threads ?? before);
  try {
    const meter = await LimitMeter.create(options.bufferBytes);
    try {
      return await bestLimits(meter);
    } finally {
      meter.dispose();
    }
  } finally {
    native().setThreads(before);
  }
}
