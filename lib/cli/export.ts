/** `eac-moe export`: a quantized checkpoint for other programs. */
import type { Command } from 'commander';
import { exportCheckpoint, type ExportFormat, type ExportReport } from '../index';
import {
  megabytes,
  MODEL,
  newCommand,
  number,
  oneOf,
  perform,
  printFields,
  type CommonOptions,
  type Context,
} from './command';

interface Options extends CommonOptions {
  format: ExportFormat;
  output: string;
  gptqVersion?: 1 | 2;
  consumer?: 'vllm' | 'any';
  maxLoss?: number;
}

const loss = number('a number from 0 to below 1', (n) => n >= 0 && n < 1);

export function exportCommand(): Command {
  return newCommand('export', 'hand a quantized model to other programs')
    .argument('<model>', `${MODEL}; quantized, for gguf any`)
    .requiredOption(
      '--format <format>',
      'gptq, compressed-tensors or gguf',
      oneOf('gptq', 'compressed-tensors', 'gguf'),
    )
    .requiredOption('-o, --output <path>', 'directory to write, or file for gguf')
    .option(
      '--gptq-version <n>',
      'gptq: 2 (checkpoint_format gptq_v2), or 1 for programs that read only that (default: 2)',
      oneOf(1, 2),
    )
    .option(
      '--consumer <name>',
      'compressed-tensors: vllm, which refuses what vLLM cannot load, or any (default: vllm)',
      oneOf('vllm', 'any'),
    )
    .option(
      '--max-loss <r>',
      'gguf: relative error of the weights that a smaller type may cost, e.g. 0.001 (default: 0)',
      loss,
    )
    .action((path: string, options: Options) =>
      perform(options, (context) => run(path, options, context), print),
    );
}

function run(
  path: string,
  { json: _, ...options }: Options,
  { signal, onProgress }: Context,
): Promise<ExportReport> {
  return exportCheckpoint(path, { ...options, onProgress, signal });
}

function print({ output, bytes, types, notes, seconds }: ExportReport): void {
  printFields([
    ['written', output],
    ['size', megabytes(bytes)],
    ['time', `${seconds.toFixed(1)} s`],
  ]);
  const rows = types.map(({ type, tensors, bytes: size, loss: mean, maxLoss }) => [
    type,
    String(tensors),
    megabytes(size),
    mean === 0 ? 'exact' : scientific(mean),
    maxLoss === 0 ? '' : scientific(maxLoss),
  ]);
  const all = [['type', 'tensors', 'size', 'loss', 'largest of a tensor'], ...rows];
  const widths = all[0]!.map((_, i) => Math.max(...all.map((row) => row[i]!.length)));
  const lines = all.map((row) =>
    row
      .map((cell, i) => cell.padEnd(widths[i]!))
      .join('  ')
      .trimEnd(),
  );
  process.stdout.write(`\n${lines.join('\n')}\n`);
  if (types.some((t) => t.loss > 0))
    process.stdout.write("\nloss: root mean square error of the weights relative to the weights'\n");
  for (const note of notes) process.stdout.write(`\n${note}\n`);
}

const scientific = (x: number): string => x.toExponential(1);
