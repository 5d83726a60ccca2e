/** What a benchmark of one kernel is made of. */
import type { Activations } from '../../types/native';
import type { LoadSource } from './loads';
import type { LayerShape } from './shapes';

/** Which peak bounds the operations of a kernel: 8-bit integers, float32, or float64 (half of float32's). */
export type Arithmetic = 'int8' | 'float32' | 'float64';

/** One thing to time: a kernel with its data. */
export interface Case {
  /** What tells this case from others of the kernel, e.g. `{ tokens: 1, bits: 4 }`. */
  parameters: Record<string, string | number>;
  /** Bytes that one call must at least move between memory and the processor. */
  bytes: number;
  /** Operations of one call; a multiply-add is two. */
  operations: number;
  arithmetic: Arithmetic;
  run(calls: number): Promise<void>;
}

/** Cases that are timed against each other, and their data. */
export interface Group {
  cases: Case[];
  dispose(): void;
}

/** What all kernels' benchmarks are asked for. */
export interface Setting {
  shape: LayerShape;
  tokens: readonly number[];
  bits: readonly number[];
  groupSize: number;
  activations: Activations;
  seed: number;
  /** Bytes of weights to go through before the first come again. */
  cycle: number;
  /** Where expert loads are measured. */
  loads: LoadSource;
}

/** A benchmark: groups one after the other, each disposed of before the next is made. */
export interface KernelBench {
  about: string;
  groups(setting: Setting): AsyncGenerator<Group>;
}
