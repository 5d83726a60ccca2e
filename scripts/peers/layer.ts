/**
 * One MoE layer against the peer's.
 *
 * Both sides run two models that differ only in their number of layers; a layer's time is the difference over the layers between them.
 * Embedding, head, sampling, the event loop and what the peer leaves out of its last layer (everything after attention, for tokens
 * without logits) cancel. What does not cancel, on either side: two norms, attention with one head of 64 channels, the router.
 * Successive tokens choose other experts, so weights come from memory as far as those of `many` layers exceed the caches.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { shuffled } from '../../lib/bench/routing';
import { expertOperations, type LayerShape } from '../../lib/bench/shapes';
import { summarize } from '../../lib/bench/timing';
import { seededRandom } from '../../lib/model/random';
import { ggmlBytes, type GgmlTypeName } from './gguf';
import { layerConfig, PEER_TYPES, peerModel, typeFor, writeCheckpoint, writePeerModel } from './models';
import type { Side } from './side';

export interface LayerFigures {
  /**
   * Median over the rounds; at one token the difference of the steps that only a tenth undercut. Spinning threads that share a processor
   * for a while slow many steps down by a multiple, more in one model than in the other: there a difference of medians means nothing.
   */
  ms: number;
  /** Difference of the fastest. */
  bestMs: number;
  /** Experts' multiplications and additions a second, from `ms`. */
  gflops: number;
  /** Bytes of the experts' weights a second, each expert that is expected to be chosen counted once; from `ms`. */
  gbs: number;
  bitsPerWeight: number;
}

export interface LayerRow {
  shape: LayerShape;
  tokens: number;
  bits: number;
  peerType: GgmlTypeName;
  ours: LayerFigures;
  peer: LayerFigures;
  /** Peer's time over ours. */
  ratio: number;
}

/** What runs tokens and says how long it took. */
export type Runner = Pick<Side, 'prefill' | 'decode'>;

/** Milliseconds. */
export type RunTime = Pick<LayerFigures, 'ms' | 'bestMs'>;

export interface LayerOptions {
  tokens: readonly number[];
  rounds: number;
  /** Where to write the models; they are removed again. */
  dir: string;
}

/** In a round: steps at one token; runs at more. */
const STEPS = 32;
const RUNS = 8;
const VOCABULARY = 512;

/** Layers of the two models: Mixtral's are large enough that fewer do. */
export function depths(shape: LayerShape): { few: number; many: number } {
  const weights = 3 * shape.hidden * shape.width * shape.experts;
  return weights > 1e9 ? { few: 1, many: 3 } : { few: 2, many: 6 };
}

/** All token ids of a vocabulary in random order. */
export function shuffledIds(seed: number, vocabulary: number): number[] {
  return [...shuffled(vocabulary, seededRandom(seed))];
}

export const median = (values: readonly number[]) => summarize(values).median;

async function loadBoth(
  sides: readonly [Side, Side],
  shape: LayerShape,
  bits: 2 | 3 | 4,
  parent: string,
): Promise<void> {
  const { few, many } = depths(shape);
  const dir = await mkdtemp(join(parent, 'layer-'));
  try {
    for (const [model, layers] of [few, many].entries()) {
      const config = layerConfig(shape, layers);
      const [checkpoint, gguf] = [join(dir, `${layers}`), join(dir, `${layers}.gguf`)];
      await writeCheckpoint(checkpoint, config, bits);
      await sides[0].loadChecked({ path: checkpoint }, model);
      await rm(checkpoint, { recursive: true });
      await writePeerModel(gguf, peerModel(config, PEER_TYPES[bits]!));
      await sides[1].loadChecked({ path: gguf, mmap: false }, model);
      await rm(gguf);
    }
  } finally {
    await rm(dir, { recursive: true, force: true });
  }
}

/** Milliseconds: of single tokens one after the other, or the median of a few runs of several: few tokens choose few experts, each time others. */
async function runOnce(side: Runner, model: number, ids: number[], tokens: number): Promise<number[]> {
  if (tokens === 1) {
    await side.prefill(model, ids.slice(0, 1));
    return side.decode(model, ids.slice(1, 1 + STEPS));
  }
  const times: number[] = [];
  for (let at = 0; at + tokens <= ids.length && times.length < RUNS; at += tokens)
    times.push(await side.prefill(model, ids.slice(at, at + tokens)));
  return [median(times)];
}

/** The value that a tenth undercut. */
function tenth(values: readonly number[]): number {
  return [...values].sort((a, b) => a - b)[Math.floor(values.length / 10)]!;
}

/** Per side, milliseconds a layer: alternating sides and models, one round of warming up. */
export async function measure(
  sides: readonly [Runner, Runner],
  layersBetween: number,
  tokens: number,
  rounds: number,
): Promise<RunTime[]> {
  const times = sides.map(() => [[], []] as [number[], number[]]);
  for (let round = -1; round < rounds; round++) {
    const ids = shuffledIds(round + 1, VOCABULARY);
    const order = round % 2 === 0 ? [0, 1] : [1, 0];
    for (const model of [0, 1]) {
      for (const s of order) {
        const some = await runOnce(sides[s]!, model, ids, tokens);
        if (round >= 0) times[s]![model]!.push(...some);
      }
    }
  }
  return times.map(([few, many]) => {
    const between = tokens === 1 ? tenth(many) - tenth(few) : median(many.map((ms, i) => ms - few[i]!));
    const best = Math.min(...many) - Math.min(...few);
    return { ms: between / layersBetween, bestMs: best / layersBetween };
  });
}

function figures(time: RunTime, shape: LayerShape, tokens: number, expertBytes: number): LayerFigures {
  const { hidden, width, experts, topK } = shape;
  const weights = 3 * hidden * width;
  const touched = experts * (1 - (1 - topK / experts) ** tokens);
  return {
    ...time,
    gflops: expertOperations(shape, topK * tokens) / (time.ms * 1e6),
    gbs: (touched * expertBytes) / (time.ms * 1e6),
    bitsPerWeight: (8 * expertBytes) / weights,
  };
}

/** In memory: the codes, and for 128 weights an f16 scale and a zero point of one byte. */
function ourExpertBytes({ hidden, width }: LayerShape, bits: number): number {
  const matrix = (out: number, inputs: number) =>
    (out * inputs * bits) / 8 + 3 * out * Math.ceil(inputs / 128);
  return 2 * matrix(width, hidden) + matrix(hidden, width);
}

function peerExpertBytes({ hidden, width }: LayerShape, type: GgmlTypeName): number {
  const matrix = (out: number, inputs: number) => ggmlBytes(typeFor(type, inputs), [inputs, out]);
  return 2 * matrix(width, hidden) + matrix(hidden, width);
}

/** Loads a shape into both sides and measures every number of tokens. `sides`: ours and the peer's, with nothing loaded. */
export async function compareLayer(
  sides: readonly [Side, Side],
  shape: LayerShape,
  bits: 2 | 3 | 4,
  { tokens, rounds, dir }: LayerOptions,
): Promise<LayerRow[]> {
  const rows: LayerRow[] = [];
  const peerType = PEER_TYPES[bits]!;
  const { few, many } = depths(shape);
  await loadBoth(sides, shape, bits, dir);
  for (const count of tokens) {
    const [ourTime, peerTime] = await measure(sides, many - few, count, rounds);
    const ours = figures(ourTime!, shape, count, ourExpertBytes(shape, bits));
    const peer = figures(peerTime!, shape, count, peerExpertBytes(shape, peerType));
    rows.push({ shape, tokens: count, bits, peerType, ours, peer, ratio: peer.ms / ours.ms });
  }
  for (const side of sides) await side.unload();
  return rows;
}
