/**
 * Expert pruning as the decoder sees it: a policy is asked once per layer and sequence, after the router has chosen and before the
 * experts run. Policies live in lib/prune.
 */
export interface ExpertSelection {
  /** Index of the decoder layer. */
  layer: number;
  /** Tokens of this sequence in this pass. */
  tokens: number;
  topK: number;
  experts: number;
  /** How often the sequence chose each expert; sums to tokens * topK. */
  counts: Int32Array;
}

export interface ExpertPolicy {
  /**
   * What a token gets whose experts are pruned: `drop` leaves their terms out, `renormalize` scales the survivors' weights to the sum
   * that all had, `reselect` lets the token choose again among the kept experts.
   */
  readonly mode: 'drop' | 'renormalize' | 'reselect';
  /**
   * Set where `select` is PESF's rule (EAC-MoE, Eq. 6) and nothing else: the layers then prune by themselves, in one run, and `select` is asked
   * afterwards, with the same counts, for what it remembers.
   */
  readonly pesf?: { alpha: number; minTokens: number };
  /** Writes 1 (kept) or 0 (pruned) for every expert into `keep`; returns false when it prunes none. */
  select(selection: ExpertSelection, keep: Uint8Array): boolean;
}
