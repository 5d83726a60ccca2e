/** The quantized checkpoint that is being exported. */
import type { Tensor } from '../../types/native';
import type { Architecture } from '../architecture';
import { requiredTensors, type RequiredTensor } from '../architecture/tensors';
import { nativeDType } from '../checkpoint/dtypes';
import { moduleOf, type ModuleQuantization, type Quantization } from '../checkpoint/quantized';
import type { Checkpoint } from '../checkpoint/source';
import type { TensorEntry } from '../checkpoint/safetensors';
import { convertZeros, type GptqVersion } from '../checkpoint/zeros';
import { abortError } from '../native';
import type { ExportOptions } from './options';

/** A linear layer that is stored quantized. */
export interface QuantizedModule {
  name: string;
  out: number;
  in: number;
  q: ModuleQuantization;
  tensor: RequiredTensor;
}

export class ExportJob {
  /** By name. */
  readonly modules: ReadonlyMap<string, QuantizedModule>;
  /** Linear layers that are not: routers, gates, the head, matrices left at 16 bit. */
  readonly plain: readonly string[];
  #done = 0;
  #last: string | undefined;
  readonly #total: number;

  constructor(
    readonly checkpoint: Checkpoint,
    readonly architecture: Architecture,
    readonly quantization: Quantization | null,
    readonly options: ExportOptions,
  ) {
    const modules = new Map<string, QuantizedModule>();
    const plain: string[] = [];
    for (const tensor of requiredTensors(architecture)) {
      const name = moduleOf(tensor.name);
      const [out, inputs] = tensor.shape as [number, number];
      if (checkpoint.has(`${name}.qweight`))
        modules.set(name, { name, out, in: inputs, q: quantization!.of(name)!, tensor });
      else if (tensor.projection || ['router', 'gate', 'head'].includes(tensor.role)) plain.push(name);
    }
    this.modules = modules;
    this.plain = plain;
    this.#total = checkpoint.names().reduce((sum, name) => sum + checkpoint.info(name).bytes, 0);
  }

  /** A tensor of the source. Counts as progress, and the pages of the one read before may leave memory. */
  read(name: string): Tensor {
    const { signal, onProgress } = this.options;
    if (signal?.aborted) throw abortError(signal);
    this.#release();
    this.#last = name;
    onProgress?.({ fraction: Math.min(0.99, this.#done / this.#total), message: `writing ${name}` });
    this.#done += this.checkpoint.info(name).bytes;
    return this.checkpoint.tensor(name);
  }

  /** The zero points of a module, words of version 2: i32 [groups, ceil(out / 32) * bits]; or of `version`. */
  zeros(module: QuantizedModule, version: GptqVersion = 2): Int32Array {
    const name = `${module.name}.qzeros`;
    const words = this.read(name).toArray() as Int32Array;
    if (version === (this.quantization?.version ?? 2)) return words;
    const groups = this.checkpoint.info(name).shape[0]!;
    const packed = { words, groups, out: module.out, bits: module.q.bits };
    return convertZeros(packed, version, `${this.checkpoint.dir}: '${name}'`);
  }

  #release(): void {
    if (this.#last !== undefined) this.checkpoint.release([this.#last]);
  }
}

/** The tensor as it is. */
export function passOn(job: ExportJob, name: string): TensorEntry[] {
  const { dtype, shape } = job.checkpoint.info(name);
  // What is in the checkpoint and has another dtype is no weight (checkTensors): a buffer that nothing reads.
  if (!nativeDType(dtype)) return [];
  return [{ name, dtype, shape, data: () => job.read(name) }];
}
