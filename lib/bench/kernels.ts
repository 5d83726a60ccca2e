/** The benchmarks by name. */
import type { KernelBench } from './case';
import { expertGroups } from './experts';

export const KERNELS: Readonly<Record<string, KernelBench>> = {
  experts: { about: 'the fused sparse-expert layer', groups: expertGroups },
};
