/** Matrices of a checkpoint on their way into a GGUF file: which type holds them, and their bytes in it. */
import { setImmediate as nextTurn } from 'node:timers/promises';
import type { QuantMatrix, Tensor } from '../../../types/native';
import type { LinearSpec } from '../../architecture';
import { moduleOf } from '../../checkpoint/quantized';
import { CheckpointWeights } from '../../model/weights';
import { native } from '../../native';
import type { ExportJob } from '../job';
import { addLoss, CANDIDATES, encodeRow, noLoss, type BlockTypeName, type Codes, type Loss } from './blocks';
import { GGML_TYPES, type GgmlTypeName } from './writer';

/** Weights between two turns of the event loop: some 10 ms. */
const TURN = 2 ** 20;

export interface Choice {
  type: GgmlTypeName;
  /** Squared errors and squared weights, summed. */
  error: number;
  energy: number;
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
  readonly #weights: CheckpointWeights;

  constructor(
    private readonly job: ExportJob,
    private readonly onRead: (spec: LinearSpec) => void,
  ) {
    this.#weights = new CheckpointWeights(job.checkpoint, job.quantization);
  }

  /** Calls `use` with a matrix: its codes where it is stored quantized, else the tensor. */
  async #with<T>(spec: LinearSpec, use: (matrix: Codes | Tensor) => Promise<T>): Promise<T> {
    await this.#weights.prepare([spec], this.job.options.signal);
    const matrix = this.#weights.matrix(spec);
    try {
      return await use('bits' in matrix ? await codesOf(matrix) : matrix);
    } finally {
      this.#weights.release([spec]);
      this.job.checkpoint.release([spec.weight]);
    }
  }

  /**
   * The type of a tensor of these matrices, all [out, in]: as stored where they are not quantized, else the smallest with a relative error of
   * at most `maxLoss`.
   */
  async choose(specs: LinearSpec[], maxLoss: number): Promise<Choice> {
    const quantized = specs.filter(({ weight }) => this.job.modules.has(moduleOf(weight)));
    // A mix of both needs a type for both: the weights themselves.
    const none = { error: 0, energy: 0 };
    if (quantized.length === 0) return { type: await this.#denseType(specs[0]!), ...none };
    if (quantized.length < specs.length) return { type: 'F32', ...none };
    const loss: Loss = noLoss();
    for (const spec of specs) {
      await this.#with(spec, (matrix) => this.#measure(matrix as Codes, loss));
      this.onRead(spec);
    }
    const index = loss.errors.findIndex((error) => error <= maxLoss ** 2 * loss.energy);
    return { type: CANDIDATES[index]!, error: loss.errors[index]!, energy: loss.energy };
  }

  async #denseType(spec: LinearSpec): Promise<GgmlTypeName> {
    const dtype = await this.#with(spec, (matrix) => Promise.resolve((matrix as Tensor).dtype));
    return DENSE.get(dtype) ?? 'F32';
  }

  async #measure(codes: Codes, loss: Loss): Promise<void> {
    const step = Math.max(1, Math.floor(TURN / codes.cols));
    for (let row = 0; row < codes.rows; row += step) {
      addLoss(codes, row, Math.min(codes.rows, row + step), loss);
      await nextTurn();
    }
  }

  /** The bytes of such a tensor, some rows at a time. Row r is row order[r] of the matrix. */
  async *bytes(specs: LinearSpec[], type: GgmlTypeName, order?: number[]): AsyncGenerator<Uint8Array> {
    for (const spec of specs) {
      yield* await this.#with(spec, (matrix) => this.#encode(matrix, type, order));
      this.onRead(spec);
    }
  }

  async #encode(matrix: Codes | Tensor, type: GgmlTypeName, order?: number[]): Promise<Uint8Array[]> {
    if (!('codes' in matrix)) return [await denseBytes(matrix, type, order)];
    const pieces: Uint8Array[] = [];
    const { values, bytes } = GGML_TYPES[type];
    const rowBytes = (matrix.cols / values) * bytes;
    const step = Math.max(1, Math.floor(TURN / matrix.cols));
    for (let begin = 0; begin < matrix.rows; begin += step) {
      const end = Math.min(matrix.rows, begin + step);
      const piece = new DataView(new ArrayBuffer((end - begin) * rowBytes));
      let at = 0;
      for (let row = begin; row < end; row++)
        at = encodeRow(matrix, order?.[row] ?? row, type as BlockTypeName, piece, at);
      pieces.push(new Uint8Array(piece.buffer));
      await nextTurn();
    }
    return pieces;
  }

  /** Biases as f32, one after the other. */
  async *biases(specs: LinearSpec[], order?: number[]): AsyncGenerator<Uint8Array> {
    for (const spec of specs) {
      await this.#weights.prepare([spec], this.job.options.signal);
      const bias = this.#weights.bias(spec);
      yield await f32Bytes(bias, order);
      bias.dispose();
      this.#weights.release([spec]);
    }
  }

  /** A tensor's numbers as f32, e.g. those of a norm or a router. */
  async values(name: string): Promise<Uint8Array> {
    const tensor = this.job.checkpoint.tensor(name);
    try {
      return await f32Bytes(tensor);
    } finally {
      tensor.dispose();
    }
  }
}

async function f32Bytes(tensor: Tensor, order?: number[]): Promise<Uint8Array> {
  const column = tensor.reshape([tensor.shape.reduce((a, b) => a * b, 1), 1]);
  try {
    return await denseBytes(column, 'F32', order);
  } finally {
    column.dispose();
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
