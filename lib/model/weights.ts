/** The weights of a checkpoint as the decoder asks for them: mapped tensors; what is stored in another form, repacked or decoded once. */
import type { Control, Matrix, Tensor } from '../../types/native';
import {
  biasOf,
  isView,
  readStored,
  storageOf,
  viewStored,
  weightOf,
  type Wanted,
} from '../architecture/storage';
import { attentionLinears } from '../architecture/tensors';
import type { LayerSpec, LinearSpec } from '../architecture/types';
import {
  moduleOf,
  QUANTIZED_PARTS,
  readMatrix,
  type Quantization,
  type TensorReader,
} from '../checkpoint/quantized';
import { EacMoeError } from '../errors';
import { abortError, native, withSignal } from '../native';
import type { WeightSource } from './linear';

export class CheckpointWeights implements WeightSource {
  readonly #reader: TensorReader;
  readonly #quantization: Quantization | null;
  /** What `prepare` has read: repacked and decoded matrices and biases, by logical name. */
  readonly #prepared = new Map<string, Matrix>();

  constructor(reader: TensorReader, quantization: Quantization | null) {
    this.#reader = reader;
    this.#quantization = quantization;
  }

  /** A matrix that `prepare` has read, or a tensor of the file. */
  matrix(spec: LinearSpec): Matrix {
    return this.#prepared.get(spec.weight) ?? this.#view(weightOf(spec));
  }

  /** Of a layer that has one. */
  bias(spec: LinearSpec): Tensor {
    return this.read(biasOf(spec)!);
  }

  tensor(name: string, shape: number[]): Tensor {
    return this.#reader.tensor(name, shape);
  }

  /** A matrix or bias that is not quantized, as decoded by `prepare` or as a view of the file: a handle of the caller's own. */
  read(wanted: Wanted): Tensor {
    const decoded = this.#prepared.get(wanted.name) as Tensor | undefined;
    return decoded?.reshape(decoded.shape) ?? this.#view(wanted);
  }

  /**
   * Reads into memory what the file does not hold as the decoder wants it: repacks quantized matrices, decodes FP8 and MXFP4 to bf16,
   * gathers experts' parts of fused tensors that are transposed or interleaved.
   *
   * @throws EacMoeError NON_FINITE for NaN among FP8 or MXFP4 weights, INVALID_TENSOR, ABORTED
   */
  async prepare(specs: LinearSpec[], signal?: AbortSignal): Promise<void> {
    await withSignal(signal, async (control) => {
      for (const spec of specs) {
        if (signal?.aborted) throw abortError(signal);
        const module = moduleOf(spec.weight);
        if (this.#reader.has(`${module}.qweight`)) await this.#repack(spec, module);
        else await this.#decode(weightOf(spec), control);
        const bias = biasOf(spec);
        if (bias) await this.#decode(bias, control);
      }
    }).catch((error: unknown) => {
      this.release(specs);
      throw error;
    });
  }

  /** Frees what `prepare` has read for these. */
  release(specs: LinearSpec[]): void {
    for (const spec of specs) {
      for (const name of [spec.weight, biasOf(spec)?.name ?? '']) {
        this.#prepared.get(name)?.dispose();
        this.#prepared.delete(name);
      }
    }
  }

  /**
   * Rounds a matrix of the file to 4 bits in groups of 32, to nearest, and keeps that in memory. One that is quantized in the file stays as
   * it is.
   */
  async round(spec: LinearSpec): Promise<void> {
    if (this.#prepared.has(spec.weight)) return;
    const options = { bits: 4, groupSize: 32, symmetric: false, clipSearch: false };
    this.#prepared.set(spec.weight, await native().quantizeRtn(this.#view(weightOf(spec)), options));
  }

  dispose(): void {
    for (const matrix of this.#prepared.values()) matrix.dispose();
    this.#prepared.clear();
  }

  async #repack({ weight, out, in: inputs }: LinearSpec, module: string): Promise<void> {
    this.#prepared.set(weight, await readMatrix(this.#reader, weight, out, inputs, this.#quantization));
    this.#reader.release(QUANTIZED_PARTS.map((part) => `${module}.${part}`));
  }

  async #decode(wanted: Wanted, control: Control): Promise<void> {
    if (this.#prepared.has(wanted.name)) return;
    const storage = storageOf(this.#reader, wanted);
    if (!storage || isView(storage)) return;
    this.#prepared.set(wanted.name, await readStored(this.#reader, wanted, storage, control));
    this.#reader.release(storage.tensors.map((t) => t.name));
  }

  #view(wanted: Wanted): Tensor {
    const storage = storageOf(this.#reader, wanted);
    // Missing: the error of a tensor that is not there.
    if (!storage) return this.#reader.tensor(wanted.name, wanted.shape);
    const view = viewStored(this.#reader, wanted, storage);
    if (!view) throw new EacMoeError('INTERNAL', `'${wanted.name}' must be prepared before it is used`);
    return view;
  }
}

/** The matrices of a layer that may be quantized. */
export function layerMatrices({ attention: a, feedForward: f }: LayerSpec): LinearSpec[] {
  const glus = f.kind === 'dense' ? [f] : [...f.experts, ...(f.shared ? [f.shared] : [])];
  return [...attentionLinears(a), ...glus.flatMap(({ gate, up, down }) => [gate, up, down])];
}
