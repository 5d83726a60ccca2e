/** `eac-moe quantize`: compresses a checkpoint with QESC. */
import type { Command } from 'commander';
import {
  EacMoeError,
  quantizeCheckpoint,
  type CalibrationSource,
  type QuantizeOptions,
  type QuantizeReport,
} from '../index';
import {
  megabytes,
  MODEL,
  newCommand,
  number,
  oneOf,
  percent,
  perform,
  positiveInteger,
  positiveNumber,
  printFields,
  wholeNumber,
  withDevice,
  type CommonOptions,
  type Context,
} from './command';
import { readTexts } from './files';

interface Options extends CommonOptions {
  output: string;
  bits: 2 | 2.5 | 3 | 4;
  groupSize: number;
  attentionBits: 2 | 3 | 4 | 16;
  sharedBits?: 2 | 3 | 4 | 16 | 'experts';
  method: 'gptq' | 'rtn';
  calibration?: string[];
  samples: number;
  seqLen?: number;
  router: 'topk-mse' | 'mse' | 'none';
  routerK?: number;
  ridge?: number;
  damping?: number;
  actOrder: boolean;
  twoStream: boolean;
  symmetric?: boolean;
  clipSearch?: boolean;
  resume: boolean;
  seed: number;
  threads?: number;
  device: 'auto' | 'cpu' | 'cuda';
}

const groupSize = number(
  'a positive multiple of 32, e.g. 32, 64 or 128',
  (n) => Number.isSafeInteger(n) && n > 0 && n % 32 === 0,
);
const collect = (file: string, files: string[] = []) => [...files, file];

export function quantizeCommand(): Command {
  const command = newCommand('quantize', 'compress a model with QESC')
    .argument('<model>', `${MODEL}; full precision`)
    .requiredOption('-o, --output <dir>', 'directory to write')
    .option(
      '--bits <bits>',
      'of the experts: 2, 2.5 (first half of the layers 3, the rest 2), 3 or 4',
      oneOf(2, 2.5, 3, 4),
      3,
    )
    .option('--group-size <n>', 'input channels that share a scale; a multiple of 32', groupSize, 128)
    .option('--attention-bits <bits>', '2, 3, 4 or 16', oneOf(2, 3, 4, 16), 4)
    .option(
      '--shared-bits <bits>',
      "of shared experts and dense layers: 2, 3, 4, 16 or 'experts' (default: as attention)",
      oneOf(2, 3, 4, 16, 'experts'),
    )
    .option(
      '--method <method>',
      'gptq, or rtn (round to nearest; with --router none it needs no calibration)',
      oneOf('gptq', 'rtn'),
      'gptq',
    )
    .option(
      '--calibration <file>',
      "plain text or a JSON list of texts, may be repeated; or 'self': sampled from the model (default: self)",
      collect,
    )
    .option('--samples <n>', 'calibration sequences', positiveInteger, 128)
    .option(
      '--seq-len <n>',
      'tokens of each (default: 2048, at most what the model was made for)',
      positiveInteger,
    )
    .option(
      '--router <loss>',
      'router calibration: topk-mse, mse or none',
      oneOf('topk-mse', 'mse', 'none'),
      'topk-mse',
    )
    .option(
      '--router-k <k>',
      'logits of each token that topk-mse counts (default: by the number of experts)',
      positiveInteger,
    )
    .option(
      '--ridge <r>',
      "pull towards the original router, relative to the inputs' mean energy",
      positiveNumber,
    )
    .option('--damping <d>', "added to the Hessian's diagonal, relative to its mean", positiveNumber)
    .option('--no-act-order', 'GPTQ in the order of the channels as stored')
    .option('--no-two-stream', 'fit each matrix to its own output on the quantized stream only')
    .option('--symmetric', 'fixed zero points')
    .option('--clip-search', 'search smaller ranges for each group')
    .option('--no-resume', 'do not continue an unfinished run in the output directory')
    .option('--seed <n>', 'for sampling', wholeNumber, 0);
  return withDevice(command).action((path: string, options: Options) =>
    perform(
      options,
      (context) => quantize(path, options, context),
      (report) => print(options.output, report),
    ),
  );
}

async function calibrationOf(files: string[] | undefined): Promise<CalibrationSource> {
  if (!files || (files.length === 1 && files[0] === 'self')) return 'self';
  if (files.includes('self')) {
    throw new EacMoeError('INVALID_ARGUMENT', "--calibration: 'self' cannot be combined with files");
  }
  return (await Promise.all(files.map(readTexts))).flat();
}

async function quantize(path: string, o: Options, { signal, onProgress }: Context): Promise<QuantizeReport> {
  if (o.routerK !== undefined && o.router !== 'topk-mse') {
    throw new EacMoeError(
      'INVALID_ARGUMENT',
      `--router-k applies to --router topk-mse only, not to ${o.router}`,
    );
  }
  const options: QuantizeOptions = {
    output: o.output,
    bits: o.bits,
    groupSize: o.groupSize,
    attentionBits: o.attentionBits,
    sharedBits: o.sharedBits,
    method: o.method,
    calibration: await calibrationOf(o.calibration),
    samples: o.samples,
    seqLen: o.seqLen,
    router: o.router === 'none' ? false : { loss: o.router, k: o.routerK, ridge: o.ridge },
    damping: o.damping,
    actOrder: o.actOrder,
    twoStreamTargets: o.twoStream,
    symmetric: o.symmetric,
    clipSearch: o.clipSearch,
    resume: o.resume,
    seed: o.seed,
    threads: o.threads,
    device: o.device,
    onProgress,
    signal,
  };
  return quantizeCheckpoint(path, options);
}

function print(output: string, report: QuantizeReport): void {
  const { bytes, averageBits, averageBitsWithOverhead, calibration, seconds } = report;
  const routers = report.layers.flatMap(({ router }) => (router ? [router] : []));
  const mean = (of: (r: (typeof routers)[number]) => number) =>
    routers.reduce((sum, r) => sum + of(r), 0) / routers.length;
  const fields: [string, string][] = [
    ['written', output],
    ['size', megabytes(bytes)],
    [
      'average bits',
      `${averageBits.toFixed(2)}, ${averageBitsWithOverhead.toFixed(2)} with scales and zero points`,
    ],
  ];
  if (calibration.tokens > 0) {
    fields.push(['calibration', `${calibration.tokens} tokens in ${calibration.sequences} sequences`]);
  }
  if (routers.length > 0) {
    const before = percent(mean((r) => r.shiftBefore.changedAny));
    const after = percent(mean((r) => r.shiftAfter.changedAny));
    fields.push(['expert shift', `${before} of the tokens before calibrating the routers, ${after} after`]);
  }
  printFields([...fields, ['time', `${seconds.toFixed(1)} s`]]);
}
