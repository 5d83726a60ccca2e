/** `eac-moe generate`: continues a prompt; text on stdout, figures on stderr. */
import type { Command } from 'commander';
import {
  MoeModel,
  pruneExperts,
  pruneReport,
  type Activations,
  type GenerateResult,
  type PruneReport,
} from '../index';
import {
  alpha,
  MODEL,
  newCommand,
  number,
  oneOf,
  percent,
  perform,
  positiveInteger,
  wholeNumber,
  withDevice,
  type CommonOptions,
  type Context,
} from './command';

interface Options extends CommonOptions {
  prompt: string;
  maxNewTokens: number;
  prune?: number;
  temperature: number;
  topK: number;
  topP: number;
  seed: number;
  stop?: string[];
  chat?: boolean;
  activations: Activations;
  headBits: 4 | 16;
  threads?: number;
  device: 'auto' | 'cpu' | 'cuda';
}

interface Result extends GenerateResult {
  text: string;
  tokensPerSecond: number;
  pruning?: PruneReport;
}

const temperature = number('a number, 0 or more', (n) => n >= 0);
const probability = number('a number in (0, 1]', (n) => n > 0 && n <= 1);
const collect = (text: string, texts: string[] = []) => [...texts, text];

export function generateCommand(): Command {
  const command = newCommand('generate', 'continue a prompt')
    .argument('<model>', MODEL)
    .requiredOption('-p, --prompt <text>', 'what to continue')
    .option('-n, --max-new-tokens <n>', 'tokens to generate at most', positiveInteger, 64)
    .option('--prune <alpha>', 'prune experts with PESF during prefill, alpha in (0, 1]', alpha)
    .option('--temperature <t>', '0 always takes the likeliest token', temperature, 0)
    .option('--top-k <k>', 'sample among the k likeliest tokens; 0 = all', wholeNumber, 0)
    .option(
      '--top-p <p>',
      'sample among the likeliest tokens that together reach this probability',
      probability,
      1,
    )
    .option('--seed <n>', 'for sampling', wholeNumber, 0)
    .option('--stop <text>', 'end before this text; may be repeated', collect)
    .option('--chat', "put the prompt through the model's chat template")
    .option(
      '--activations <kind>',
      'how products with quantized weights treat their inputs: int8 (fast) or float32 (exact)',
      oneOf('int8', 'float32'),
      'int8',
    )
    .option('--head-bits <bits>', '4 rounds the output head while loading; 16 leaves it', oneOf(4, 16), 16);
  return withDevice(command).action((path: string, options: Options) =>
    perform(
      options,
      (context) => run(path, options, context),
      ({ text: _, ...result }) => printFigures(result),
    ),
  );
}

async function run(path: string, o: Options, { signal, progress, onProgress }: Context): Promise<Result> {
  const { device, threads, activations, headBits } = o;
  const load = { device, threads, activations, headBits, onProgress, signal };
  using loaded = await MoeModel.load(path, load);
  progress.end();
  using pruned = o.prune === undefined ? undefined : pruneExperts(loaded, { alpha: o.prune });
  const { maxNewTokens, temperature, topK, topP, seed, stop, chat } = o;
  const options = { maxNewTokens, temperature, topK, topP, seed, stop, chat, signal };
  const pieces = (pruned ?? loaded).generate(o.prompt, options);
  let text = '';
  let next = await pieces.next();
  for (; !next.done; next = await pieces.next()) {
    text += next.value;
    if (!o.json) process.stdout.write(next.value);
  }
  if (!o.json) process.stdout.write('\n');
  const result = next.value;
  const tokensPerSecond = result.decodeSeconds > 0 ? result.newTokens / result.decodeSeconds : 0;
  return { text, ...result, tokensPerSecond, ...(pruned && { pruning: pruneReport(pruned) }) };
}

function printFigures(r: Omit<Result, 'text'>): void {
  const parts = [
    `${r.promptTokens} prompt tokens in ${r.prefillSeconds.toFixed(2)} s`,
    `${r.newTokens} new tokens at ${r.tokensPerSecond.toFixed(1)} a second`,
    `ended by ${r.reason}`,
  ];
  if (r.pruning)
    parts.push(
      `pruned ${percent(r.pruning.experts)} of the experts, ${percent(r.pruning.pairs)} of the pairs`,
    );
  process.stderr.write(`${parts.join('; ')}\n`);
}
