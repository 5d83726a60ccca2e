/**
 * A whole model against the peer: Qwen1.5-MoE's shape cut to a few layers. Every side and width runs in a process of its own, whose peak
 * memory counts; ours and the peer's take turns.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { join } from 'node:path';
import type { GgmlTypeName } from './gguf';
import { median, shuffledIds, type Runner } from './layer';
import { PEER_TYPES, peerModel, wholeConfig, writeCheckpoint, writePeerModel } from './models';
import { Side, type SideOptions } from './side';

export interface WholeFigures {
  /** Tokens a second, median over the rounds. */
  prefill: number;
  decode: number;
  /** At the pace of the fastest round, and of the fastest token. */
  bestPrefill: number;
  bestDecode: number;
  /** Bytes. */
  peakMemory: number;
}

export interface WholeRow {
  bits: number;
  peerType: GgmlTypeName;
  ours: WholeFigures;
  peer: WholeFigures;
}

export interface WholeOptions extends SideOptions {
  rounds: number;
  layers: number;
  /** Of the peer's head. */
  headType: GgmlTypeName;
  dir: string;
}

export const PREFILL = 512;
export const DECODE = 64;

async function startBoth(bits: 2 | 3 | 4, options: WholeOptions, dir: string): Promise<[Side, Side]> {
  const config = wholeConfig(options.layers);
  const [checkpoint, gguf] = [join(dir, 'checkpoint'), join(dir, 'model.gguf')];
  await writeCheckpoint(checkpoint, config, bits);
  await writePeerModel(gguf, peerModel(config, PEER_TYPES[bits]!, options.headType));
  const ours = await Side.start('ours', options);
  try {
    await ours.loadChecked({ path: checkpoint });
    const peer = await Side.start('peer', options);
    await peer.loadChecked({ path: gguf, mmap: true });
    return [ours, peer];
  } catch (error) {
    await ours.stop();
    throw error;
  }
}

/** Everything but the memory. */
export async function measureWhole(
  sides: readonly [Runner, Runner],
  rounds: number,
): Promise<Omit<WholeFigures, 'peakMemory'>[]> {
  const times = sides.map(() => ({ prefill: [] as number[], decode: [] as number[], steps: [] as number[] }));
  for (let round = -1; round < rounds; round++) {
    const ids = shuffledIds(round + 1, 32_000);
    for (const s of round % 2 === 0 ? [0, 1] : [1, 0]) {
      const prefill = await sides[s]!.prefill(0, ids.slice(0, PREFILL));
      const decode = await sides[s]!.decode(0, ids.slice(PREFILL, PREFILL + DECODE));
      if (round < 0) continue;
      times[s]!.prefill.push(prefill);
      times[s]!.decode.push(decode.reduce((a, b) => a + b, 0));
      times[s]!.steps.push(...decode);
    }
  }
  return times.map(({ prefill, decode, steps }) => ({
    prefill: (1000 * PREFILL) / median(prefill),
    decode: (1000 * DECODE) / median(decode),
    bestPrefill: (1000 * PREFILL) / Math.min(...prefill),
    bestDecode: 1000 / Math.min(...steps),
  }));
}

export async function compareWhole(bits: 2 | 3 | 4, options: WholeOptions): Promise<WholeRow> {
  const dir = await mkdtemp(join(options.dir, 'whole-'));
  let sides: readonly Side[] = [];
  try {
    const both = (sides = await startBoth(bits, options, dir)) as [Side, Side];
    const rates = await measureWhole(both, options.rounds);
    const figures = async (s: 0 | 1) => ({ ...rates[s]!, peakMemory: await both[s].peakMemory() });
    return { bits, peerType: PEER_TYPES[bits]!, ours: await figures(0), peer: await figures(1) };
  } finally {
    for (const side of sides) await side.stop();
    await rm(dir, { recursive: true, force: true });
  }
}
