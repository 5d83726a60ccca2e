/**
 * Quantized checkpoints: a Hugging Face directory whose config.json has a `quantization_config` of method 'gptq', as GPTQModel writes
 * and transformers, vLLM and SGLang read it. quantize writes version 2; both versions are read.
 *
 * LAYOUT   Per module `<module>`, for weights [out, in] of b bits in groups of g input channels:
 *            <module>.qweight i32 [ceil(in / 32) * b, out]          codes along the input channels, a little-endian bit string a column
 *            <module>.qzeros  i32 [groups, ceil(out / 32) * b]      zero points along the output channels (see zeros.ts)
 *            <module>.scales  f16 [groups, out]
 *            <module>.g_idx   i32 [in]                              channel -> group, here always channel / g
 *          The file's bits are native/kernels/quant/pack.cpp's business. See dynamic.ts for the per-module overrides.
 */
import type { Matrix, QuantMatrix, Tensor } from '../../types/native';
import { EacMoeError } from '../errors';
import { native } from '../native';
import { FieldReader, type ModelConfig } from './config';
import { compileOverrides, type ModuleQuantization, type Override } from './dynamic';
import { describeValue } from './files';
import { publishedFormat, quantizationFields } from './published';
import type { Checkpoint } from './source';
import type { TensorEntry } from './writer';
import { convertZeros, type GptqVersion } from './zeros';

export {
  exactPatterns,
  quantizationConfig,
  type ModuleQuantization,
  type QuantizationConfig,
} from './dynamic';

const RE_SAVE =
  'use the original, unquantized model, or re-save it with GPTQModel as gptq_v2 with desc_act false';

const VERSIONS: ReadonlyMap<string, GptqVersion> = new Map([
  ['gptq', 1],
  ['gptq_v2', 2],
]);

/** What config.json says about the quantization of a checkpoint. */
export interface Quantization {
  /** How a module (name without '.weight') is quantized, or null when it is not. */
  of(module: string): ModuleQuantization | null;
  /** The `quantizer` entries of `meta`, e.g. ['eac-moe:0.1.0']. */
  readonly quantizers: readonly string[];
  /** How zero points are stored; default 2. */
  readonly version?: GptqVersion;
}

function unsupported(where: string, what: string, cure = 'use the original, unquantized model'): EacMoeError {
  return new EacMoeError('UNSUPPORTED_MODEL', `${where}: ${what}; ${cure}`);
}

/** Refuses what cannot be read. */
function formatVersion(fields: FieldReader): GptqVersion {
  const { where } = fields;
  const method = fields.string(
    'quant_method',
    fields.has('load_in_4bit') || fields.has('load_in_8bit') ? 'bitsandbytes' : '',
  );
  if (method !== 'gptq') {
    throw unsupported(
      where,
      `this checkpoint is already quantized with ${describeValue(method || undefined)}, only GPTQ, and FP8 and MXFP4 as published, can be read`,
    );
  }
  const format = fields.string('checkpoint_format', 'gptq');
  const version = VERSIONS.get(format);
  if (!version)
    throw unsupported(
      where,
      `checkpoint_format is ${describeValue(format)}, only 'gptq' and 'gptq_v2' can be read`,
      RE_SAVE,
    );
  if (fields.boolean('desc_act', false))
    throw unsupported(
      where,
      'desc_act is true (groups of scattered channels), which cannot be read',
      RE_SAVE,
    );
  if (fields.boolean('lm_head', false))
    throw unsupported(where, 'lm_head is quantized, which cannot be read', RE_SAVE);
  return version;
}

/** `base` overridden by the fields that are there. */
function readModule(fields: FieldReader, base?: ModuleQuantization): ModuleQuantization {
  const bits = fields.positiveInteger('bits', base?.bits);
  if (bits < 2 || bits > 4) throw unsupported(fields.where, `bits is ${bits}, only 2, 3 and 4 can be read`);
  const group =
    fields.value('group_size') === -1 ? Infinity : fields.positiveInteger('group_size', base?.groupSize);
  const symmetric = fields.boolean('sym', base?.symmetric ?? true);
  if (fields.boolean('desc_act', false))
    throw unsupported(fields.where, 'desc_act is true, which cannot be read', RE_SAVE);
  return { bits, groupSize: group, symmetric };
}

/**
 * The quantization of a checkpoint, or null for a full model, be it published as floats, FP8 or MXFP4. Fails for formats that cannot be
 * read, saying which it is.
 */
export function quantizationOf(config: ModelConfig): Quantization | null {
  const fields = quantizationFields(config);
  if (!fields || publishedFormat(config)) return null;
  const version = formatVersion(fields);
  const base = readModule(fields);
  const overrides: Override[] = [];
  const dynamic = fields.object('dynamic');
  for (const pattern of Object.keys(dynamic?.raw ?? {})) {
    if (pattern.startsWith('-:')) overrides.push({ pattern, value: null });
    else
      overrides.push({
        pattern,
        value: readModule(dynamic!.object(pattern) ?? new FieldReader({}, dynamic!.where), base),
      });
  }
  const lookup = compileOverrides(overrides, base, dynamic?.where ?? fields.where);
  const quantizer = fields.object('meta')?.value('quantizer');
  const quantizers = (Array.isArray(quantizer) ? quantizer : [quantizer]).filter(
    (q): q is string => typeof q === 'string',
  );
  return { of: lookup, quantizers, version };
}

export interface ExpectedTensor {
  name: string;
  dtype: string;
  shape: number[];
  optional?: boolean;
}

/** The tensors of a quantized module with weights [out, in]. */
export function quantizedTensors(
  module: string,
  q: ModuleQuantization,
  out: number,
  inputs: number,
): ExpectedTensor[] {
  const groups = Math.ceil(inputs / Math.min(q.groupSize, inputs));
  return [
    { name: `${module}.qweight`, dtype: 'I32', shape: [Math.ceil(inputs / 32) * q.bits, out] },
    { name: `${module}.qzeros`, dtype: 'I32', shape: [groups, Math.ceil(out / 32) * q.bits] },
    { name: `${module}.scales`, dtype: 'F16', shape: [groups, out] },
    { name: `${module}.g_idx`, dtype: 'I32', shape: [inputs], optional: true },
  ];
}

/** What reading needs of a Checkpoint, or of one of its files. */
export type TensorReader = Pick<Checkpoint, 'dir' | 'has' | 'info' | 'tensor' | 'release'> &
  Partial<Pick<Checkpoint, 'config'>>;

/** The tensors that a quantized module is stored as. */
export const QUANTIZED_PARTS = ['qweight', 'qzeros', 'scales', 'g_idx'] as const;

export function moduleOf(weightName: string): string {
  return weightName.replace(/\.weight$/, '');
}

/** Entries for the writer. The tensors they hold are small copies; `dispose` them once written, or leave that to garbage collection. */
export async function quantizedEntries(
  module: string,
  matrix: QuantMatrix,
): Promise<(TensorEntry & { data: Tensor })[]> {
  const { qweight, qzeros, scales, gIdx } = await matrix.toGptq();
  return [
    { name: `${module}.qweight`, data: qweight },
    { name: `${module}.qzeros`, data: qzeros },
    { name: `${module}.scales`, data: scales },
    { name: `${module}.g_idx`, data: gIdx },
  ];
}

/** Groups must be runs of consecutive channels; act-order with desc_act scatters them. */
function checkGroupIndex(where: string, module: string, index: ArrayLike<number>, groupSize: number): void {
  for (let c = 0; c < index.length; c++) {
    if (index[c] !== Math.floor(c / groupSize)) {
      throw unsupported(
        where,
        `'${module}.g_idx' puts channel ${c} into group ${index[c]}, expected ${Math.floor(c / groupSize)}: groups of scattered channels (desc_act) cannot be read`,
        RE_SAVE,
      );
    }
  }
}

/** The qzeros of version 1 in version 2; takes `qzeros`. */
function secondVersion(dir: string, module: string, bits: number, out: number, qzeros: Tensor): Tensor {
  const { shape } = qzeros;
  const packed = { words: qzeros.toArray() as Int32Array, groups: shape[0]!, out, bits };
  const words = convertZeros(packed, 2, `${dir}: '${module}.qzeros'`);
  qzeros.dispose();
  return native().fromArray(words, 'i32', shape);
}

async function readQuantMatrix(
  checkpoint: TensorReader,
  module: string,
  q: ModuleQuantization,
  version: GptqVersion,
  out: number,
  inputs: number,
): Promise<QuantMatrix> {
  const groupSize = Math.min(q.groupSize, inputs);
  const expected = quantizedTensors(module, q, out, inputs);
  const tensors: Tensor[] = [];
  try {
    for (const { name, dtype, shape, optional } of expected) {
      if (optional && !checkpoint.has(name)) {
        const trivial = Int32Array.from({ length: inputs }, (_, c) => Math.floor(c / groupSize));
        tensors.push(native().fromArray(trivial, 'i32', shape));
        continue;
      }
      const found = checkpoint.info(name).dtype;
      if (found !== dtype) {
        throw new EacMoeError(
          'INVALID_TENSOR',
          `${checkpoint.dir}: tensor '${name}' has dtype ${found}, expected ${dtype}`,
        );
      }
      tensors.push(checkpoint.tensor(name, shape));
    }
    if (version === 1) tensors[1] = secondVersion(checkpoint.dir, module, q.bits, out, tensors[1]!);
    const [qweight, qzeros, scales, gIdx] = tensors as [Tensor, Tensor, Tensor, Tensor];
    checkGroupIndex(checkpoint.dir, module, gIdx.toArray(), groupSize);
    return await native().fromGptq(
      { qweight, qzeros, scales, gIdx },
      { rows: out, cols: inputs, bits: q.bits, groupSize, symmetric: q.symmetric },
    );
  } finally {
    for (const tensor of tensors) tensor.dispose();
  }
}

/**
 * The weights of a linear layer, [out, in]: a QuantMatrix when the checkpoint holds '<module>.qweight', else the mapped tensor.
 * `quantization` is quantizationOf(checkpoint.config); pass it to read it once.
 */
export async function readMatrix(
  checkpoint: TensorReader,
  weightName: string,
  out: number,
  inputs: number,
  quantization: Quantization | null = checkpoint.config ? quantizationOf(checkpoint.config) : null,
): Promise<Matrix> {
  const module = moduleOf(weightName);
  if (!checkpoint.has(`${module}.qweight`)) return checkpoint.tensor(weightName, [out, inputs]);
  const q = quantization?.of(module);
  if (!q) {
    throw new EacMoeError(
      'INVALID_CHECKPOINT',
      `${checkpoint.dir}: holds '${module}.qweight' but config.json's quantization_config does not say how '${module}' is quantized`,
    );
  }
  return readQuantMatrix(checkpoint, module, q, quantization?.version ?? 2, out, inputs);
}
