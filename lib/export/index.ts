/** Handing a quantized checkpoint to other programs. */
import { describe } from '../architecture';
import { checkTensors } from '../architecture/tensors';
import { quantizationOf } from '../checkpoint/quantized';
import { Checkpoint } from '../checkpoint/source';
import { EacMoeError } from '../errors';
import { localModel } from '../hub';
import { compressedTensorsContent } from './compressed_tensors';
import { writeDirectory } from './directory';
import { gptqContent } from './gptq';
import { exportGguf } from './gguf';
import { ExportJob } from './job';
import type { ExportedType, ExportFormat, ExportOptions, ExportReport } from './options';

export type { ExportedType, ExportFormat, ExportOptions, ExportReport } from './options';

const FORMATS: readonly ExportFormat[] = ['gptq', 'compressed-tensors', 'gguf'];

function checkOptions(options: ExportOptions): void {
  const invalid = (what: string): never => {
    throw new EacMoeError('INVALID_ARGUMENT', what);
  };
  const { format, output, gptqVersion, consumer, maxLoss } = options;
  if (!FORMATS.includes(format))
    invalid(`format must be one of ${FORMATS.join(', ')}; found ${String(format)}`);
  if (typeof output !== 'string' || output === '') invalid('output must be the directory or file to write');
  if (gptqVersion !== undefined && ![1, 2].includes(gptqVersion))
    invalid(`gptqVersion must be 1 or 2; found ${gptqVersion}`);
  if (consumer !== undefined && !['vllm', 'any'].includes(consumer))
    invalid(`consumer must be vllm or any; found ${consumer}`);
  if (maxLoss !== undefined && !(maxLoss >= 0 && maxLoss < 1))
    invalid(`maxLoss must be at least 0 and below 1; found ${maxLoss}`);
  const belongs: [keyof ExportOptions, ExportFormat][] = [
    ['gptqVersion', 'gptq'],
    ['consumer', 'compressed-tensors'],
    ['maxLoss', 'gguf'],
  ];
  for (const [key, of] of belongs)
    if (options[key] !== undefined && format !== of)
      invalid(`${key} applies to format ${of} only, not to ${format}`);
}

/**
 * Writes the quantized checkpoint `path`, a directory or `hf:<owner>/<name>[@revision]`, in a format of other programs: GPTQ (GPTQModel,
 * transformers, vLLM, SGLang),
 * compressed-tensors (vLLM, SGLang) or GGUF (llama.cpp). One tensor, for gguf one expert, is in memory at a time. The output appears under
 * its name when it is whole; a process killed before leaves a hidden file or directory '.<name>.tmp-...' beside it.
 *
 * gguf also takes a checkpoint that is not quantized.
 *
 * @throws EacMoeError: INVALID_ARGUMENT, FILE_NOT_FOUND, INVALID_CHECKPOINT and INVALID_TENSOR for the source, UNSUPPORTED_MODEL for what
 * the format or its readers cannot hold, TOKENIZER (gguf), OUTPUT for the output or a full disk, ABORTED
 */
export async function exportCheckpoint(path: string, options: ExportOptions): Promise<ExportReport> {
  const begun = performance.now();
  checkOptions(options);
  const { format, output } = options;
  const checkpoint = Checkpoint.open(await localModel(path, options));
  try {
    const quantization = quantizationOf(checkpoint.config);
    const architecture = describe(checkpoint.config);
    checkTensors(architecture, checkpoint);
    if (!quantization && format !== 'gguf') {
      throw new EacMoeError(
        'UNSUPPORTED_MODEL',
        `${path}: is not quantized; quantize it first, then export that`,
      );
    }
    const job = new ExportJob(checkpoint, architecture, quantization, options);
    const { bytes, types, notes } = format === 'gguf' ? await exportGguf(job) : await exportDirectory(job);
    options.onProgress?.({ fraction: 1, message: 'done' });
    return { format, output, bytes, types, notes, seconds: (performance.now() - begun) / 1000 };
  } finally {
    checkpoint.dispose();
  }
}

async function exportDirectory(job: ExportJob): Promise<Pick<ExportReport, 'bytes' | 'types' | 'notes'>> {
  const { format, output, gptqVersion = 2, consumer = 'vllm' } = job.options;
  const content = format === 'gptq' ? gptqContent(job, gptqVersion) : compressedTensorsContent(job, consumer);
  const bytes = await writeDirectory(output, job.checkpoint, content);
  return { bytes, types: storedTypes(job), notes: [] };
}

/** Matrices by their bits; what is written has the values of what was read. */
function storedTypes({ modules, checkpoint }: ExportJob): ExportedType[] {
  const types = new Map<string, ExportedType>();
  const add = (type: string, tensors: number, parameters: number, bytes: number): void => {
    const t = types.get(type) ?? { type, tensors: 0, parameters: 0, bytes: 0, loss: 0, maxLoss: 0 };
    types.set(type, {
      ...t,
      tensors: t.tensors + tensors,
      parameters: t.parameters + parameters,
      bytes: t.bytes + bytes,
    });
  };
  for (const { q, out, in: inputs } of modules.values()) add(`${q.bits} bit`, 1, out * inputs, 0);
  for (const name of checkpoint.names()) {
    const { dtype, bytes, shape } = checkpoint.info(name);
    const part = /\.(qweight|qzeros|scales|g_idx)$/.exec(name);
    const module = part && modules.get(name.slice(0, part.index));
    if (module) add(`${module.q.bits} bit`, 0, 0, part[1] === 'g_idx' ? 0 : bytes);
    else
      add(
        dtype,
        1,
        shape.reduce((a, b) => a * b, 1),
        bytes,
      );
  }
  return [...types.values()].sort((a, b) => b.bytes - a.bytes);
}
