/** What a model directory holds, and what it would weigh compressed. Reads configuration and headers, no weights. */
import { describe, type Architecture } from '../architecture';
import { storageOf } from '../architecture/storage';
import { checkTensors, requiredTensors } from '../architecture/tensors';
import { moduleOf, quantizationOf } from '../checkpoint/quantized';
import { Checkpoint } from '../checkpoint/source';
import { withModelHeaders, type DownloadOptions } from '../hub';
import { estimateSize, makePlan, type Plan, type PlanOptions } from './plan';

export interface ModelSize {
  /** Bits of the experts; 16 = not quantized. */
  bits: 16 | 2 | 2.5 | 3 | 4;
  bytes: number;
  /** Bits a weight, over the matrices that are quantized. */
  averageBits: number;
  /** The same with scales and zero points. */
  averageBitsWithOverhead: number;
}

export interface ModelInfo {
  /** As it was asked for. */
  path: string;
  /** `model_type` of config.json. */
  family: string;
  layers: number;
  moeLayers: number;
  /** Routed experts of a MoE layer. */
  experts: number;
  /** Experts a token uses. */
  topK: number;
  sharedExperts: boolean;
  hiddenSize: number;
  vocabSize: number;
  maxPositions: number;
  parameters: number;
  /** What one token uses. */
  activeParameters: number;
  /** Of the weights that are not quantized: `fp8` or `mxfp4` where matrices are published so, else as config.json has it. */
  dtype: string;
  /** Size of the weight files. */
  bytes: number;
  /** Of a quantized model. */
  quantization?: {
    quantizers: readonly string[];
    averageBits: number;
    averageBitsWithOverhead: number;
    /** Matrices by their bits. */
    matrices: Record<string, number>;
  };
  /** What the weights make at each bit width, under `InspectOptions`. */
  sizes: ModelSize[];
}

/** How `sizes` are estimated; the defaults are those of `quantizeMoE`. */
export type InspectOptions = Omit<PlanOptions, 'bits'> & DownloadOptions;

const BITS = [2, 2.5, 3, 4] as const;

/** The first matrix that is stored below 16 bit without being quantized says it of all. */
function publishedDtype(architecture: Architecture, checkpoint: Checkpoint): 'fp8' | 'mxfp4' | undefined {
  for (const tensor of requiredTensors(architecture)) {
    const kind = storageOf(checkpoint, tensor)?.kind;
    if (kind === 'fp8' || kind === 'mxfp4') return kind;
  }
  return undefined;
}

/**
 * Describes a model directory, or `hf:<owner>/<name>[@revision]`, of whose weights only the headers are downloaded.
 *
 * @throws EacMoeError FILE_NOT_FOUND, INVALID_CHECKPOINT, INVALID_TENSOR or UNSUPPORTED_MODEL, naming the file or tensor; for models of
 * the hub also those of `downloadModel`
 */
export function inspectModel(path: string, options: InspectOptions = {}): Promise<ModelInfo> {
  return withModelHeaders(path, options, (directory) => ({ path, ...describeModel(directory, options) }));
}

function describeModel(directory: string, options: InspectOptions): Omit<ModelInfo, 'path'> {
  const checkpoint = Checkpoint.open(directory);
  try {
    const { config } = checkpoint;
    const architecture = describe(config);
    checkTensors(architecture, checkpoint);
    const moe = architecture.layers.flatMap(({ feedForward: f }) => (f.kind === 'moe' ? [f] : []));
    const sizes = BITS.map((bits) => ({
      bits,
      ...estimateSize(architecture, makePlan(architecture, { ...options, bits })),
    }));
    const { parameters, activeParameters, bytesAt16Bit } = sizes[0]!;
    const info: Omit<ModelInfo, 'path'> = {
      family: architecture.modelType,
      layers: architecture.layers.length,
      moeLayers: moe.length,
      experts: moe[0]!.router.out,
      topK: moe[0]!.router.topK,
      sharedExperts: moe.some((f) => f.shared !== undefined),
      hiddenSize: architecture.hiddenSize,
      vocabSize: architecture.vocabSize,
      maxPositions: architecture.maxPositions,
      parameters,
      activeParameters,
      dtype: publishedDtype(architecture, checkpoint) ?? config.dtype,
      bytes: checkpoint.byteLength,
      sizes: [
        { bits: 16, bytes: bytesAt16Bit, averageBits: 16, averageBitsWithOverhead: 16 },
        ...sizes.map(({ bits, bytes, averageBits, averageBitsWithOverhead }) => ({
          bits,
          bytes,
          averageBits,
          averageBitsWithOverhead,
        })),
      ],
    };
    const quantization = quantizationOf(config);
    if (!quantization) return info;
    const plan: Plan = new Map(
      requiredTensors(architecture)
        .filter((tensor) => tensor.projection !== undefined)
        .map(({ name }) => {
          const module = moduleOf(name);
          return [name, checkpoint.has(`${module}.qweight`) ? quantization.of(module) : null];
        }),
    );
    const matrices: Record<string, number> = {};
    for (const q of plan.values()) matrices[q?.bits ?? 16] = (matrices[q?.bits ?? 16] ?? 0) + 1;
    const { averageBits, averageBitsWithOverhead } = estimateSize(architecture, plan);
    info.quantization = {
      quantizers: quantization.quantizers,
      averageBits,
      averageBitsWithOverhead,
      matrices,
    };
    return info;
  } finally {
    checkpoint.dispose();
  }
}
