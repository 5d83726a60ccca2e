/** The weights of a checkpoint as the decoder asks for them: mapped tensors, and quantized matrices repacked once. */
import type { Matrix, Tensor } from '../../types/native';
import { attentionLinears } from '../architecture/tensors';
import type { LayerSpec, LinearSpec } from '../architecture/types';
import {
  moduleOf,
  QUANTIZED_PARTS,
  readMatrix,
  type Quantization,
  type TensorReader,
} from '../checkpoint/quantized';
import { abortError, native } from '../native';
import type { WeightSource } from './linear';

export class CheckpointWeights implements WeightSource {
  readonly #reader: TensorReader;
  readonly #quantization: Quantization | null;
  readonly #matrices = new Map<string, Matrix>();

  constructor(reader: TensorReader, quantization: Quantization | null) {
    this.#reader = reader;
    this.#quantization = quantization;
  }

  /** A matrix that `prepare` has read, or a tensor of the file. */
  matrix(spec: LinearSpec): Matrix {
    return this.#matrices.get(spec.weight) ?? this.#reader.tensor(spec.weight, [spec.out, spec.in]);
  }

  bias({ bias, out }: LinearSpec): Tensor {
    return this.#reader.tensor(bias!, [out]);
  }

  tensor(name: string, shape: number[]): Tensor {
    return this.#reader.tensor(name, shape);
  }

  /** Repacks matrices that are quantized in the file into memory. */
  async prepare(specs: LinearSpec[], signal?: AbortSignal): Promise<void> {
    if (!this.#quantization) return;
    for (const { weight, out, in: inputs } of specs) {
      if (signal?.aborted) throw abortError(signal);
      this.#matrices.set(weight, await readMatrix(this.#reader, weight, out, inputs, this.#quantization));
      this.#reader.release(QUANTIZED_PARTS.map((part) => `${moduleOf(weight)}.${part}`));
    }
  }

  /**
   * Rounds a matrix of the file to 4 bits in groups of 32, to nearest, and keeps that in memory. One that is quantized in the file stays as
   * it is.
   */
  async round({ weight, out, in: inputs }: LinearSpec): Promise<void> {
    if (this.#matrices.has(weight)) return;
    const options = { bits: 4, groupSize: 32, symmetric: false, clipSearch: false };
    this.#matrices.set(
      weight,
      await native().quantizeRtn(this.#reader.tensor(weight, [out, inputs]), options),
    );
  }

  dispose(): void {
    for (const matrix of this.#matrices.values()) matrix.dispose();
    this.#matrices.clear();
  }
}

/** The matrices of a layer that may be quantized. */
export function layerMatrices({ attention: a, feedForward: f }: LayerSpec): LinearSpec[] {
  const glus = f.kind === 'dense' ? [f] : [...f.experts, ...(f.shared ? [f.shared] : [])];
  return [...attentionLinears(a), ...glus.flatMap(({ gate, up, down }) => [gate, up, down])];
}
