/**
 * Ours against llama.cpp (node-llama-cpp) on random models of equal shape, in one run, taking turns:
 * the MoE layer (scripts/peers/layer.ts) and a whole model (scripts/peers/whole.ts).
 *
 *   npm run bench:peers -- [--part layer,model] [--shape mixtral] [--bits 4,3,2] [--tokens 1,8,32,512] [--rounds 5] [--json]
 *
 * Exit code 1 with a message when node-llama-cpp is missing or has no binary here.
 */
import { rmSync } from 'node:fs';
import { mkdtemp } from 'node:fs/promises';
import { availableParallelism, cpus, loadavg, tmpdir } from 'node:os';
import { join } from 'node:path';
import { Command, Option } from 'commander';
import { significant, table } from '../lib/bench/report';
import { parseShape, SHAPES, type LayerShape } from '../lib/bench/shapes';
import { measureLimits, setIsa, type MachineLimits } from '../lib/kernels';
import type { GgmlTypeName } from './peers/gguf';
import { compareLayer, type LayerRow } from './peers/layer';
import { PeerUnavailable, Side, type SideInfo, type SideOptions } from './peers/side';
import { copyBinaries, VARIANTS } from './peers/variants';
import { compareWhole, DECODE, PREFILL, type WholeRow } from './peers/whole';

interface Options {
  part: string;
  shape?: string[];
  bits: string;
  tokens: string;
  rounds: string;
  threads: string;
  activations: string;
  layers: string;
  isa?: string;
  head: GgmlTypeName;
  headBits: '4' | '16';
  json?: boolean;
}

const NOTES = {
  layer: `A layer's time is the difference of two models over the layers between them. It holds, on both sides, the experts and two norms,
attention with one head of 64 channels and the router. GB/s: weights of the experts chosen, in the side's own bytes.
GFLOP/s: the experts' operations. Medians; at one token the time that a tenth of the tokens undercut,
which leaves out most of what spinning threads lose when they get one processor between them.`,
  model: `Prefill ${PREFILL} tokens and choose the next, then decode ${DECODE}; the ids fed are random and equal on both sides. Vocabulary 32,000. Ours:
attention and shared expert 4 bit, embedding bf16. llama.cpp: every matrix of the type named but the head; its times hold the event loop's turn and native greedy sampling. Both
end the last layer for the last token only. At best: the ratio of the fastest tokens. Memory: peak of the process, mapped pages included.`,
};

const LAYER_HEAD = ['tokens', 'bits', 'ours ms', 'GB/s', 'GFLOP/s', 'peer', 'ms', 'GB/s', 'GFLOP/s', 'ratio'];
const MODEL_HEAD = [
  'bits',
  'peer',
  'prefill ours',
  'peer',
  'ratio',
  'decode ours',
  'peer',
  'ratio',
  'at best',
  'memory ours',
  'peer',
];

function layerCells({ tokens, bits, peerType, ours, peer, ratio }: LayerRow): string[] {
  const figures = (f: LayerRow['ours']) => [f.ms, f.gbs, f.gflops].map(significant);
  return [`${tokens}`, `${bits}`, ...figures(ours), peerType, ...figures(peer), ratio.toFixed(2)];
}

function modelCells({ bits, peerType, ours, peer }: WholeRow): string[] {
  const pair = (a: number, b: number) => [significant(a), significant(b), (a / b).toFixed(2)];
  const mb = (bytes: number) => `${Math.round(bytes / 1e6)} MB`;
  return [
    `${bits}`,
    peerType,
    ...pair(ours.prefill, peer.prefill),
    ...pair(ours.decode, peer.decode),
    (ours.bestDecode / peer.bestDecode).toFixed(2),
    mb(ours.peakMemory),
    mb(peer.peakMemory),
  ];
}

function parseOptions(): Options {
  return new Command('bench:peers')
    .option('--part <list>', 'layer, model or both', 'layer,model')
    .option('--shape <shape...>', `${SHAPES.map((s) => s.name).join(', ')} or H,I,E,K (default: these)`)
    .option('--bits <list>', 'bit widths of the experts', '4,3,2')
    .option('--tokens <list>', 'tokens at a time, up to 512', '1,8,32,512')
    .option('--rounds <n>', 'measurements a figure', '5')
    .option('--threads <n>', 'of either side', `${availableParallelism()}`)
    .addOption(new Option('--activations <kind>', 'ours').choices(['int8', 'float32']).default('int8'))
    .addOption(
      new Option('--isa <level>', 'instruction set of both sides (x64); default: the best of each').choices(
        Object.keys(VARIANTS),
      ),
    )
    .option('--layers <n>', 'of the whole model', '2')
    .addOption(
      new Option('--head <type>', "the peer's head in the whole model; Q6_K is llama-quantize's choice")
        .choices(['Q6_K', 'F16', 'Q4_0'])
        .default('Q6_K'),
    )
    .addOption(
      new Option('--head-bits <bits>', 'our head in the whole model: see LoadOptions.headBits')
        .choices(['4', '16'])
        .default('4'),
    )
    .option('--json', 'print one JSON object')
    .parse()
    .opts<Options>();
}

function list<T>(what: string, text: string, parse: (item: string) => T | undefined): T[] {
  return text.split(',').map((item) => {
    const value = parse(item.trim());
    if (value === undefined) throw new RangeError(`--${what}: '${item}' is not one of its values`);
    return value;
  });
}

const bitsOf = (text: string) => ([2, 3, 4] as const).find((bits) => `${bits}` === text);
const integer = (least: number, most: number) => (text: string) => {
  const n = Number(text);
  return Number.isInteger(n) && n >= least && n <= most ? n : undefined;
};

interface Report {
  cpu: string;
  loadAverage: number;
  threads: number;
  rounds: number;
  activations: string;
  ours?: SideInfo;
  peer?: SideInfo;
  limits?: MachineLimits;
  layer: LayerRow[];
  model: WholeRow[];
  notes: typeof NOTES;
}

interface Run {
  report: Report;
  side: SideOptions;
  /** For models; removed at the end. */
  dir: string;
  print: (text: string) => void;
}

async function runLayers(o: Options, { report, side, dir, print }: Run): Promise<void> {
  const shapes: readonly LayerShape[] = o.shape?.map(parseShape) ?? SHAPES;
  const widths = list('bits', o.bits, bitsOf);
  const tokens = list('tokens', o.tokens, integer(1, 512));
  for (const shape of shapes) {
    const rows: LayerRow[] = [];
    for (const bits of widths) {
      const sides: Side[] = [];
      try {
        sides.push(await Side.start('ours', side), await Side.start('peer', side));
        const options = { tokens, rounds: report.rounds, dir };
        rows.push(...(await compareLayer(sides as [Side, Side], shape, bits, options)));
      } finally {
        for (const one of sides) await one.stop();
      }
    }
    report.layer.push(...rows);
    const { name, hidden, width, experts, topK } = shape;
    print(
      `\nMoE layer, ${name}: hidden ${hidden}, expert width ${width}, ${experts} experts, ${topK} a token`,
    );
    print(table([LAYER_HEAD, ...rows.map(layerCells)]).trimEnd());
  }
  print(NOTES.layer);
}

async function runModels(o: Options, { report, side, dir, print }: Run): Promise<void> {
  const layers = list('layers', o.layers, integer(1, 24))[0]!;
  const headBits = o.headBits === '4' ? 4 : 16;
  const options = { ...side, headBits, rounds: report.rounds, layers, headType: o.head, dir } as const;
  for (const bits of list('bits', o.bits, bitsOf)) report.model.push(await compareWhole(bits, options));
  print(`\nWhole model, ${layers} layers, tokens a second; head ${headBits} bit, llama.cpp's ${o.head}`);
  print(table([MODEL_HEAD, ...report.model.map(modelCells)]).trimEnd());
  print(NOTES.model);
}

/** Fails early when the peer is missing. */
async function describeSides({ report, side, print }: Run): Promise<void> {
  for (const which of ['peer', 'ours'] as const) {
    const one = await Side.start(which, side);
    report[which] = one.info;
    await one.stop();
  }
  const limits = (report.limits = await measureLimits({ threads: side.threads }));
  print(
    `${report.cpu}, ${side.threads} threads; load average before the start ${report.loadAverage.toFixed(2)}`,
  );
  print(`ours: ${report.ours!.name}, ${report.ours!.cpu}, ${report.activations} activations`);
  print(`peer: ${report.peer!.name}, ${report.peer!.cpu}`);
  const giga = (value: number) => significant(value / 1e9);
  print(
    `limits (${limits.isa}): read ${giga(limits.readBandwidth)} GB/s, int8 ${giga(limits.int8Peak)} GOP/s`,
  );
}

async function main(): Promise<void> {
  const o = parseOptions();
  const parts = list('part', o.part, (p) => (p === 'layer' || p === 'model' ? p : undefined));
  const threads = list('threads', o.threads, integer(1, 1024))[0]!;
  const report: Report = {
    cpu: cpus()[0]?.model ?? 'unknown',
    loadAverage: loadavg()[0]!,
    threads,
    rounds: list('rounds', o.rounds, integer(1, 1000))[0]!,
    activations: o.activations,
    layer: [],
    model: [],
    notes: NOTES,
  };
  const print = (text: string) => {
    if (!o.json) console.log(text);
  };
  const dir = await mkdtemp(join(tmpdir(), 'eac-moe-peers-'));
  const remove = () => rmSync(dir, { recursive: true, force: true });
  process.once('SIGINT', () => {
    remove();
    process.exit(130);
  });
  try {
    const side: SideOptions = { threads, activations: o.activations };
    if (o.isa) Object.assign(side, { isa: o.isa, binaries: await copyBinaries(o.isa, dir) });
    if (o.isa) setIsa(o.isa);
    const run = { report, side, dir, print };
    await describeSides(run);
    if (parts.includes('layer')) await runLayers(o, run);
    if (parts.includes('model')) await runModels(o, run);
  } finally {
    remove();
  }
  if (o.json) console.log(JSON.stringify(report, null, 2));
}

main().catch((error: unknown) => {
  const message = error instanceof Error ? error.message : String(error);
  const cure = 'npm ci installs it on Linux x64 and arm64 with glibc';
  console.error(
    error instanceof PeerUnavailable ? `node-llama-cpp cannot be used here (${message}); ${cure}` : message,
  );
  process.exitCode = 1;
});
