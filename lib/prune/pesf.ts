/**
 * PESF, pruning based on expert-selection frequency (EAC-MoE section 5, Eq. 6): per input sequence and MoE layer, during prefill, the
 * experts that the sequence hardly chooses are left out. Counts come from this sequence alone, just before the experts run.
 *
 * DEFINITION  l tokens, K experts a token, N experts: an expert chosen c times is pruned when c < (l K / N) α, strictly, 0 < α <= 1.
 * LIMITS      Shared experts are never pruned, a pass of one token (decoding) neither. A sequence fed in several passes counts each.
 */
import { EacMoeError } from '../errors';
import type { MoeModel } from '../model/model';
import type { ExpertPolicy, ExpertSelection } from '../model/policy';

export type PruneMode = ExpertPolicy['mode'];

export interface PruneOptions {
  /** α of Eq. 6, in (0, 1]: a share of the even load l K / N. The paper uses 0.3 and 0.7. */
  alpha: number;
  /**
   * What a token gets in place of its pruned experts; the paper leaves it open. `drop`: nothing, a token may keep fewer than K experts or
   * none. `renormalize`: the survivors' weights, scaled to the sum that all had. `reselect`: its next choices among the kept experts.
   *
   * Default `drop`. Measured on the bundled model (windows of 512 and of 256 tokens of prose, math and code): up to α = 0.5 the three
   * perplexities are within 0.6 % of each other. `renormalize` has the largest KL divergence from α = 0.3 on; `reselect` has the smallest,
   * by 3 % at most, but all its work remains, where `drop` skips 0.4, 3, 7 and 12 % of the token-expert pairs at α = 0.1, 0.3, 0.5, 0.7.
   */
  mode?: PruneMode;
  /** Sequences shorter than this are not pruned: their counts say little. Default 1: all are. */
  minTokens?: number;
}

/** What a policy decided, per MoE layer. */
export interface LayerPruning {
  /** Decoder layer. */
  layer: number;
  /** Sequences (prefill passes) decided on. */
  sequences: number;
  /** Share of their experts pruned. */
  experts: number;
  /** Share of the token-expert pairs that had chosen a pruned expert: skipped, or given to other experts by `reselect`. */
  pairs: number;
}

export interface PruneReport {
  alpha: number;
  mode: PruneMode;
  minTokens: number;
  /** Over all layers. */
  experts: number;
  pairs: number;
  layers: LayerPruning[];
}

const MODES: readonly PruneMode[] = ['drop', 'renormalize', 'reselect'];

/** α stands for the decimal number that was typed, so that 0.07 of 100 is 7 and not 7.000000000000001. */
const ROUNDING = 1 - 2 ** -50;

/** Eq. 6 for one expert: true when it is kept. */
export function keepsExpert(
  count: number,
  tokens: number,
  topK: number,
  experts: number,
  alpha: number,
): boolean {
  return count * experts >= tokens * topK * alpha * ROUNDING;
}

interface Tally {
  sequences: number;
  experts: number;
  prunedExperts: number;
  pairs: number;
  prunedPairs: number;
}

/** PESF as a policy object; it remembers what it pruned. */
export class PesfPolicy implements ExpertPolicy {
  readonly alpha: number;
  readonly mode: PruneMode;
  readonly minTokens: number;
  readonly pesf: { alpha: number; minTokens: number };
  readonly #tallies = new Map<number, Tally>();

  /** @throws EacMoeError INVALID_ARGUMENT naming the option */
  constructor({ alpha, mode = 'drop', minTokens = 1 }: PruneOptions) {
    if (typeof alpha !== 'number' || !(alpha > 0 && alpha <= 1)) {
      throw new EacMoeError('INVALID_ARGUMENT', `alpha must be a number in (0, 1]; found ${show(alpha)}`);
    }
    if (!MODES.includes(mode)) {
      throw new EacMoeError(
        'INVALID_ARGUMENT',
        `mode must be 'drop', 'renormalize' or 'reselect'; found ${show(mode)}`,
      );
    }
    if (!Number.isSafeInteger(minTokens) || minTokens < 1) {
      throw new EacMoeError(
        'INVALID_ARGUMENT',
        `minTokens must be a positive integer; found ${show(minTokens)}`,
      );
    }
    this.alpha = alpha;
    this.mode = mode;
    this.minTokens = minTokens;
    this.pesf = { alpha, minTokens };
  }

  select({ layer, tokens, topK, experts, counts }: ExpertSelection, keep: Uint8Array): boolean {
    if (tokens < this.minTokens) return false;
    let [pruned, pairs] = [0, 0];
    for (let e = 0; e < experts; e++) {
      keep[e] = keepsExpert(counts[e]!, tokens, topK, experts, this.alpha) ? 1 : 0;
      if (keep[e]) continue;
      pruned++;
      pairs += counts[e]!;
    }
    const tally = this.#tally(layer);
    tally.sequences++;
    tally.experts += experts;
    tally.prunedExperts += pruned;
    tally.pairs += tokens * topK;
    tally.prunedPairs += pairs;
    return pruned > 0;
  }

  /** What was pruned since the last `reset`. */
  report(): PruneReport {
    const layers = [...this.#tallies].sort(([a], [b]) => a - b);
    const all = layers.map(([, tally]) => tally);
    return {
      alpha: this.alpha,
      mode: this.mode,
      minTokens: this.minTokens,
      experts: share(all, 'prunedExperts', 'experts'),
      pairs: share(all, 'prunedPairs', 'pairs'),
      layers: layers.map(([layer, tally]) => ({
        layer,
        sequences: tally.sequences,
        experts: share([tally], 'prunedExperts', 'experts'),
        pairs: share([tally], 'prunedPairs', 'pairs'),
      })),
    };
  }

  reset(): void {
    this.#tallies.clear();
  }

  #tally(layer: number): Tally {
    let tally = this.#tallies.get(layer);
    if (!tally) {
      tally = { sequences: 0, experts: 0, prunedExperts: 0, pairs: 0, prunedPairs: 0 };
      this.#tallies.set(layer, tally);
    }
    return tally;
  }
}

/**
 * The same model, pruning by PESF; it shares the weights and takes the place of any policy that `model` had. Other policies: write an
 * `ExpertPolicy` and pass it to `model.withPolicy`.
 *
 * @throws EacMoeError INVALID_ARGUMENT when an option is out of range
 */
export function pruneExperts(model: MoeModel, options: PruneOptions): MoeModel {
  return model.withPolicy(new PesfPolicy(options));
}

/** What a model of `pruneExperts` has pruned so far, in all its passes; `reset` begins anew after this report. */
export function pruneReport(model: MoeModel, { reset = false }: { reset?: boolean } = {}): PruneReport {
  const { policy } = model;
  if (!(policy instanceof PesfPolicy)) {
    throw new EacMoeError('INVALID_ARGUMENT', 'model: expected one that pruneExperts made');
  }
  const report = policy.report();
  if (reset) policy.reset();
  return report;
}

function share(tallies: Tally[], part: keyof Tally, whole: keyof Tally): number {
  const sum = (key: keyof Tally) => tallies.reduce((total, tally) => total + tally[key], 0);
  return sum(whole) > 0 ? sum(part) / sum(whole) : 0;
}

function show(value: unknown): string {
  return typeof value === 'string' ? `'${value}'` : String(value);
}
