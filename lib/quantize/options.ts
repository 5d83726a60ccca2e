/** What `quantizeMoE` takes, and its defaults. */
import type { ShiftRates } from '../evaluate/shift';
import type { BitsOption, SharedBits } from './plan';

export type CalibrationSource =
  /** Texts, encoded by the model's tokenizer and joined by its end-of-text token. */
  | string[]
  /** Token ids, one array a text. */
  | (number[] | Int32Array)[]
  /** Sequences sampled from the model itself: no data needed. */
  | 'self';

export interface RouterCalibrationSettings {
  /** `topk-mse` (Eq. 5): only the K largest full-precision logits of each token count; `mse`: all do. */
  loss?: 'topk-mse' | 'mse';
  /**
   * K. Default: a quarter of the experts plus four, rounded up to even, at least 8 and twice the router's top-k, at most all experts; these
   * are the paper's choices for its four models.
   */
  k?: number;
  /** Pull towards the original router, relative to the mean energy of the inputs; default 1e-3. */
  ridge?: number;
}

/** `download`: of a source on the hub; its `fraction` is of that alone. */
export type Stage = 'download' | 'check' | 'sample' | 'calibrate' | 'write';

export interface Progress {
  stage: Stage;
  /** Decoder layer, from 0, in stage `calibrate`. */
  layer?: number;
  /** Overall, from 0 to 1. */
  fraction: number;
  /** What is being done, for people. */
  message: string;
}

export interface QuantizeOptions {
  /** Directory to write; it must not exist, be empty, or hold an unfinished run of the same job. */
  output: string;
  /** Bits of the experts: 2, 3, 4; 2.5 = first half of the MoE layers 3, the others 2; or a function for every matrix. Default 3. */
  bits?: BitsOption;
  /** Default 4. 16 leaves attention as it is. */
  attentionBits?: 2 | 3 | 4 | 16;
  /** Shared experts and dense layers; default: attentionBits. */
  sharedBits?: SharedBits;
  /** Input channels that share a scale and zero point: a multiple of 32; default 128. */
  groupSize?: number;
  /** Fixed zero point; default false, as in the paper. */
  symmetric?: boolean;
  /** `gptq` (default), or `rtn`: round to nearest, which with `router: false` needs no calibration. */
  method?: 'gptq' | 'rtn';
  /** Default `self`. */
  calibration?: CalibrationSource;
  /** Calibration sequences; default 128. */
  samples?: number;
  /** Tokens a calibration sequence; default 2048, at most what the model was made for. */
  seqLen?: number;
  /** Router calibration; false leaves routers alone. Default `{ loss: 'topk-mse' }`. */
  router?: RouterCalibrationSettings | false;
  /** GPTQ in the order of falling Hessian diagonal, groups as stored. Default true. */
  actOrder?: boolean;
  /** Fit the weights to the full-precision stream's outputs: W* = W + W D H^-1. Default true. */
  twoStreamTargets?: boolean;
  /** Weight each token in an expert's Hessian by its routing weight to this power; 0 = off. Default 1. */
  routingWeightPower?: number;
  /** Search smaller ranges a group. Default false: it did harm at 2 bit. */
  clipSearch?: boolean;
  /** Added to the Hessian's diagonal, relative to its mean. Default 0.01. */
  damping?: number;
  /**
   * An expert that fewer tokens reach is calibrated with the tokens that the router likes next best for it, up to this many. Default 256.
   * With 0, an expert that no token reaches is rounded to nearest.
   */
  minExpertTokens?: number;
  /** Continue an unfinished run in `output`; default true. */
  resume?: boolean;
  /** For `self` calibration and the choice of texts. Default 0. */
  seed?: number;
  device?: 'auto' | 'cpu' | 'cuda';
  threads?: number;
  onProgress?: (progress: Progress) => void;
  signal?: AbortSignal;
}

export interface LayerReport {
  layer: number;
  seconds: number;
  /** Mean squared output error of a token and output channel, averaged over the matrices of each kind; 0 for `rtn`, which does not know it. */
  errors: Record<string, number>;
  router?: {
    iterations: number;
    lossBefore: number;
    lossAfter: number;
    /** On the calibration tokens, before and after calibrating this layer's router. */
    shiftBefore: ShiftRates;
    shiftAfter: ShiftRates;
    /** False when the calibrated router did worse on held-out calibration tokens and the original was kept. */
    kept: boolean;
    /** Fewest and most tokens that an expert was calibrated with, before topping up. */
    expertTokens: [number, number];
    /** Experts that needed topping up. */
    starvedExperts: number[];
  };
}

export interface QuantizeReport {
  /** Version of eac-moe. */
  version: string;
  source: string;
  options: Record<string, unknown>;
  calibration: { sequences: number; seqLen: number; tokens: number };
  /** Bytes of the weight files written. */
  bytes: number;
  /** Bits a quantized weight; with scales and zero points. */
  averageBits: number;
  averageBitsWithOverhead: number;
  layers: LayerReport[];
  seconds: number;
}
