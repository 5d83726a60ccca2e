/**
 * `npm run demo`: the library's whole job on the bundled model, in a few minutes on two cores and without a data set. Compresses the model
 * with plain GPTQ and with QESC, compares each with the original on three texts, prunes with PESF, and generates text.
 *
 * Works in a temporary directory; `npm run demo -- --keep DIR` leaves the checkpoints in DIR.
 */
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import {
  calibrationSequences,
  evaluate,
  MoeModel,
  pruneExperts,
  pruneReport,
  quantizeMoE,
  type Evaluation,
  type QuantizeOptions,
} from '../lib';

const SOURCE = join(__dirname, '..', 'models', 'trio-moe-9m');
const TEXTS = ['prose', 'math', 'code'] as const;
const WIDTHS = [2, 2.5, 3] as const;
const CALIBRATION = { samples: 128, seqLen: 256 };
/** Tokens of an evaluated sequence. */
const WINDOW = 256;
const PROMPT =
  'Question: A shop sells 12 red kites and twice as many blue kites. Each kite costs $5. How much money does the shop make?\nAnswer:';

/** GPTQ as published, with EAC-MoE's bits and nothing of QESC. */
const GPTQ: Partial<QuantizeOptions> = {
  router: false,
  actOrder: false,
  twoStreamTargets: false,
  routingWeightPower: 0,
};
const METHODS: [name: string, options: Partial<QuantizeOptions>][] = [
  ['GPTQ', GPTQ],
  ['QESC', {}],
];

/** A model under one setting, measured. */
interface Row {
  bits: number;
  method: string;
  texts: Evaluation[];
  tokensPerSecond: number;
}

interface Context {
  dir: string;
  original: MoeModel;
  /** Token ids of the three texts. */
  texts: number[][];
  signal: AbortSignal;
}

function say(text: string): void {
  process.stderr.write(`${text}\n`);
}

async function measure(context: Context, bits: number, method: string, model: MoeModel): Promise<Row> {
  const { original, texts, signal } = context;
  const row: Row = { bits, method, texts: [], tokensPerSecond: await prefillSpeed(model, texts[0]!) };
  for (const perplexity of texts) {
    row.texts.push(await evaluate(model, { perplexity, seqLen: WINDOW, reference: original, signal }));
  }
  return row;
}

/** Tokens a second through all layers, the best of several passes: other programs only ever slow it down. */
async function prefillSpeed(model: MoeModel, text: number[]): Promise<number> {
  const ids = text.slice(0, 2 * WINDOW);
  let best = Infinity;
  for (let pass = 0; pass < 5; pass++) {
    const begun = performance.now();
    await model.forward(ids, { logits: 'last' });
    best = Math.min(best, performance.now() - begun);
  }
  return (1000 * ids.length) / best;
}

/** The same model under PESF. */
async function measurePruned(
  context: Context,
  bits: number,
  method: string,
  model: MoeModel,
): Promise<Row[]> {
  const rows: Row[] = [];
  for (const alpha of [0.3, 0.7]) {
    using pruned = pruneExperts(model, { alpha });
    rows.push(await measure(context, bits, `${method} + PESF ${alpha}`, pruned));
  }
  return rows;
}

async function compress(context: Context): Promise<Row[]> {
  const { dir, original, signal } = context;
  say(`sampling ${CALIBRATION.samples} calibration sequences of ${CALIBRATION.seqLen} tokens from the model`);
  const calibration = await calibrationSequences(original, {
    source: 'self',
    seed: 0,
    ...CALIBRATION,
    signal,
  });
  const rows: Row[] = [];
  for (const bits of WIDTHS) {
    for (const [method, options] of METHODS) {
      const output = join(dir, `${method.toLowerCase()}-${bits}bit`);
      const job = { output, bits, calibration, ...CALIBRATION, ...options, signal };
      const { model, report } = await quantizeMoE(SOURCE, job);
      say(`${method} ${bits} bit: compressed in ${report.seconds.toFixed(1)} s`);
      rows.push(await measure(context, bits, method, model));
      if (method === 'QESC' && bits === 3) rows.push(...(await measurePruned(context, bits, method, model)));
      model.dispose();
    }
  }
  return rows;
}

const mean = (values: number[]) => values.reduce((a, b) => a + b, 0) / values.length;
const percent = (share: number) => `${(100 * share).toFixed(1)} %`;

const COLUMNS: [title: string, value: (row: Row) => string][] = [
  ['bits', ({ bits }) => String(bits)],
  ['method', ({ method }) => method],
  ['MB', ({ texts }) => (texts[0]!.bytes / 1e6).toFixed(2)],
  ...TEXTS.map((name, i): (typeof COLUMNS)[number] => [
    `ppl ${name}`,
    ({ texts }) => texts[i]!.perplexity!.toFixed(2),
  ]),
  ['KL', ({ texts }) => mean(texts.map((t) => t.kl!)).toFixed(4)],
  ['expert shift', ({ texts }) => percent(mean(texts.map((t) => t.expertShift!.changedAny)))],
  [
    'pruned experts / pairs',
    ({ texts }) =>
      texts[0]!.prunedExperts === undefined
        ? '-'
        : `${percent(mean(texts.map((t) => t.prunedExperts!)))} / ${percent(mean(texts.map((t) => t.prunedPairs!)))}`,
  ],
  ['tokens/s', ({ tokensPerSecond }) => tokensPerSecond.toFixed(0)],
];

/** Aligned columns: `method` to the left, numbers to the right. */
function table(rows: Row[]): string {
  const cells = [
    COLUMNS.map(([title]) => title),
    ...rows.map((row) => COLUMNS.map(([, value]) => value(row))),
  ];
  const widths = COLUMNS.map((_, c) => Math.max(...cells.map((line) => line[c]!.length)));
  const align = (text: string, c: number) =>
    COLUMNS[c]![0] === 'method' ? text.padEnd(widths[c]!) : text.padStart(widths[c]!);
  const lines = cells.map((line) => line.map(align).join('  '));
  return [lines[0], widths.map((w) => '-'.repeat(w)).join('  '), ...lines.slice(1)].join('\n');
}

/** Continues a prompt with and without PESF, and says what it skipped. */
async function generateBoth(name: string, model: MoeModel, signal: AbortSignal): Promise<void> {
  using pruned = pruneExperts(model, { alpha: 0.3 });
  for (const [label, m] of [
    [name, model],
    [`${name} + PESF 0.3`, pruned],
  ] as const) {
    let text = '';
    for await (const piece of m.generate(PROMPT, {
      maxNewTokens: 96,
      temperature: 0.7,
      seed: 1,
      stop: '\n\n',
      signal,
    }))
      text += piece;
    console.log(`\n[${label}]${text.trimEnd()}`);
  }
  const { experts, pairs } = pruneReport(pruned);
  console.log(
    `(PESF left out ${percent(experts)} of the experts, ${percent(pairs)} of the token-expert pairs of the prompt)`,
  );
}

async function demo(dir: string, signal: AbortSignal): Promise<void> {
  using original = await MoeModel.load(SOURCE);
  const texts = await Promise.all(
    TEXTS.map(async (name) =>
      original.tokenizer.encodeAsync(await readFile(join(__dirname, 'data', `${name}.txt`), 'utf8')),
    ),
  );
  const context: Context = { dir, original, texts, signal };
  const rows = [
    await measure(context, 16, 'full precision', original),
    ...(await measurePruned(context, 16, 'full precision', original)),
    ...(await compress(context)),
  ];
  console.log(`\n${table(rows)}\n`);
  console.log(
    'ppl: perplexity; KL: nats a token from full precision; expert shift: share of (token, layer) with another set of',
  );
  console.log(
    'experts than full precision chooses; pruned: share of (sequence, layer, expert) / of token-expert pairs left out.',
  );

  console.log(`\n${PROMPT}`);
  await generateBoth('full precision', original, signal);
  using small = await MoeModel.load(join(dir, 'qesc-3bit'));
  await generateBoth('QESC 3 bit', small, signal);
}

async function main(): Promise<void> {
  const { keep } = parseArgs({ options: { keep: { type: 'string' } } }).values;
  const controller = new AbortController();
  process.once('SIGINT', () => controller.abort());
  const begun = performance.now();
  const dir = keep ?? (await mkdtemp(join(tmpdir(), 'eac-moe-demo-')));
  try {
    await demo(dir, controller.signal);
    say(
      `\ndone in ${((performance.now() - begun) / 1000).toFixed(0)} s${keep ? `; checkpoints in ${dir}` : ''}`,
    );
  } finally {
    if (!keep) await rm(dir, { recursive: true, force: true });
  }
}

main().catch((error: unknown) => {
  say(`demo: ${error instanceof Error ? error.message : String(error)}`);
  process.exitCode = 1;
});
