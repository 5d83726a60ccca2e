/** What PESF saves: the expert layer without and with pruning, under the expert loads of a trained model. */
import { seededRandom } from '../model/random';
import { keepsExpert } from '../prune/pesf';
import type { Group, Setting } from './case';
import { recordExperts } from './experts';
import { measureLoads, resampleLoads } from './loads';
import { loadedRouting, shuffled } from './routing';
import { randomLayers } from './weights';

const ALPHAS = [0.3, 0.7];

/** Prefill with the largest batch asked for, a width at a time; a call is one pass through as many layers as the model has. */
export async function* pesfGroups(setting: Setting): AsyncGenerator<Group> {
  const { shape, bits, groupSize, seed, cycle } = setting;
  const tokens = Math.max(...setting.tokens);
  const loads = await measureLoads(setting.loads);
  const random = seededRandom(seed);
  const steps = loads.map((sorted) => {
    const resampled = resampleLoads(sorted, shape.experts);
    const places = shuffled(shape.experts, random);
    return loadedRouting(
      tokens,
      Float64Array.from(places, (p) => resampled[p]!),
      shape.topK,
      random,
    );
  });
  for (const b of bits) {
    const weights = await randomLayers(shape, { bits: b, groupSize }, cycle, seed);
    const variants = [0, ...ALPHAS].map((alpha) => {
      const pruned = steps.map((indices) => prunePesf(indices, tokens, shape.topK, shape.experts, alpha));
      const { run, dispose, ...work } = recordExperts(setting, weights, tokens, pruned);
      const each = steps.length;
      return {
        parameters: { tokens, bits: b, layers: each, alpha },
        bytes: work.bytes * each,
        operations: work.operations * each,
        arithmetic: work.arithmetic,
        run: (calls: number) => run(calls * each),
        dispose,
      };
    });
    yield {
      cases: variants,
      dispose: () => {
        variants.forEach((v) => v.dispose());
        weights.dispose();
      },
    };
  }
}

/** The choices with those of pruned experts taken out (-1), as the mode `drop` does; alpha 0 prunes nothing. */
export function prunePesf(
  indices: Int32Array,
  tokens: number,
  topK: number,
  experts: number,
  alpha: number,
): Int32Array {
  if (alpha === 0) return indices;
  const counts = new Int32Array(experts);
  for (const e of indices) counts[e]!++;
  return indices.map((e) => (keepsExpert(counts[e]!, tokens, topK, experts, alpha) ? e : -1));
}

/** One line of the comparison. */
export interface PesfSaving {
  shape: string;
  threads: number;
  bits: number;
  tokens: number;
  alpha: number;
  /** Share of the token-expert pairs that were skipped, and of the time that this saved; and time / pairs. */
  skipped: number;
  saved: number;
  ratio: number;
}

interface Measured {
  kernel: string;
  shape: string;
  threads: number;
  parameters: Record<string, string | number>;
  operations: number;
  time: { relative: number };
}

/** Each pruned case of `pesf` against the one that prunes nothing. */
export function pesfSavings(results: readonly Measured[]): PesfSaving[] {
  const mine = results.filter(({ kernel }) => kernel === 'pesf');
  const key = ({ shape, threads, parameters: { bits, tokens } }: Measured) =>
    `${shape} ${threads} ${bits} ${tokens}`;
  const whole = new Map(mine.filter((r) => r.parameters.alpha === 0).map((r) => [key(r), r]));
  return mine.flatMap((r) => {
    const base = whole.get(key(r));
    if (!base || base === r) return [];
    const skipped = 1 - r.operations / base.operations;
    const saved = 1 - r.time.relative; // the unpruned case is the first of its group
    const [bits, tokens, alpha] = [r.parameters.bits, r.parameters.tokens, r.parameters.alpha].map(Number);
    const ratio = skipped > 0 ? saved / skipped : 0;
    return [
      {
        shape: r.shape,
        threads: r.threads,
        bits: bits!,
        tokens: tokens!,
        alpha: alpha!,
        skipped,
        saved,
        ratio,
      },
    ];
  });
}
