/** `eac-moe eval`: perplexity, KL divergence, expert shift, multiple choice; with or without pruning. */
import type { Command } from 'commander';
import { EacMoeError, evaluate, MoeModel, pruneExperts, type Activations, type Evaluation } from '../index';
import {
  alpha,
  megabytes,
  MODEL,
  newCommand,
  number,
  oneOf,
  percent,
  perform,
  positiveInteger,
  printFields,
  withDevice,
  type CommonOptions,
  type Context,
} from './command';
import { readChoices, readText } from './files';

interface Options extends CommonOptions {
  text?: string;
  choices?: string;
  reference?: string;
  seqLen?: number;
  maxTokens?: number;
  prune?: number;
  causal?: boolean;
  activations: Activations;
  threads?: number;
  device: 'auto' | 'cpu' | 'cuda';
}

const seqLen = number('an integer of 2 or more', (n) => Number.isSafeInteger(n) && n >= 2);

export function evalCommand(): Command {
  const command = newCommand('eval', 'perplexity, KL divergence, expert shift, multiple choice')
    .argument('<model>', MODEL)
    .option('--text <file>', 'text for the perplexity')
    .option('--choices <file>', 'multiple-choice rows { context, choices, answer }, JSON lines')
    .option('--reference <model>', 'original model: KL divergence and expert shift on the text')
    .option('--seq-len <n>', 'tokens a window (default: 512, at most what the model was made for)', seqLen)
    .option('--max-tokens <n>', "use only the text's first tokens", positiveInteger)
    .option('--prune <alpha>', 'prune experts with PESF, alpha in (0, 1]', alpha)
    .option('--causal', "also the perplexity of each window's second half, pruned by the counts of the first")
    .option(
      '--activations <kind>',
      'how products with quantized weights treat their inputs: float32 (exact) or int8 (as generate does)',
      oneOf('float32', 'int8'),
      'float32',
    );
  return withDevice(command).action((path: string, options: Options) =>
    perform(options, (context) => run(path, options, context), print),
  );
}

async function run(path: string, o: Options, { signal, onProgress }: Context): Promise<Evaluation> {
  if (!o.text && !o.choices) {
    throw new EacMoeError('INVALID_ARGUMENT', 'nothing to evaluate: give --text, --choices, or both');
  }
  if (!o.text && (o.reference || o.causal)) {
    throw new EacMoeError('INVALID_ARGUMENT', `${o.reference ? '--reference' : '--causal'} needs --text`);
  }
  const text = o.text === undefined ? undefined : await readText(o.text);
  const choices = o.choices === undefined ? undefined : await readChoices(o.choices);
  const { device, threads } = o;
  using model = await MoeModel.load(path, { device, threads, onProgress, signal });
  using reference = o.reference ? await MoeModel.load(o.reference, { onProgress, signal }) : undefined;
  using pruned = o.prune === undefined ? undefined : pruneExperts(model, { alpha: o.prune });
  return await evaluate(pruned ?? model, {
    perplexity: text,
    choices,
    reference,
    causal: o.causal,
    seqLen: o.seqLen,
    maxTokens: o.maxTokens,
    activations: o.activations,
    onProgress,
    signal,
  });
}

function print(result: Evaluation): void {
  const fields: [string, string][] = [['size', megabytes(result.bytes)]];
  if (result.perplexity !== undefined) {
    fields.push([
      'perplexity',
      `${result.perplexity.toFixed(3)} (${result.tokens} tokens, ${result.windows} windows)`,
    ]);
  }
  if (result.kl !== undefined) fields.push(['KL divergence', `${result.kl.toFixed(5)} nats a token`]);
  if (result.expertShift) {
    const { changedAny, changedHalf, changedAll } = result.expertShift;
    const rates = `${percent(changedAny)} any, ${percent(changedHalf)} half, ${percent(changedAll)} all`;
    fields.push(['expert shift', `${rates} of the chosen experts changed`]);
  }
  if (result.prunedExperts !== undefined) {
    const pairs = percent(result.prunedPairs!);
    fields.push([
      'pruned',
      `${percent(result.prunedExperts)} of the experts, ${pairs} of the token-expert pairs`,
    ]);
  }
  if (result.causal) {
    fields.push([
      'causal',
      `perplexity ${result.causal.perplexity.toFixed(3)} of the second halves, counts from the first`,
    ]);
  }
  if (result.choices) {
    const { accuracy, acc, n } = result.choices;
    fields.push(['choices', `accuracy ${percent(accuracy)} (a byte), ${percent(acc)} (plain), ${n} rows`]);
  }
  printFields(fields);
}
