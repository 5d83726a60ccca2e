/**
 * The figures of docs/method.md: perplexity, KL and expert shift of each recipe on the bundled model, with real calibration and held-out
 * texts, beside those of an independent PyTorch implementation.
 *
 *   npm run reference -- [--data DIR] [--rows REGEX] [--draws N] [--windows N] [--json]
 *   npm run reference -- --pesf [--windows N]
 *
 * DIR (default ../shared/data) holds calibration/{prose,math,code}.json and heldout/{prose,math,code}.txt.
 * --draws N repeats plain GPTQ, the same with router calibration, and the default recipe over N draws of calibration sequences.
 * --pesf measures the full-precision model under PESF instead: each mode at four alphas.
 */
import { existsSync, readFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { Command } from 'commander';
import { evaluate, MoeModel, pruneExperts, quantizeMoE, type QuantizeOptions } from '../lib';
import { seededRandom } from '../lib/model/random';

const MODEL = resolve(__dirname, '../models/trio-moe-9m');
const DOMAINS = ['prose', 'math', 'code'] as const;
const SEQUENCES = { prose: 61, math: 21, code: 46 };
const SEQ_LEN = 512;

type Recipe = Partial<QuantizeOptions>;
const plain: Recipe = { router: false, actOrder: false, twoStreamTargets: false, routingWeightPower: 0 };
const router: Recipe = { router: { k: 8 } };

/** Name -> options; the first five are rows of the reference. */
const RECIPES: Record<string, Recipe> = {
  RTN: { ...plain, method: 'rtn' },
  GPTQ: plain,
  'QESC (exact, K=8)': { ...plain, ...router },
  'QESC + act-order': { ...plain, ...router, actOrder: true },
  'QESC + act-order + two-stream targets': { ...plain, ...router, actOrder: true, twoStreamTargets: true },
  'GPTQ + act-order + two-stream targets': { ...plain, actOrder: true, twoStreamTargets: true },
  'QESC + act-order + routing weights': { ...plain, ...router, actOrder: true, routingWeightPower: 1 },
  'default recipe': {},
};

/** `reference.md`: perplexity of prose, math, code; KL; shift of prose, math, code. */
const REFERENCE: Record<string, number[]> = {
  '2 RTN': [60.039, 24.608, 15.162, 0.0993, 0.263, 0.205, 0.232],
  '2 GPTQ': [58.07, 23.227, 14.73, 0.0533, 0.205, 0.141, 0.161],
  '2 QESC (exact, K=8)': [57.704, 23.19, 14.721, 0.0528, 0.186, 0.119, 0.137],
  '2 QESC + act-order': [57.38, 23.148, 14.659, 0.0455, 0.171, 0.111, 0.127],
  '2 QESC + act-order + two-stream targets': [57.79, 23.107, 14.445, 0.0417, 0.171, 0.102, 0.127],
  '2 GPTQ + act-order + two-stream targets': [57.663, 23.061, 14.487, 0.0423, 0.184, 0.119, 0.137],
  '2.5 GPTQ': [57.084, 22.989, 14.423, 0.0323, 0.119, 0.086, 0.096],
  '2.5 QESC (exact, K=8)': [57.149, 22.944, 14.346, 0.0312, 0.105, 0.07, 0.082],
  '2.5 QESC + act-order': [56.558, 22.929, 14.401, 0.0283, 0.109, 0.066, 0.077],
  '2.5 QESC + act-order + two-stream targets': [56.42, 22.838, 14.299, 0.0259, 0.103, 0.062, 0.074],
  '2.5 GPTQ + act-order + two-stream targets': [56.502, 22.95, 14.46, 0.0262, 0.105, 0.07, 0.08],
  '3 RTN': [56.249, 23.092, 14.293, 0.0234, 0.147, 0.115, 0.125],
  '3 GPTQ': [55.933, 22.775, 14.241, 0.0122, 0.109, 0.078, 0.086],
  '3 QESC (exact, K=8)': [55.905, 22.737, 14.226, 0.0119, 0.096, 0.063, 0.074],
  '3 QESC + act-order': [55.723, 22.707, 14.228, 0.0106, 0.1, 0.06, 0.07],
  '3 QESC + act-order + two-stream targets': [55.722, 22.608, 14.216, 0.0096, 0.089, 0.055, 0.066],
};

interface Scores {
  perplexity: number[];
  kl: number;
  shift: number[];
}

/** Windows of 512 tokens of each domain's calibration texts, an end-of-text token after each text; `draw` 0 takes the first ones. */
function sequences(model: MoeModel, data: string, draw: number): Int32Array[] {
  const random = seededRandom(draw);
  return DOMAINS.flatMap((domain) => {
    const texts = JSON.parse(readFileSync(join(data, 'calibration', `${domain}.json`), 'utf8')) as string[];
    const ids = texts.flatMap((text) => [...model.tokenizer.encode(text), model.tokenizer.eosIds[0]!]);
    const windows = Array.from({ length: Math.floor(ids.length / SEQ_LEN) }, (_, i) =>
      Int32Array.from(ids.slice(i * SEQ_LEN, (i + 1) * SEQ_LEN)),
    );
    if (draw > 0) windows.sort(() => random() - 0.5);
    return windows.slice(0, SEQUENCES[domain]);
  });
}

async function score(model: MoeModel, data: string, windows: number, reference?: MoeModel): Promise<Scores> {
  const result: Scores = { perplexity: [], kl: 0, shift: [] };
  for (const domain of DOMAINS) {
    const text = readFileSync(join(data, 'heldout', `${domain}.txt`), 'utf8');
    const e = await evaluate(model, {
      perplexity: text,
      seqLen: SEQ_LEN,
      maxTokens: windows * SEQ_LEN,
      reference,
    });
    result.perplexity.push(e.perplexity!);
    result.kl += (e.kl ?? 0) / DOMAINS.length;
    result.shift.push(e.expertShift?.changedAny ?? 0);
  }
  return result;
}

function line(bits: number, name: string, s: Scores, bytes: number, note = ''): string {
  const perplexity = s.perplexity.map((p) => p.toFixed(3)).join(' | ');
  const shift = s.shift.map((x) => x.toFixed(3)).join(' / ');
  return `| ${bits} | ${name} | ${(bytes / 1e6).toFixed(2)} MB | ${perplexity} | ${s.kl.toFixed(4)} | ${shift} |${note}`;
}

/** Ours over theirs: worst perplexity, KL, worst shift. */
function against(key: string, s: Scores): string {
  const r = REFERENCE[key];
  if (!r) return '';
  const worst = (ours: number[], theirs: number[]) => Math.max(...ours.map((v, i) => v / theirs[i]!));
  return ` ${[worst(s.perplexity, r.slice(0, 3)), s.kl / r[3]!, mean(s.shift) / mean(r.slice(4))].map(percent).join(', ')} |`;
}

const mean = (values: number[]): number => values.reduce((a, b) => a + b, 0) / values.length;
const percent = (ratio: number): string => `${ratio >= 1 ? '+' : ''}${(100 * (ratio - 1)).toFixed(2)} %`;

/** Perplexity (and that of the causal variant) against no pruning, KL, and what was skipped: means over the domains. */
async function pesfTable(full: MoeModel, data: string, windows: number): Promise<void> {
  console.log('| alpha | mode | perplexity | causal perplexity | KL | experts pruned | pairs skipped |');
  console.log('|---|---|---|---|---|---|---|');
  const texts = DOMAINS.map((d) => readFileSync(join(data, 'heldout', `${d}.txt`), 'utf8'));
  const measure = (model: MoeModel, reference?: MoeModel) =>
    Promise.all(
      texts.map((perplexity) =>
        evaluate(model, {
          perplexity,
          seqLen: SEQ_LEN,
          maxTokens: windows * SEQ_LEN,
          causal: reference !== undefined,
          reference,
        }),
      ),
    );
  const keepAll = pruneExperts(full, { alpha: 1e-9 });
  const base = await measure(keepAll, full);
  keepAll.dispose();
  for (const alpha of [0.1, 0.3, 0.5, 0.7]) {
    for (const mode of ['drop', 'renormalize', 'reselect'] as const) {
      const pruned = pruneExperts(full, { alpha, mode });
      const rows = await measure(pruned, full);
      pruned.dispose();
      const ratio = (of: (r: (typeof rows)[number]) => number) =>
        percent(Math.exp(mean(rows.map((r, i) => Math.log(of(r) / of(base[i]!))))));
      const share = (of: (r: (typeof rows)[number]) => number) =>
        `${(100 * mean(rows.map(of))).toFixed(1)} %`;
      console.log(
        `| ${alpha} | ${mode} | ${ratio((r) => r.perplexity!)} | ${ratio((r) => r.causal!.perplexity)} | ` +
          `${mean(rows.map((r) => r.kl!)).toFixed(4)} | ${share((r) => r.prunedExperts!)} | ${share((r) => r.prunedPairs!)} |`,
      );
    }
  }
}

async function main(): Promise<void> {
  const program = new Command('reference')
    .option('--data <dir>', 'calibration and held-out texts', resolve(__dirname, '../../shared/data'))
    .option('--rows <regex>', 'only these rows, e.g. "^2 QESC"', '.')
    .option('--draws <n>', 'draws of calibration sequences', '0')
    .option('--windows <n>', 'held-out windows a domain', '64')
    .option('--pesf', 'PESF instead of quantization')
    .option('--json', 'one JSON line a row')
    .parse();
  const o = program.opts<{
    data: string;
    rows: string;
    draws: string;
    windows: string;
    pesf?: boolean;
    json?: boolean;
  }>();
  if (!existsSync(o.data)) throw new Error(`${o.data}: no such directory; name one with --data`);
  const full = await MoeModel.load(MODEL);
  if (o.pesf) return pesfTable(full, o.data, Number(o.windows));
  const dir = await mkdtemp(join(tmpdir(), 'eac-moe-reference-'));
  const measure = async (recipe: Recipe, bits: 2 | 2.5 | 3, calibration: Int32Array[]) => {
    const output = join(dir, 'model');
    const { model, report } = await quantizeMoE(MODEL, {
      ...recipe,
      bits,
      calibration,
      seqLen: SEQ_LEN,
      output,
    });
    const scores = await score(model, o.data, Number(o.windows), full);
    model.dispose();
    await rm(output, { recursive: true });
    return { scores, bytes: report.bytes };
  };
  const print = (row: Record<string, unknown>, text: string) =>
    console.log(o.json ? JSON.stringify(row) : text);
  try {
    print(
      {},
      '| bits | recipe | bytes | prose | math | code | KL | shift prose / math / code | worst perplexity, KL, mean shift against the reference |',
    );
    print({}, '|---|---|---|---|---|---|---|---|---|');
    if (new RegExp(o.rows).test('16 full precision')) {
      const scores = await score(full, o.data, Number(o.windows));
      print({ row: 'full precision', ...scores }, line(16, 'full precision', scores, 17_871_872));
    }
    const first = sequences(full, o.data, 0);
    for (const bits of [2, 2.5, 3] as const) {
      for (const [name, recipe] of Object.entries(RECIPES)) {
        if (!new RegExp(o.rows).test(`${bits} ${name}`)) continue;
        const { scores, bytes } = await measure(recipe, bits, first);
        print(
          { bits, row: name, bytes, ...scores },
          line(bits, name, scores, bytes, against(`${bits} ${name}`, scores)),
        );
      }
    }
    for (let draw = 1; draw <= Number(o.draws); draw++) {
      const calibration = sequences(full, o.data, draw);
      for (const bits of [2, 2.5, 3] as const) {
        for (const name of ['GPTQ', 'QESC (exact, K=8)', 'default recipe']) {
          if (!new RegExp(o.rows).test(`${bits} ${name}`)) continue;
          const { scores, bytes } = await measure(RECIPES[name]!, bits, calibration);
          print(
            { bits, row: name, draw, bytes, ...scores },
            line(bits, `${name}, draw ${draw}`, scores, bytes),
          );
        }
      }
    }
  } finally {
    full.dispose();
    await rm(dir, { recursive: true, force: true });
  }
}

main().catch((error: unknown) => {
  console.error(error instanceof Error ? error.message : error);
  process.exitCode = 1;
});
