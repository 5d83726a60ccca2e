/**
 * The exports of the bundled model, read by others, beside our own: perplexity of the GPTQ export through PyTorch and transformers, and of
 * the GGUF export through llama.cpp (node-llama-cpp), on the texts in scripts/data, at 4, 3 and 2 bit.
 *
 *   npm run check:export -- [--json]
 *
 * PyTorch: EAC_MOE_PYTHON=/path/to/python, with torch, transformers and safetensors; without it that column is empty.
 */
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { table } from '../lib/bench/report';
import { exportCheckpoint, MoeModel, quantizeCheckpoint, type ExportReport } from '../lib';
import { PeerUnavailable, Side } from './peers/side';
import { pythonWithTorch, torchNll } from './export/torch';

const MODEL = join(__dirname, '../models/trio-moe-9m');
const DATA = join(__dirname, 'data');
const WINDOW = 512;
/** Relative root mean square error that lets gguf take smaller types, as in `--max-loss`. */
const LOSSES = [0, 0.02];

interface Row {
  bits: number;
  ours: number;
  /** With activations rounded to int8, as llama.cpp rounds them. */
  oursInt8: number;
  torch?: number;
  gguf: { maxLoss: number; ppl?: number; bytes: number; types: ExportReport['types'] }[];
}

/** Token ids of all texts in whole windows; each text begins one. */
function windowsOf(model: MoeModel): number[][] {
  const texts = readdirSync(DATA).filter((name) => name.endsWith('.txt'));
  return texts.flatMap((name) => {
    const ids = model.tokenizer.encode(readFileSync(join(DATA, name), 'utf8'));
    return Array.from({ length: Math.floor(ids.length / WINDOW) }, (_, i) =>
      ids.slice(i * WINDOW, (i + 1) * WINDOW),
    );
  });
}

const perplexity = (nll: number[]): number => Math.exp(nll.reduce((a, b) => a + b, 0) / nll.length);

/** Nats of each id after the ones before it. */
function nllOf(logits: Float32Array, ids: number[]): number[] {
  const vocabulary = logits.length / ids.length;
  return ids.slice(1).map((id, i) => {
    const row = logits.subarray(i * vocabulary, (i + 1) * vocabulary);
    const top = row.reduce((a, b) => Math.max(a, b));
    return top + Math.log(row.reduce((sum, x) => sum + Math.exp(x - top), 0)) - row[id]!;
  });
}

async function ours(path: string, windows: number[][], activations: 'float32' | 'int8'): Promise<number> {
  const model = await MoeModel.load(path, { activations });
  try {
    const nll: number[] = [];
    for (const ids of windows) nll.push(...nllOf((await model.forward(ids)).logits, ids));
    return perplexity(nll);
  } finally {
    model.dispose();
  }
}

async function throughLlama(
  peer: Side | undefined,
  path: string,
  windows: number[][],
): Promise<number | undefined> {
  if (!peer) return undefined;
  await peer.load({ path });
  const nll: number[] = [];
  for (const ids of windows) nll.push(...(await peer.nll(0, ids)));
  await peer.unload();
  return perplexity(nll);
}

async function check(
  bits: 2 | 3 | 4,
  dir: string,
  python: string | undefined,
  peer: Side | undefined,
): Promise<Row> {
  const at = (name: string) => join(dir, `${name}-${bits}`);
  await quantizeCheckpoint(MODEL, { output: at('ours'), bits, samples: 32, seqLen: WINDOW });
  await exportCheckpoint(at('ours'), { format: 'gptq', output: at('gptq') });
  const model = await MoeModel.load(at('ours'));
  const windows = windowsOf(model);
  model.dispose();
  const row: Row = {
    bits,
    ours: await ours(at('ours'), windows, 'float32'),
    oursInt8: await ours(at('ours'), windows, 'int8'),
    gguf: [],
  };
  if (python) row.torch = perplexity((await torchNll(python, at('gptq'), windows)).nll);
  for (const maxLoss of LOSSES) {
    const output = `${at('gguf')}-${maxLoss}.gguf`;
    const { bytes, types } = await exportCheckpoint(at('ours'), { format: 'gguf', output, maxLoss });
    row.gguf.push({ maxLoss, ppl: await throughLlama(peer, output, windows), bytes, types });
  }
  return row;
}

async function startPeer(): Promise<Side | undefined> {
  try {
    return await Side.start('peer', { threads: 2 });
  } catch (error) {
    if (!(error instanceof PeerUnavailable)) throw error;
    process.stderr.write(`no node-llama-cpp: ${error.message}\n`);
    return undefined;
  }
}

function print(rows: Row[]): void {
  const number = (x: number | undefined) => (x === undefined ? '-' : x.toFixed(4));
  const cells = rows.flatMap(({ bits, ours: exact, oursInt8, torch, gguf }) =>
    gguf.map(({ maxLoss, ppl, bytes, types }) => [
      `${bits}`,
      number(exact),
      number(oursInt8),
      number(torch),
      `${maxLoss}`,
      number(ppl),
      (bytes / 1e6).toFixed(2),
      types.map((t) => (t.loss > 0 ? `${t.type} (${t.loss.toExponential(1)})` : t.type)).join(', '),
    ]),
  );
  const head = [
    'bits',
    'ours',
    'ours int8',
    'gptq, torch',
    'max loss',
    'gguf, llama.cpp',
    'MB',
    'types (loss)',
  ];
  process.stdout.write(table([head, ...cells]));
}

async function main(): Promise<void> {
  const python = pythonWithTorch();
  if (!python) process.stderr.write('no Python with torch and transformers: set EAC_MOE_PYTHON\n');
  const dir = mkdtempSync(join(tmpdir(), 'eac-moe-export-'));
  const peer = await startPeer();
  try {
    const rows: Row[] = [];
    for (const bits of [4, 3, 2] as const) rows.push(await check(bits, dir, python, peer));
    if (process.argv.includes('--json')) process.stdout.write(`${JSON.stringify(rows, null, 2)}\n`);
    else print(rows);
  } finally {
    await peer?.stop();
    rmSync(dir, { recursive: true, force: true });
  }
}

void main();
