/**
 * The native binding (`native/addon/`), as `lib/native.ts` loads it. Hand-written; test/native.test.ts holds it against
 * the addon's own exports.
 *
 * Conventions. Handles (`Tensor`, `QuantMatrix`, ...) own native memory until `dispose()` or garbage collection; a running job keeps what
 * it uses alive. Functions that compute return a promise and run on the addon's own thread pool. `control` is an Int32Array of
 * length >= 1 that native threads poll: a non-zero control[0] aborts the job with code ABORTED.
 * Native errors are plain objects `{ code, message }`; lib/native.ts turns them into EacMoeError.
 */

export type DType = 'f32' | 'f16' | 'bf16' | 'f64' | 'i32' | 'u8';
export type NumericArray = Float32Array | Float64Array | Int32Array | Uint16Array | Uint8Array;
export type Control = Int32Array;
/** Where memory lies and programs run. */
export type Device = 'cpu' | 'cuda';

/** A row-major array in native memory. The matrix view has `cols` = last dimension, `rows` = product of the others. */
export interface Tensor {
  readonly dtype: DType;
  readonly shape: number[];
  readonly byteLength: number;
  readonly device: Device;
  /** Rows [begin, end) of the matrix view, sharing the memory. */
  rows(begin: number, end: number): Tensor;
  /** The same memory with another shape of equal size. */
  reshape(shape: number[]): Tensor;
  /** A copy as numbers: Float32Array for float dtypes (f64 too), Int32Array for i32, Uint8Array for u8. */
  toArray(): Float32Array | Int32Array | Uint8Array;
  /** A copy of the raw bytes, little-endian, as stored. */
  toBytes(): Uint8Array;
  /** Overwrites all elements; `data` has one number an element and is converted to the dtype. */
  write(data: NumericArray): void;
  dispose(): void;
}

/** Weights quantized in groups along the input channels (native/kernels/quant/quant_matrix.h). Shape [rows, cols] = [out, in]. */
export interface QuantMatrix {
  readonly bits: number;
  readonly rows: number;
  readonly cols: number;
  readonly groupSize: number;
  readonly symmetric: boolean;
  readonly byteLength: number;
  /** u8 [rows, cols] */
  codes(): Promise<Tensor>;
  /** f16 [rows, groups], a copy */
  scales(): Tensor;
  /** u8 [rows, groups], a copy */
  zeros(): Tensor;
  /** f32 [rows, cols] */
  dequantize(): Promise<Tensor>;
  /** The GPTQ v2 tensors: qweight i32, qzeros i32, scales f16, gIdx i32. */
  toGptq(): Promise<GptqTensors>;
  dispose(): void;
}
export interface GptqTensors {
  qweight: Tensor;
  qzeros: Tensor;
  scales: Tensor;
  gIdx: Tensor;
}

/** Weights of a linear layer, [out, in]. */
export type Matrix = Tensor | QuantMatrix;

/** A read-only file mapped into memory. */
export interface MappedFile {
  readonly byteLength: number;
  /** A copy of bytes [begin, end). */
  bytes(begin: number, end: number): Uint8Array;
  /** A tensor over the mapping; keeps it alive. */
  tensor(dtype: DType, shape: number[], byteOffset: number): Tensor;
  /** Tells the system that the pages of [begin, end) are not needed now: they leave resident memory and are read again on use. */
  release(begin: number, end: number): void;
  dispose(): void;
}

/** Rows from, from + step, ... of a matrix. */
export interface RowRange {
  from: number;
  step: number;
  rows: number;
}

export interface QuantOptions {
  bits: number;
  groupSize: number;
  symmetric: boolean;
  clipSearch: boolean;
}

/** The factor U of a damped Hessian, H^-1 = U^T U. */
export interface HessianFactor {
  readonly size: number;
  /** Damped diagonal by channel: the importance for a clip search. */
  diagonal(): Float32Array;
  dispose(): void;
}

/** Keys and values of one sequence, per layer, f32. Grows as tokens come. */
export interface KvCache {
  /** Tokens held. */
  readonly length: number;
  readonly byteLength: number;
  /** Forgets the tokens from `length` on. */
  truncate(length: number): void;
  dispose(): void;
}

/** How router logits become chosen experts and weights. */
export interface RouterSpec {
  /**
   * Scores by softmax over all experts or by a sigmoid each, then top-k; or the sparse mixer of Phi-3.5-MoE (top-2, arXiv 2409.12136,
   * evaluation mode).
   */
  scoring: 'softmax' | 'sigmoid' | 'sparse-mixer';
  topK: number;
  /** Divide the chosen weights by their sum. */
  renormalize: boolean;
  /** Multiplies the weights at the end. */
  scale: number;
  /** Sparse mixer only: the router's jitter epsilon. */
  jitter: number;
  /** [experts]: added to the scores when experts are chosen, never to their weights (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). */
  correction?: Tensor;
  /**
   * Experts in `count` groups, one after the other; only those of the `top` best groups can be chosen. A group is worth its `best`
   * experts: the best one (DeepSeek-V2, arXiv 2405.04434) or the best two together (V3).
   */
  groups?: { count: number; top: number; best: 1 | 2 };
}

export type Register = number;
/** How products with quantized weights treat their inputs: as int8 in blocks of up to 128 channels, or exactly. */
export type Activations = 'int8' | 'float32';
/** `clamped-swiglu` (gpt-oss): g sigmoid(1.702 g) (up + 1) with g = min(gate, 7) and up within ±7. */
export type Activation = 'silu' | 'gelu' | 'gelu-tanh' | 'relu' | 'clamped-swiglu';

/**
 * One step of a program. Registers hold one row a token unless said otherwise; widths are declared with the program.
 * `rope` tables hold the inverse frequencies [rotaryDim / 2]; `long` takes over when a sequence is longer than `longFrom` tokens.
 */
export type Op =
  | { op: 'embed'; out: Register; table: Tensor; scale: number }
  | { op: 'rmsNorm'; x: Register; out: Register; weight: Tensor; eps: number }
  | { op: 'layerNorm'; x: Register; out: Register; weight: Tensor; bias: Tensor; eps: number }
  /** out = x W^T + bias, or out += that when `add`. */
  | { op: 'linear'; x: Register; out: Register; weight: Matrix; bias?: Tensor; add?: boolean }
  /** In place, on heads of `headDim`; the first 2 * frequencies.length channels of a head turn, paired half by half or interleaved. */
  | {
      op: 'rope';
      x: Register;
      headDim: number;
      /** First turning channel of a head; default 0. */
      offset?: number;
      frequencies: Tensor;
      scale: number;
      interleaved: boolean;
      longFrequencies?: Tensor;
      longScale?: number;
      longFrom?: number;
    }
  /** Causal attention over the sequence's cache (or over its own rows when it has none); appends k and v to layer `layer` of the cache. */
  | {
      op: 'attention';
      q: Register;
      k: Register;
      v: Register;
      out: Register;
      layer: number;
      heads: number;
      kvHeads: number;
      headDim: number;
      /** Channels of a value; default headDim. */
      valueDim?: number;
      scale: number;
      /** Sliding window in tokens; 0 = none. */
      window: number;
      /** [heads]: a logit of each head that joins the softmax's denominator and has no value (gpt-oss). */
      sinks?: Tensor;
    }
  /** logits [tokens, experts] -> weights, indices [tokens, topK], counts [sequences, experts]. */
  | {
      op: 'route';
      logits: Register;
      weights: Register;
      indices: Register;
      counts: Register;
      router: RouterSpec;
    }
  /** Prunes weights and indices as the frame says (see Frame.setPruning), by the counts of `route` if it is by alpha; else does nothing. */
  | {
      op: 'reselect';
      logits: Register;
      weights: Register;
      indices: Register;
      counts: Register;
      router: RouterSpec;
    }
  /**
   * out (+)= sum over the chosen experts of weight * down(activation(gate x) * up x); pruned slots (index -1) cost nothing.
   * `shared`: an expert that every token has, times sigmoid(outputGate x) if that is given.
   */
  | {
      op: 'experts';
      x: Register;
      weights: Register;
      indices: Register;
      out: Register;
      gate: Matrix[];
      up: Matrix[];
      down: Matrix[];
      activation: Activation;
      shared?: { gate: Matrix; up: Matrix; down: Matrix; outputGate?: Matrix };
      /** Of the routed experts, one of each an expert. */
      biases?: { gate: Tensor[]; up: Tensor[]; down: Tensor[] };
      add?: boolean;
    }
  /** gate = activation(gate) * up, in place. */
  | { op: 'glu'; gate: Register; up: Register; activation: Activation }
  | { op: 'copy'; x: Register; out: Register }
  /** x *= scale */
  | { op: 'scale'; x: Register; scale: number }
  /** out += scale * x */
  | { op: 'addScaled'; x: Register; out: Register; scale: number }
  /** Some columns of each head: out[h][to + i] = x[h][from + i], i < count. */
  | { op: 'columns'; x: Register; out: Register; heads: number; from: number; to: number; count: number }
  /**
   * A product for each head, with rows [begin, begin + count) of the head's block of `weight`, or their transpose (kernels/matmul/head_linear.h).
   * It takes the first channels of each head of x and gives the first of out.
   */
  | {
      op: 'headLinear';
      x: Register;
      out: Register;
      weight: Matrix;
      heads: number;
      begin: number;
      count: number;
      transposed: boolean;
    }
  /** out, one row a sequence: its last row of x. */
  | { op: 'lastRows'; x: Register; out: Register }
  /** logits [sequences, vocabulary] -> ids [sequences, 1], under the frame's sampling options. */
  | { op: 'sample'; logits: Register; out: Register };

export interface RegisterSpec {
  width: number;
  dtype: 'f32' | 'i32';
  /** One row a token, or one a sequence. */
  rows: 'tokens' | 'sequences';
}

/** A recorded list of operations over registers; immutable, shared by frames. */
export interface Program {
  readonly length: number;
  /**
   * Copies the weights to the program's device; the first run would otherwise. `memory`: bytes of it that they may take, 0 = what is free;
   * experts beyond stay in the host's memory and are copied ahead layer by layer. Rejects with OUT_OF_MEMORY.
   */
  prepare(control?: Control, memory?: number): Promise<void>;
  dispose(): void;
}

export interface Sequence {
  /** Tokens of this sequence in the batch. */
  length: number;
  /** Without a cache the sequence starts at position 0 and attends to its own rows only. */
  cache?: KvCache;
}

/**
 * Which experts to prune: by a mask, per sequence and expert, 1 = kept, 0 = pruned; or by PESF (EAC-MoE, Eq. 6): an expert that gets less
 * than alpha / experts of a sequence's choices. Sequences shorter than minTokens, and single tokens, keep all.
 */
export type Pruning = { mode: 'drop' | 'renormalize' | 'reselect' } & (
  { mask: Uint8Array } | { alpha: number; minTokens: number }
);

export interface Sampling {
  /** 0 = greedy. */
  temperature: number;
  /** 0 = off. */
  topK: number;
  /** 1 = off. */
  topP: number;
  /** One uniform number in [0, 1) a sequence. */
  uniform: Float64Array;
}

/** The registers of one batch in flight. One run at a time. */
export interface Frame {
  /** Starts a batch: positions follow from the caches' lengths. `ids` may be null when the program has no `embed`. */
  begin(ids: Int32Array | null, sequences: Sequence[]): void;
  /** Uses `tensor` (rows and width must fit) as the memory of a register, until the next bind or `null`. */
  bind(register: Register, tensor: Tensor | null): void;
  /** What `reselect` does in the runs to come; `null` = nothing. */
  setPruning(pruning: Pruning | null): void;
  /** How linear layers and experts with quantized weights treat their inputs in the runs to come; a new frame is at 'float32'. */
  setActivations(activations: Activations): void;
  setSampling(sampling: Sampling): void;
  /** Runs ops [from, to). */
  run(from: number, to: number, control?: Control): Promise<void>;
  /** Makes the caches hold the tokens of this batch. */
  commit(): void;
  /** A copy of a register's rows. */
  read(register: Register): Float32Array | Int32Array;
  /** The register's memory as a tensor; its contents are those of the latest run. */
  tensor(register: Register): Tensor;
  dispose(): void;
}

/**
 * A GPU, memory in bytes; or why there is none to use. INVALID_ARGUMENT: this machine has no CUDA library or no GPU. The other codes: it has, but
 * they do not work (a missing file that EAC_MOE_CUDA names, a library of another version, an old driver, a GPU that is busy or has failed).
 */
export type GpuInfo =
  | { available: true; name: string; computeCapability: string; totalMemory: number; freeMemory: number }
  | {
      available: false;
      code: 'INVALID_ARGUMENT' | 'FILE_NOT_FOUND' | 'DEVICE' | 'OUT_OF_MEMORY';
      why: string;
    };

/** What this machine can do (native/kernels/bench/limits.h). */
export interface MachineRates {
  /** Bytes a second read from memory, four streams a thread. */
  readBandwidth: number;
  /** Float32 operations a second; a multiply-add is two. */
  fmaPeak: number;
  /** Operations a second on 8-bit operands, in the form that this instruction set's quantized products have. */
  int8Peak: number;
}

export interface NativeBinding {
  /** e.g. { version: '0.1.0', isa: 'avx512', isas: ['baseline', 'avx2', 'avx512'] } */
  info(): { version: string; isa: string; isas: string[] };
  /** The GPU that `cuda` stands for. Opens the library and the device on the first call that can. */
  cuda(): GpuInfo;
  setIsa(name: string): void;
  threads(): number;
  setThreads(n: number): void;

  zeros(dtype: DType, shape: number[], device?: Device): Tensor;
  fromArray(data: NumericArray, dtype: DType, shape: number[]): Tensor;
  /** Bytes as they lie in a file, little-endian. */
  fromBytes(data: Uint8Array, dtype: DType, shape: number[]): Tensor;
  mapFile(path: string): MappedFile;
  /** Converts to another float dtype. */
  cast(tensor: Tensor, dtype: DType): Promise<Tensor>;
  /** Copies rows `indices` of x (f32) into `out` (f32 [indices.length, cols]). */
  gatherRows(x: Tensor, indices: Int32Array, out: Tensor): Promise<void>;
  /** One pass over a float tensor: the index of the first element that is NaN or infinite, or -1, and a 64-bit hash of the contents. */
  scanTensor(tensor: Tensor, control?: Control): Promise<{ nonFinite: number; hash: string }>;

  /**
   * Rows from, from + step, ... of a matrix of any dtype, or of its transpose, copied: m [a, b] -> [rows, b], or [rows, a] where transposed
   * (native/kernels/convert/convert.h).
   */
  copyPart(m: Tensor, part: RowRange & { transposed: boolean }, control?: Control): Promise<Tensor>;
  /**
   * FP8 weights (e4m3): codes u8 [rows, cols], scales f32, f16 or bf16, one a block of `block` [rows, cols] -> bf16 [rows, cols]. NON_FINITE
   * for a NaN code or a scale that is not finite, with its place.
   */
  decodeFp8(codes: Tensor, scales: Tensor, block: [number, number], control?: Control): Promise<Tensor>;
  /**
   * MXFP4 weights: rows from, from + step, ... of blocks u8 [a, 16 g], 32 codes each, with scales u8 [a, g] -> bf16 [rows, 32 g]. NON_FINITE
   * for a scale of 255 (NaN), with its place.
   */
  decodeMxfp4(blocks: Tensor, scales: Tensor, part: RowRange, control?: Control): Promise<Tensor>;

  quantizeRtn(
    w: Tensor,
    options: QuantOptions,
    importance?: Float32Array,
    control?: Control,
  ): Promise<QuantMatrix>;
  accumulateHessian(h: Tensor, x: Tensor, weights?: Float32Array): Promise<void>;
  accumulateCross(d: Tensor, xFull: Tensor, x: Tensor, weights?: Float32Array): Promise<void>;
  factorHessian(h: Tensor, damping: number, actOrder: boolean, control?: Control): Promise<HessianFactor>;
  twoStreamTarget(w: Tensor, factor: HessianFactor, d: Tensor, beta: number): Promise<Tensor>;
  quantizeGptq(
    w: Tensor,
    factor: HessianFactor,
    options: QuantOptions,
    control?: Control,
  ): Promise<{ matrix: QuantMatrix; error: number }>;
  packCodes(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    options: { bits: number; groupSize: number; symmetric: boolean },
  ): Promise<QuantMatrix>;
  fromGptq(
    tensors: GptqTensors,
    options: { rows: number; cols: number; bits: number; groupSize: number; symmetric: boolean },
  ): Promise<QuantMatrix>;

  calibrateRouter(
    w: Tensor,
    x: Tensor,
    targets: Tensor,
    options: { k: number; ridge: number; tolerance: number; maxIterations: number },
    control?: Control,
  ): Promise<{ weight: Tensor; iterations: number; lossBefore: number; lossAfter: number }>;

  /** w f32 [experts, hidden] in another float dtype, each channel's rounding error spread over the channels that follow (GPTQ). */
  roundRouter(w: Tensor, factor: HessianFactor, dtype: DType): Promise<Tensor>;

  /** y = x W^T (+ bias): x f32 [n, in] -> f32 [n, out]. */
  linear(x: Tensor, w: Matrix, bias: Tensor | undefined, activations: Activations): Promise<Tensor>;

  /** Negative log-likelihood in nats of targets[i] under softmax(logits row i); targets -1 give 0. */
  tokenNll(logits: Tensor, targets: Int32Array): Promise<Float64Array>;
  /** KL(softmax(p) || softmax(q)) in nats, per row. */
  klDivergence(p: Tensor, q: Tensor): Promise<Float64Array>;
  /** The `count` largest rows of column `column` of x, not in `exclude`, by falling value (ties: the earlier row). */
  topRows(x: Tensor, column: number, count: number, exclude: Int32Array): Promise<Int32Array>;

  /** Memory to read from. 0: 1 GiB, or a quarter of the machine's memory where that is less. */
  limitBuffer(bytes: number, control?: Control): Promise<Tensor>;
  /** One pass of some ten milliseconds for each rate; pass p reads where pass p - 1 ended. */
  limitPass(buffer: Tensor, pass: number, control?: Control): Promise<MachineRates>;
  /** Random weights [rows, cols], the same for the same seed everywhere. Quantized: cols a multiple of 32. */
  randomMatrix(
    rows: number,
    cols: number,
    kind: { bits: number; groupSize: number; symmetric: boolean } | { dtype: 'f32' | 'f16' | 'bf16' },
    seed: number,
  ): Promise<Matrix>;

  /** Registers, caches and bound tensors must lie on the program's device. */
  createProgram(registers: RegisterSpec[], ops: Op[], device?: Device): Program;
  createFrame(program: Program): Frame;
  /** Per layer the widths of a key row and a value row. */
  createKvCache(layers: { keyWidth: number; valueWidth: number }[], device?: Device): KvCache;
}
