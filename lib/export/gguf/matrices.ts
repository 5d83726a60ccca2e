/** Matrices of a checkpoint on their way into a GGUF file: which type holds them, and their bytes in it. */
import { setImmediate as nextTurn } from 'node:timers/promises';
import type { QuantMatrix, Tensor } from '../../../types/native';
import { moduleOf, QUANTIZED_PARTS, readMatrix } from '../../checkpoint/quantized';
import { abortError, native } from '../../native';
import type { ExportJob } from '../job';
import { addLoss, CANDIDATES, encodeRow, noLoss, type BlockTypeName, type Codes, type Loss } from './blocks';
import { GGML_TYPES, type GgmlTypeName } from './writer';

/** Weights between two turns of the event loop: some 10 ms. */
const TURN = 2 ** 20;

export interface Choice {
  type: GgmlTypeName;
  /** Squared errors and weights, summed. */
  error: number;
  energy: number;
  weights: number;
}

const DENSE: ReadonlyMap<string, 'F32' | 'F16' | 'BF16'> = new Map([
  ['f32', 'F32'],
  ['f16', 'F16'],
  ['bf16', 'BF16'],
]);

async function codesOf(matrix: QuantMatrix): Promise<Codes> {
  const { rows, cols, bits, groupSize } = matrix;
  const [codes, scales, zeros] = [await matrix.codes(), matrix.scales(), matrix.zeros()];
  try {
    return {
      codes: codes.toBytes(),
      scaleBits: new Uint16Array(scales.toBytes().slice().buffer),
      scales: scales.toArray() as Float32Array,
      zeros: zeros.toBytes(),
      rows,
      cols,
      bits,
      groupSize,
    };
  } finally {
    for (const tensor of [codes, scales, zeros]) tensor.dispose();
  }
}

export class MatrixReader {
  constructor(
    private readonly job: ExportJob,
    private readonly onRead: (weight: string, bytes: number) => void,
  ) {}

  /** Calls `use` with a matrix [out, in]: its codes where it is stored quantized, else the tensor. */
  async #with<T>(
    weight: string,
    shape: [number, number],
    use: (matrix: Codes | Tensor) => Promise<T>,
  ): Promise<T> {
    const { checkpoint, quantization, options } = this.job;
    if (options.signal?.aborted) throw abortError(options.signal);
    const module = moduleOf(weight);
    const names = checkpoint.has(weight) ? [weight] : QUANTIZED_PARTS.map((part) => `${module}.${part}`);
    const matrix = await readMatrix(checkpoint, weight, ...shape, quantization);
    try {
      return await use('bits' in matrix ? await codesOf(matrix) : matrix);
    } finally {
      matrix.dispose();
      checkpoint.release(names);
      this.onRead(weight, shape[0] * shape[1]);
    }
  }

  /**
   * The type of a tensor of these matrices, all [out, in]: as stored where they are not quantized, else the smallest with a relative error of
   * at most `maxLoss`.
   */
  async choose(weights: string[], shape: [number, number], maxLoss: number): Promise<Choice> {
    const plain = weights.filter((weight) => this.job.checkpoint.has(weight));
    const dtypes = new Set(plain.map((weight) => this.job.checkpoint.info(weight).dtype));
    const total = weights.length * shape[0] * shape[1];
    // A mix of both would need a type for both: the weights themselves.
    if (plain.length > 0) {
      const type =
        plain.length === weights.length && dtypes.size === 1 ? ([...dtypes][0] as GgmlTypeName) : 'F32';
      return { type, error: 0, energy: 0, weights: total };
    }
    const loss: Loss = noLoss();
    for (const weight of weights)
      await this.#with(weight, shape, (matrix) => this.#measure(matrix as Codes, loss));
    const allowed = maxLoss ** 2 * loss.energy;
    const index = loss.errors.findIndex((error) => error <= allowed);
    return { type: CANDIDATES[index]!, error: loss.errors[index]!, energy: loss.energy, weights: total };
  }

  async #measure(codes: Codes, loss: Loss): Promise<void> {
    const step = Math.max(1, Math.floor(TURN / codes.cols));
    for (let row = 0; row < codes.rows; row += step) {
      addLoss(codes, row, Math.min(codes.rows, row + step), loss);
      await nextTurn();
    }
  }

  /** The bytes of such a tensor, some rows at a time. Row r is row order[r] of the matrix. */
  async *bytes(
    weights: string[],
    shape: [number, number],
    type: GgmlTypeName,
    order?: number[],
  ): AsyncGenerator<Uint8Array> {
    for (const weight of weights) {
      const pieces: Uint8Array[] = [];
      await this.#with(weight, shape, async (matrix) => {
        // Collected: a matrix must not stay open while its reader waits for the disk.
        for await (const piece of this.#pieces(matrix, type, order)) pieces.push(piece);
      });
      yield* pieces;
    }
  }

  async *#pieces(matrix: Codes | Tensor, type: GgmlTypeName, order?: number[]): AsyncGenerator<Uint8Array> {
    if (!('codes' in matrix)) {
      yield await denseBytes(matrix, type, order);
      return;
    }
    const { values, bytes } = GGML_TYPES[type];
    const rowBytes = (matrix.cols / values) * bytes;
    const step = Math.max(1, Math.floor(TURN / matrix.cols));
    for (let begin = 0; begin < matrix.rows; begin += step) {
      const end = Math.min(matrix.rows, begin + step);
      const piece = new DataView(new ArrayBuffer((end - begin) * rowBytes));
      let at = 0;
      for (let row = begin; row < end; row++)
        at = encodeRow(matrix, order?.[row] ?? row, type as BlockTypeName, piece, at);
      yield new Uint8Array(piece.buffer);
      await nextTurn();
    }
  }

  /** Numbers as f32, e.g. a norm or a router. */
  async values(name: string, order?: number[]): Promise<Uint8Array> {
    const tensor = this.job.checkpoint.tensor(name);
    const flat = tensor.reshape([tensor.shape.reduce((a, b) => a * b, 1), 1]);
    try {
      return await denseBytes(flat, 'F32', order);
    } finally {
      flat.dispose();
      tensor.dispose();
    }
  }
}

/** A dense matrix in a dense type, its rows in another order. */
async function denseBytes(matrix: Tensor, type: GgmlTypeName, order?: number[]): Promise<Uint8Array> {
  const same = DENSE.get(matrix.dtype) === type;
  const tensor = same ? matrix : await native().cast(matrix, 'f32');
  try {
    const bytes = tensor.toBytes();
    return order ? inOrder(bytes, order) : bytes;
  } finally {
    if (!same) tensor.dispose();
  }
}

function inOrder(bytes: Uint8Array, order: number[]): Uint8Array {
  const row = bytes.byteLength / order.length;
  const result = new Uint8Array(bytes.byteLength);
  for (const [r, from] of order.entries()) result.set(bytes.subarray(from * row, (from + 1) * row), r * row);
  return result;
}
