/**
 * Export to compressed-tensors, format 'pack-quantized'.
 *
 * LAYOUT   Per module, weights [out, in] of b bits:
 *            <module>.weight_packed      i32 [out, ceil(in b / 32)]     codes along the input channels
 *            <module>.weight_scale       f16 [out, groups]
 *            <module>.weight_zero_point  i32 [ceil(out b / 32), groups] zero points along the output channels; asymmetric only
 *            <module>.weight_shape       i64 [2]
 *          The library's values are signed, q - 2^(b-1), and packed with 2^(b-1) added: what is stored are GPTQ's codes and zero points, so each
 *          of these tensors is one of GPTQ's transposed. 3 bit: a dense bit string, as the library packs it now; earlier versions left 2
 *          bits of each word empty.
 * Source   compressed_tensors/compressors/pack_quantized (https://github.com/vllm-project/compressed-tensors)
 */
import { exactPatterns } from '../checkpoint/quantized';
import type { TensorEntry } from '../checkpoint/safetensors';
import { unpackZeros } from '../checkpoint/zeros';
import { EacMoeError } from '../errors';
import { version } from '../version';
import type { DirectoryContent } from './directory';
import { bytesOf } from './gptq';
import { passOn, type ExportJob, type QuantizedModule } from './job';
import { checkVllm } from './vllm';

interface WeightArgs {
  num_bits: number;
  type: 'int';
  symmetric: boolean;
  strategy: 'group' | 'channel';
  group_size: number | null;
  dynamic: false;
  actorder: null;
}

export function compressedTensorsContent(job: ExportJob, consumer: 'vllm' | 'any'): DirectoryContent {
  for (const module of job.modules.values()) checkGroups(job, module);
  if (consumer === 'vllm') checkVllm(job);
  const { quantization_config: _, compression_config: __, ...config } = job.checkpoint.config.raw;
  return {
    config: { ...config, quantization_config: quantizationConfig(job) },
    convert: (name) => convert(job, name),
  };
}

/** Groups must divide the row; one group longer than it is a channel's. */
function checkGroups({ checkpoint }: ExportJob, { name, in: inputs, q }: QuantizedModule): void {
  if (q.groupSize < inputs && inputs % q.groupSize !== 0) {
    throw new EacMoeError(
      'UNSUPPORTED_MODEL',
      `${checkpoint.dir}: '${name}' has ${inputs} input channels in groups of ${q.groupSize}; compressed-tensors has no last, shorter group: quantize with a group size that divides ${inputs}`,
    );
  }
}

function weightArgs({ in: inputs, q }: QuantizedModule): WeightArgs {
  const channel = q.groupSize > inputs;
  return {
    num_bits: q.bits,
    type: 'int',
    symmetric: q.symmetric,
    strategy: channel ? 'channel' : 'group',
    group_size: channel ? null : q.groupSize,
    dynamic: false,
    actorder: null,
  };
}

/** 'model.layers.0.mlp.experts' of 'model.layers.0.mlp.experts.3.up_proj'. */
const expertsOf = (module: string): string => module.replace(/\.\d+\.[^.]+$/, '');

/**
 * Patterns for the modules of one setting. Experts that all have it are matched by the name that they share: vLLM asks for the fused layer's
 * experts under names of its own ('0.gate_proj' where the checkpoint has '0.w1').
 */
function targets(modules: QuantizedModule[], whole: ReadonlySet<string>): string[] {
  const single = modules.filter((m) => !whole.has(expertsOf(m.name))).map((m) => m.name);
  const fused = new Set(modules.map((m) => expertsOf(m.name)).filter((name) => whole.has(name)));
  return [
    ...exactPatterns(single).map((pattern) => `re:${pattern}`),
    ...exactPatterns([...fused]).map((pattern) => `re:${pattern.replace(/\$$/, '\\..+$')}`),
  ];
}

/** Names of the fused expert layers whose matrices all have one setting. */
function wholeExperts(settings: Map<string, QuantizedModule[]>, plain: readonly string[]): Set<string> {
  const keys = new Map<string, Set<string>>();
  const note = (name: string, key: string): void => {
    if (!keys.has(name)) keys.set(name, new Set());
    keys.get(name)!.add(key);
  };
  for (const [key, modules] of settings)
    for (const { name, tensor } of modules) if (tensor.role === 'expert') note(expertsOf(name), key);
  for (const name of plain) if (keys.has(expertsOf(name))) note(expertsOf(name), 'plain');
  return new Set([...keys].filter(([, k]) => k.size === 1).map(([name]) => name));
}

function quantizationConfig({ modules, plain }: ExportJob): Record<string, unknown> {
  const settings = new Map<string, QuantizedModule[]>();
  for (const module of modules.values()) {
    const key = JSON.stringify(weightArgs(module));
    settings.set(key, [...(settings.get(key) ?? []), module]);
  }
  const whole = wholeExperts(settings, plain);
  // The commonest setting takes whatever the others' patterns leave: names are tried before 'Linear'.
  const ordered = [...settings.values()].sort((a, b) => b.length - a.length);
  const groups = ordered.map((group, i) => ({
    targets: i === 0 ? ['Linear'] : targets(group, whole),
    weights: weightArgs(group[0]!),
    input_activations: null,
    output_activations: null,
    format: 'pack-quantized',
  }));
  return {
    quant_method: 'compressed-tensors',
    format: 'pack-quantized',
    quantization_status: 'compressed',
    config_groups: Object.fromEntries(groups.map((group, i) => [`group_${i}`, group])),
    ignore: exactPatterns([...plain]).map((pattern) => `re:${pattern}`),
    kv_cache_scheme: null,
    producer: `eac-moe:${version}`,
  };
}

function convert(job: ExportJob, name: string): TensorEntry[] {
  const part = /\.(qweight|qzeros|scales|g_idx)$/.exec(name)?.[1];
  const module = part && job.modules.get(name.slice(0, -part.length - 1));
  if (!module) return passOn(job, name);
  const { name: at, out, in: inputs, q } = module;
  const { shape } = job.checkpoint.info(name);
  const words = (count: number): number => Math.ceil((count * q.bits) / 32);
  switch (part) {
    case 'qweight': {
      const shapeData = (): Uint8Array => bytesOf(BigInt64Array.of(BigInt(out), BigInt(inputs)));
      return [
        {
          ...entry(`${at}.weight_packed`, 'I32', words(inputs), out),
          data: () => packed(job, name, words(inputs)),
        },
        { name: `${at}.weight_shape`, dtype: 'I64', shape: [2], data: shapeData },
      ];
    }
    case 'scales':
      return [{ ...entry(`${at}.weight_scale`, 'F16', shape[0]!, out), data: () => scales(job, name) }];
    case 'qzeros': {
      if (q.symmetric) {
        checkSymmetric(job, module);
        return [];
      }
      const data = (): Uint8Array => {
        const zeros = job.zeros(module);
        return bytesOf(transpose(zeros, zeros.length / shape[0]!, shape[0]!, words(out)));
      };
      return [{ ...entry(`${at}.weight_zero_point`, 'I32', shape[0]!, words(out)), data }];
    }
    default:
      return [];
  }
}

const entry = (name: string, dtype: string, columns: number, rows: number) => ({
  name,
  dtype,
  shape: [rows, columns],
});

function packed(job: ExportJob, name: string, rows: number): Uint8Array {
  const words = job.read(name).toArray() as Int32Array;
  const columns = job.checkpoint.info(name).shape[1]!;
  return bytesOf(transpose(words, columns, rows, columns));
}

function scales(job: ExportJob, name: string): Uint8Array {
  const [groups, out] = job.checkpoint.info(name).shape as [number, number];
  const bytes = job.read(name).toBytes();
  return bytesOf(transpose(new Uint16Array(bytes.slice().buffer), out, groups, out));
}

/** The transpose [columns, rows] of the first rows and columns of a matrix whose rows are `stride` long. */
export function transpose<T extends Int32Array | Uint16Array>(
  matrix: T,
  stride: number,
  rows: number,
  columns: number,
): T {
  const result = new (matrix.constructor as new (length: number) => T)(rows * columns);
  // In tiles, so that the far apart side stays in the cache.
  for (let tile = 0; tile < columns; tile += 64) {
    const end = Math.min(columns, tile + 64);
    for (let r = 0; r < rows; r++)
      for (let c = tile; c < end; c++) result[c * rows + r] = matrix[r * stride + c]!;
  }
  return result;
}

/** The format leaves the zero points of symmetric matrices out. */
function checkSymmetric(job: ExportJob, module: QuantizedModule): void {
  const { bits } = module.q;
  const groups = job.checkpoint.info(`${module.name}.qzeros`).shape[0]!;
  const zeros = unpackZeros({ words: job.zeros(module), groups, out: module.out, bits });
  const odd = zeros.findIndex((z) => z !== 2 ** (bits - 1));
  if (odd >= 0)
    throw new EacMoeError(
      'INVALID_CHECKPOINT',
      `${job.checkpoint.dir}: '${module.name}' is symmetric by config.json, but '${module.name}.qzeros' holds zero point ${zeros[odd]}, not ${2 ** (bits - 1)}`,
    );
}
