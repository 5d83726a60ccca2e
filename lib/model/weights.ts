/** The weights of a checkpoint as the decoder asks for them: mapped tensors, and quantized matrices repacked once. */
import { setImmediate as nextTurn } from 'node:timers/promises';
import type { Matrix, Tensor } from '../../types/native';
import type { Architecture, LayerSpec, LinearSpec } from '../architecture/types';
import { quantizationOf, readMatrix, type Quantization } from '../checkpoint/quantized';
import type { Checkpoint } from '../checkpoint/source';
import { abortError } from '../native';
import type { WeightSource } from './layer';

export class CheckpointWeights implements WeightSource {
  readonly #checkpoint: Checkpoint;
  readonly #quantization: Quantization | null;
  readonly #matrices = new Map<string, Matrix>();

  constructor(checkpoint: Checkpoint) {
    this.#checkpoint = checkpoint;
    this.#quantization = quantizationOf(checkpoint.config);
  }

  matrix(spec: LinearSpec): Matrix {
    let matrix = this.#matrices.get(spec.weight);
    if (!matrix) {
      matrix = readMatrix(this.#checkpoint, spec.weight, spec.out, spec.in, this.#quantization);
      this.#matrices.set(spec.weight, matrix);
    }
    return matrix;
  }

  tensor(name: string, shape: number[]): Tensor {
    return this.#checkpoint.tensor(name, shape);
  }

  /** Repacks all quantized matrices, a layer at a time between turns of the event loop. */
  async prepare(architecture: Architecture, signal?: AbortSignal): Promise<void> {
    if (!this.#quantization) return;
    for (const layer of architecture.layers) {
      for (const spec of layerMatrices(layer)) {
        this.matrix(spec);
        await nextTurn();
        if (signal?.aborted) throw abortError(signal);
      }
      this.#checkpoint.release(this.#checkpoint.names().filter((name) => /\.(qweight|qzeros|scales)$/.test(name)));
    }
  }

  dispose(): void {
    for (const matrix of this.#matrices.values()) matrix.dispose();
    this.#matrices.clear();
  }
}

/** The matrices of a layer that may be quantized. */
export function layerMatrices({ attention: a, feedForward: f }: LayerSpec): LinearSpec[] {
  const glus = f.kind === 'dense' ? [f] : [...f.experts, ...(f.shared ? [f.shared] : [])];
  return [a.q, a.k, a.v, a.o, ...glus.flatMap(({ gate, up, down }) => [gate, up, down])];
}
