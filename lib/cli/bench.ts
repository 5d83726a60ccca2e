/** `eac-moe bench`: the kernels' speed, and what the machine's limits allow. */
import { InvalidArgumentError, Option, type Command } from 'commander';
import { runBench, type BenchOptions, type BenchReport } from '../bench';
import { KERNELS } from '../bench/kernels';
import { bundledSource } from '../bench/loads';
import { markdownReport } from '../bench/markdown';
import { textReport } from '../bench/report';
import { SHAPES } from '../bench/shapes';
import {
  newCommand,
  number,
  oneOf,
  perform,
  positiveInteger,
  positiveNumber,
  wholeNumber,
  type CommonOptions,
  type Context,
} from './command';

interface Options extends CommonOptions {
  shape?: string[];
  kernel?: string[];
  tokens: number[];
  bits: number[];
  groupSize: number;
  threads: BenchOptions['threads'];
  activations: BenchOptions['activations'];
  seconds: number;
  cycle?: number;
  pesf?: boolean;
  markdown?: boolean;
  model?: string;
  text?: string[];
  seed: number;
}

const groupSize = number('a positive multiple of 32', (n) => n > 0 && n % 32 === 0);

export function benchCommand(): Command {
  const names = SHAPES.map(({ name }) => name);
  const kernels = Object.entries(KERNELS).map(([name, { about }]) => `  ${name.padEnd(18)} ${about}`);
  return newCommand('bench', 'time kernels, and compare with the limits of this machine')
    .option('--shape <shape...>', `${names.join(', ')} or H,I,E,K (default: these)`)
    .option('--kernel <name...>', "kernels as listed below, or 'all' (default: experts)")
    .addOption(listOption('--tokens <list>', 'tokens of a batch', positiveInteger, [1, 8, 32, 512]))
    .addOption(listOption('--bits <list>', 'widths of the weights', oneOf(2, 3, 4), [2, 3, 4]))
    .option('--group-size <n>', 'channels that share a scale', groupSize, 128)
    .addOption(listOption('--threads <list>', "numbers of threads, or 'all'", threads, [1, 'all']))
    .option('--activations <type>', 'int8 or float32', oneOf('int8', 'float32'), 'int8')
    .option('--seconds <s>', 'time for each case', positiveNumber, 1)
    .option('--pesf', 'the same as --kernel pesf')
    .option('--model <model>', 'of the expert loads of pesf (default: the bundled model)')
    .option('--text <file...>', 'texts that they are measured on (default: those of the repository)')
    .option(
      '--cycle <MiB>',
      'weights to go through before the first come again (default: 4 last-level caches)',
      positiveNumber,
    )
    .option('--markdown', 'print Markdown tables')
    .option('--seed <n>', 'seed of weights and routing', wholeNumber, 0)
    .addHelpText('after', `\nKernels:\n${kernels.join('\n')}`)
    .action((options: Options) =>
      perform(
        options,
        (context) => run(options, context),
        (report) => process.stdout.write(options.markdown ? markdownReport([report]) : textReport(report)),
      ),
    );
}

function run(o: Options, { signal, onProgress }: Context): Promise<BenchReport> {
  const asked = [...(o.kernel ?? []), ...(o.pesf ? ['pesf'] : [])];
  const { model, texts } = bundledSource();
  return runBench({
    ...o,
    shapes: o.shape ?? SHAPES.map(({ name }) => name),
    kernels: asked.includes('all') ? Object.keys(KERNELS) : asked.length > 0 ? asked : ['experts'],
    cycleBytes: o.cycle && o.cycle * 2 ** 20,
    loads: { model: o.model ?? model, texts: o.text ?? texts },
    onProgress,
    signal,
  });
}

function threads(text: string): number | 'all' {
  return text === 'all' ? 'all' : positiveInteger(text);
}

/** An option whose values are separated by commas. */
function listOption<T>(flags: string, about: string, parse: (text: string) => T, initial: T[]): Option {
  return new Option(flags, about).default(initial, initial.join(',')).argParser((text) => {
    const values = text.split(',').map((part) => parse(part.trim()));
    if (new Set(values).size < values.length) throw new InvalidArgumentError('Expected no value twice.');
    return values;
  });
}
