/** The benchmarks by name. */
import { factorGroups, gptqGroups, hessianGroups } from './calibration';
import type { KernelBench } from './case';
import { expertGroups } from './experts';
import {
  activationGroups,
  decodeGroups,
  dequantizeGroups,
  normGroups,
  prefillGroups,
  ropeGroups,
  routerGroups,
  sampleGroups,
} from './layer';
import { pesfGroups } from './pesf';
import { denseGroups, gemmGroups, headGroups, linearGroups } from './matmul';

export const KERNELS: Readonly<Record<string, KernelBench>> = {
  experts: { about: 'the fused sparse-expert layer', groups: expertGroups },
  pesf: {
    about: 'the expert layer without and with PESF, under loads of a trained model',
    groups: pesfGroups,
  },
  linear: { about: 'one quantized projection of an expert', groups: linearGroups },
  dense: { about: 'one projection of attention, f32 and bf16 weights', groups: denseGroups },
  head: { about: 'the output head for one token, bf16', groups: headGroups },
  gemm: { about: 'a square f32 product, hidden size³', groups: gemmGroups },
  'attention-prefill': { about: 'causal attention of a batch over itself', groups: prefillGroups },
  'attention-decode': { about: 'one token over a cache of 2048 positions', groups: decodeGroups },
  norm: { about: 'root mean square norm and layer norm', groups: normGroups },
  rope: { about: 'rotary embedding', groups: ropeGroups },
  activation: { about: 'an activation and a product, after a copy', groups: activationGroups },
  router: { about: 'router logits, softmax and top-k', groups: routerGroups },
  sample: { about: 'the next token from logits', groups: sampleGroups },
  dequantize: { about: 'quantized weights back to f32', groups: dequantizeGroups },
  hessian: { about: 'a GPTQ Hessian plus 2048 tokens', groups: hessianGroups },
  factor: { about: 'factor of a Hessian, f64', groups: factorGroups },
  gptq: { about: 'GPTQ of one expert, three matrices', groups: gptqGroups },
};
