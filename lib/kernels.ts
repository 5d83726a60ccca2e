/**
 * `eac-moe/kernels`: the kernels one by one, for servers, benchmarks and research that want one without the rest.
 *
 * Arrays live in native memory behind `Tensor` handles, row-major; `tensor()` copies numbers in, `toArray()` copies them out,
 * `dispose()` frees (or the garbage collector does). Functions that compute return promises and run on the library's thread pool; results
 * do not depend on the number of threads. Errors are EacMoeError with code INVALID_ARGUMENT unless said otherwise.
 *
 * @module
 */
import type {
  Activation,
  Activations,
  Device,
  DType,
  GpuInfo,
  HessianFactor,
  Matrix,
  NumericArray,
  Program,
  QuantMatrix,
  Register,
  RouterSpec,
  Tensor,
} from '../types/native';
import { EacMoeError } from './errors';
import { ProgramBuilder } from './model/program';
import { native } from './native';

export { measureLimits, type MachineLimits } from './bench/limits';
export { EacMoeError, type ErrorCode } from './errors';
export { ProgramBuilder, type Range } from './model/program';
export type {
  Activation,
  Activations,
  Control,
  Device,
  DType,
  Frame,
  GptqTensors,
  GpuInfo,
  HessianFactor,
  KvCache,
  MachineRates,
  Matrix,
  NumericArray,
  Op,
  Program,
  Pruning,
  QuantMatrix,
  Register,
  RegisterSpec,
  RouterSpec,
  Sampling,
  Sequence,
  Tensor,
} from '../types/native';

/** The instruction set in use and those of this machine, e.g. `{ isa: 'avx2', isas: ['baseline', 'avx2'] }`. EAC_MOE_ISA caps it. */
export function cpuInfo(): { version: string; isa: string; isas: string[] } {
  return native().info();
}

/** The GPU that device 'cuda' stands for, or why there is none. Opens the CUDA library and the device on the first call that can (docs/cuda.md). */
export function gpuInfo(): GpuInfo {
  return native().cuda();
}

/** Chooses an instruction set for the whole process, for tests and benchmarks. */
export function setIsa(name: string): void {
  native().setIsa(name);
}

/** Threads of the process-wide pool, the calling one included. Default: EAC_MOE_THREADS, else all CPUs. */
export function threads(): number {
  return native().threads();
}

/** Sets the number of threads of the process-wide pool, 1 to 1024. */
export function setThreads(count: number): void {
  native().setThreads(count);
}

/** A tensor with a copy of `data`, converted to `dtype`. */
export function tensor(data: NumericArray, shape: number[], dtype: DType = 'f32'): Tensor {
  return native().fromArray(data, dtype, shape);
}

/** A tensor of zeros. On device 'cuda' only programs made for it, and the tensor's own methods, take it. */
export function zeros(shape: number[], dtype: DType = 'f32', device: Device = 'cpu'): Tensor {
  return native().zeros(dtype, shape, device);
}

/**
 * Random weights for benchmarks, the same for the same seed on every machine. Quantized (columns in multiples of 32): uniform codes
 * and zero points, scales that give unit inputs outputs of about unit size. Dense: uniform with variance 1 / columns.
 */
export function randomMatrix(
  rows: number,
  cols: number,
  kind: GroupOptions,
  seed: number,
): Promise<QuantMatrix>;
export function randomMatrix(
  rows: number,
  cols: number,
  kind: { dtype: 'f32' | 'f16' | 'bf16' },
  seed: number,
): Promise<Tensor>;
export function randomMatrix(
  rows: number,
  cols: number,
  kind: GroupOptions | { dtype: 'f32' | 'f16' | 'bf16' },
  seed: number,
): Promise<Matrix> {
  return native().randomMatrix(rows, cols, 'dtype' in kind ? kind : groups(kind), seed);
}

/**
 * Decodes FP8 weights (e4m3) as DeepSeek-V3 publishes them: bf16(code * scale), the product in f32.
 *
 * @param codes u8 [out, in]
 * @param scales f32, f16 or bf16 [ceil(out / block[0]), ceil(in / block[1])]: `weight_scale_inv`
 * @returns bf16 [out, in]
 * @throws EacMoeError NON_FINITE for NaN among codes and scales
 */
export function decodeFp8(
  codes: Tensor,
  scales: Tensor,
  block: [number, number] = [128, 128],
): Promise<Tensor> {
  return native().decodeFp8(codes, scales, block);
}

/**
 * Decodes MXFP4 weights (OCP Microscaling Formats 1.0) as gpt-oss publishes them: e2m1 codes, the first in the low nibble, times
 * 2^(scale - 127).
 *
 * @param blocks u8 [out, in / 2]
 * @param scales u8 [out, in / 32]
 * @returns bf16 [out, in]
 * @throws EacMoeError NON_FINITE for a scale of 255, which is NaN
 */
export function decodeMxfp4(blocks: Tensor, scales: Tensor): Promise<Tensor> {
  const [rows] = matrixShape('blocks', blocks);
  return native().decodeMxfp4(blocks, scales, { from: 0, step: 1, rows });
}

/** How weights are grouped and rounded. */
export interface GroupOptions {
  /** 2, 3 or 4. */
  bits: number;
  /** Input channels that share a scale and a zero point: a multiple of 32; default 128. The last group may be shorter. */
  groupSize?: number;
  /** Zero point fixed at 2^(bits-1); default false. */
  symmetric?: boolean;
  /** Try smaller ranges for each group and keep the one with the least weighted squared error; default false. */
  clipSearch?: boolean;
}

function groups({ bits, groupSize = 128, symmetric = false, clipSearch = false }: GroupOptions) {
  return { bits, groupSize, symmetric, clipSearch };
}

/**
 * Grouped round to nearest: W[r, c] ~ scale * (code - zero) with an f16 scale and an integer zero point a row and group.
 *
 * @param w f32, f16 or bf16 [out, in]
 * @param importance weight of each input channel in the clip search, [in]
 */
export function quantizeRoundToNearest(
  w: Tensor,
  options: GroupOptions,
  importance?: Float32Array,
): Promise<QuantMatrix> {
  return native().quantizeRtn(w, groups(options), importance);
}

/**
 * Adds a batch of inputs to a GPTQ Hessian: H += Xᵀ diag(w) X.
 *
 * @param h f32 [n, n], e.g. from `zeros([n, n])`
 * @param x f32 [tokens, n]
 * @param weights one a token
 */
export function accumulateHessian(h: Tensor, x: Tensor, weights?: Float32Array): Promise<void> {
  return native().accumulateHessian(h, x, weights);
}

/** Adds to the cross statistics of two-stream targets: D += (Xfull - X)ᵀ diag(w) X. f32 [n, n] and [tokens, n]. */
export function accumulateCross(d: Tensor, xFull: Tensor, x: Tensor, weights?: Float32Array): Promise<void> {
  return native().accumulateCross(d, xFull, x, weights);
}

export interface FactorOptions {
  /** Added to the diagonal, relative to its mean; default 0.01. */
  damping?: number;
  /** Quantize channels in the order of falling diagonal; groups stay as stored; default false. */
  actOrder?: boolean;
}

/**
 * Factors a Hessian, H⁻¹ = UᵀU, in f64, for `quantizeGptq` on any number of matrices with the same input.
 *
 * @throws EacMoeError NOT_POSITIVE_DEFINITE
 */
export function factorHessian(h: Tensor, options: FactorOptions = {}): Promise<HessianFactor> {
  const { damping = 0.01, actOrder = false } = options;
  return native().factorHessian(h, damping, actOrder);
}

/** W* = W + beta W D H⁻¹: what to quantize so that the output on X comes close to that of W on Xfull. f32 [out, in]. */
export function twoStreamTarget(w: Tensor, factor: HessianFactor, d: Tensor, beta = 1): Promise<Tensor> {
  return native().twoStreamTarget(w, factor, d, beta);
}

/**
 * GPTQ (Frantar et al., 2023).
 *
 * @param w f32, f16 or bf16 [out, in]
 * @returns the matrix, and tr((W - Q) H (W - Q)ᵀ) / out with the damped H
 */
export function quantizeGptq(
  w: Tensor,
  factor: HessianFactor,
  options: GroupOptions,
): Promise<{ matrix: QuantMatrix; error: number }> {
  return native().quantizeGptq(w, factor, groups(options));
}

/**
 * A quantized matrix from its parts.
 *
 * @param codes u8 [out, in]; `scales` f16 and `zeros` u8 [out, ceil(in / groupSize)]
 */
export function packCodes(
  codes: Tensor,
  scales: Tensor,
  zeroPoints: Tensor,
  options: GroupOptions,
): Promise<QuantMatrix> {
  return native().packCodes(codes, scales, zeroPoints, groups(options));
}

/**
 * Calibrates a router so that on `x` it gives the logits `targets` for the K largest of each token: TopK-MSE, EAC-MoE Eq. 5, solved to
 * its minimum with a ridge towards the original.
 *
 * @param w [experts, hidden]
 * @param x router inputs behind quantized layers, f32 [tokens, hidden]
 * @param targets full-precision logits of the same tokens, f32 [tokens, experts]
 * @param options.k window; the number of experts gives plain MSE
 * @param options.ridge relative to the mean energy of the inputs; default 1e-3
 */
export function calibrateRouter(
  w: Tensor,
  x: Tensor,
  targets: Tensor,
  options: { k: number; ridge?: number; tolerance?: number; maxIterations?: number },
): Promise<{ weight: Tensor; iterations: number; lossBefore: number; lossAfter: number }> {
  const { k, ridge = 1e-3, tolerance = 1e-5, maxIterations = 100 } = options;
  return native().calibrateRouter(w, x, targets, { k, ridge, tolerance, maxIterations });
}

export interface ProductOptions {
  /**
   * How a product with quantized weights treats its input: `int8` rounds it in blocks of up to 128 channels that share a scale, max|x| / 127,
   * and sums in exact integers within a block; `float32` (default) is exact. Dense weights are always exact.
   */
  activations?: Activations;
}

/** y = x Wᵀ + bias. x f32 [tokens, in]; w [out, in], dense or quantized; bias [out]; f32 [tokens, out]. */
export function linear(x: Tensor, w: Matrix, bias?: Tensor, options: ProductOptions = {}): Promise<Tensor> {
  return native().linear(x, w, bias, options.activations ?? 'float32');
}

const DEFAULT_ROUTER = { scoring: 'softmax', renormalize: false, scale: 1, jitter: 0 } as const;

/**
 * From router logits to chosen experts.
 *
 * @param logits f32 [tokens, experts]
 * @returns weights f32 and indices i32 [tokens, topK], by falling weight, and how often each expert was chosen, i32 [1, experts]
 */
export async function selectExperts(
  logits: Tensor,
  router: Partial<RouterSpec> & { topK: number },
): Promise<{ weights: Tensor; indices: Tensor; counts: Tensor }> {
  const [tokens, experts] = matrixShape('logits', logits);
  const spec: RouterSpec = { ...DEFAULT_ROUTER, ...router };
  const b = new ProgramBuilder();
  const input = b.register('logits', experts);
  const weights = b.register('weights', spec.topK);
  const indices = b.register('indices', spec.topK, 'i32');
  const counts = b.register('counts', experts, 'i32', 'sequences');
  b.push({ op: 'route', logits: input, weights, indices, counts, router: spec });
  const [w, i, c] = await runOnce(b, tokens, [[input, logits]], [weights, indices, counts]);
  return { weights: w!, indices: i!, counts: c! };
}

/** The matrices of one expert: gate and up [hidden, in], down [in, hidden]. */
export interface ExpertMatrices {
  gate: Matrix;
  up: Matrix;
  down: Matrix;
}

/**
 * The fused sparse-expert layer: y[t] = sum over the chosen experts e of weight * down_e(activation(gate_e x[t]) * up_e x[t]). Tokens are
 * grouped by expert; an index of -1 (pruned) costs nothing, an expert that nobody chose is never read.
 *
 * @param x f32 [tokens, in]; weights f32 and indices i32 [tokens, topK]
 * @returns f32 [tokens, in]
 */
export async function runExperts(
  x: Tensor,
  weights: Tensor,
  indices: Tensor,
  experts: ExpertMatrices[],
  activation: Activation = 'silu',
  options: ProductOptions = {},
): Promise<Tensor> {
  const [tokens, width] = matrixShape('x', x);
  const [, topK] = matrixShape('weights', weights);
  const chosen = indices.toArray();
  const bad = chosen.findIndex((e) => e < -1 || e >= experts.length);
  if (bad >= 0) {
    throw new EacMoeError(
      'INVALID_ARGUMENT',
      `indices holds ${chosen[bad]}; there are ${experts.length} experts`,
    );
  }
  const b = new ProgramBuilder();
  const rx = b.register('x', width);
  const rw = b.register('weights', topK);
  const ri = b.register('indices', topK, 'i32');
  const out = b.register('out', width);
  b.push({
    op: 'experts',
    x: rx,
    weights: rw,
    indices: ri,
    out,
    gate: experts.map((e) => e.gate),
    up: experts.map((e) => e.up),
    down: experts.map((e) => e.down),
    activation,
  });
  const bindings: [Register, Tensor][] = [
    [rx, x],
    [rw, weights],
    [ri, indices],
  ];
  const [y] = await runOnce(b, tokens, bindings, [out], options.activations);
  return y!;
}

/** Any operations of the decoder as a program: see `ProgramBuilder`, `Op` and `Frame`. */
export function createFrame(program: Program) {
  return native().createFrame(program);
}

/** Keys and values of one sequence for `attention` operations; a layer's rows are `keyWidth` and `valueWidth` f32 values a token. */
export function createKvCache(layers: { keyWidth: number; valueWidth: number }[], device: Device = 'cpu') {
  return native().createKvCache(layers, device);
}

function matrixShape(name: string, t: Tensor): [number, number] {
  const { shape } = t;
  if (shape.length !== 2) {
    throw new EacMoeError(
      'INVALID_ARGUMENT',
      `${name} must have two dimensions; found [${shape.join(', ')}]`,
    );
  }
  return shape as [number, number];
}

/** Runs a program once over one sequence and returns registers that nothing will overwrite. */
async function runOnce(
  b: ProgramBuilder,
  tokens: number,
  bindings: [Register, Tensor][],
  results: Register[],
  activations: Activations = 'float32',
): Promise<Tensor[]> {
  const program = b.build();
  const frame = native().createFrame(program);
  try {
    frame.setActivations(activations);
    for (const [register, value] of bindings) frame.bind(register, value);
    frame.begin(null, [{ length: tokens }]);
    await frame.run(0, program.length);
    return results.map((register) => frame.tensor(register));
  } finally {
    frame.dispose();
    program.dispose();
  }
}
