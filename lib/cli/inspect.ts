/** `eac-moe inspect`: what a model is. */
import type { Command } from 'commander';
import { inspectModel, type ModelInfo } from '../index';
import { megabytes, MODEL, newCommand, perform, printFields, type CommonOptions } from './command';

export function inspectCommand(): Command {
  return newCommand(
    'inspect',
    'what a model is: family, layers, experts, parameters, sizes at each bit width',
  )
    .argument('<model>', MODEL)
    .action((path: string, options: CommonOptions) =>
      perform(options, ({ onProgress, signal }) => inspectModel(path, { onProgress, signal }), print),
    );
}

const millions = (n: number) => (n >= 1e9 ? `${(n / 1e9).toFixed(2)} B` : `${(n / 1e6).toFixed(2)} M`);

function print(info: ModelInfo): void {
  const dense = info.layers - info.moeLayers;
  const fields: [string, string][] = [
    ['family', info.family],
    ['layers', `${info.layers}${dense > 0 ? ` (${dense} of them dense)` : ''}`],
    ['experts', `${info.experts}, ${info.topK} a token${info.sharedExperts ? ', and shared ones' : ''}`],
    ['hidden size', String(info.hiddenSize)],
    ['vocabulary', String(info.vocabSize)],
    ['positions', String(info.maxPositions)],
    ['parameters', `${millions(info.parameters)}, ${millions(info.activeParameters)} active`],
    ['dtype', info.dtype],
    ['size', megabytes(info.bytes)],
  ];
  if (info.quantization) {
    const { averageBits, averageBitsWithOverhead, matrices } = info.quantization;
    const counts = Object.entries(matrices).map(([bits, n]) => `${n} at ${bits} bit`);
    const average = `${averageBits.toFixed(2)} bits a weight, ${averageBitsWithOverhead.toFixed(2)} with scales and zero points`;
    fields.push(['quantized', `${average}; matrices: ${counts.join(', ')}`]);
  }
  printFields(fields);
  process.stdout.write('\nbits  average  with scales  size\n');
  for (const { bits, averageBits, averageBitsWithOverhead, bytes } of info.sizes) {
    const columns = [
      String(bits).padEnd(4),
      averageBits.toFixed(2).padStart(7),
      averageBitsWithOverhead.toFixed(2).padStart(11),
    ];
    process.stdout.write(`${columns.join('  ')}  ${megabytes(bytes)}\n`);
  }
}
