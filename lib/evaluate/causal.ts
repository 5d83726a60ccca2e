/**
 * A perplexity under pruning that looks at nothing it predicts. Prefill counts see the whole prompt, so a perplexity measured in one pass is
 * slightly optimistic. Here the first half of each window (rounded down) runs unpruned and is counted; the second half is pruned by
 * these counts and scored. Without a policy: the perplexity of the second half, to compare with.
 */
import type { Control } from '../../types/native';
import type { MoeModel } from '../model/model';
import type { ExpertPolicy, ExpertSelection } from '../model/policy';
import { finiteSum, scoreRows } from './score';

export interface CausalResult {
  perplexity: number;
  /** Predictions scored. */
  tokens: number;
}

/** Decides by what `counted` tokens chose, whatever the pass at hand chooses. */
class CountedPolicy implements ExpertPolicy {
  readonly mode: ExpertPolicy['mode'];
  readonly #selections = new Map<number, ExpertSelection>();

  constructor(private readonly policy: ExpertPolicy) {
    this.mode = policy.mode;
  }

  /** A policy that prunes nothing and remembers what was chosen. */
  recorder(): ExpertPolicy {
    return {
      mode: this.mode,
      select: (selection) => {
        this.#selections.set(selection.layer, { ...selection, counts: selection.counts.slice() });
        return false;
      },
    };
  }

  select({ layer }: ExpertSelection, keep: Uint8Array): boolean {
    return this.policy.select(this.#selections.get(layer)!, keep);
  }
}

/** `seqLen` must be 4 or more: a single token is never pruned. */
export async function evaluateCausal(
  model: MoeModel,
  ids: Int32Array,
  seqLen: number,
  control: Control,
  onTokens: (tokens: number) => void,
): Promise<CausalResult> {
  const half = Math.floor(seqLen / 2);
  let [nll, tokens] = [0, 0];
  for (let begin = 0; begin < ids.length; begin += seqLen) {
    const window = ids.slice(begin, begin + seqLen);
    nll += finiteSum(model, await secondHalf(model, window, half, control));
    tokens += seqLen - half;
    onTokens(seqLen);
  }
  return { perplexity: Math.exp(nll / tokens), tokens };
}

async function secondHalf(
  model: MoeModel,
  window: Int32Array,
  half: number,
  control: Control,
): Promise<number[]> {
  const { decoder } = model;
  const counted = model.policy && new CountedPolicy(model.policy);
  const cache = decoder.createCache();
  const pass = (ids: Int32Array, policy: ExpertPolicy | undefined, targets: Int32Array) =>
    decoder.run(
      { ids, sequences: [{ length: ids.length, cache }] },
      { policy, activations: model.activations, control },
      async (frame) => {
        const h = frame.tensor(decoder.h).rows(ids.length - targets.length, ids.length);
        return (await scoreRows({ model, h }, targets, undefined, control)).nll;
      },
    );
  try {
    const first = await pass(window.slice(0, half), counted?.recorder(), window.slice(half, half + 1));
    const targets = Int32Array.from({ length: window.length - half }, (_, i) => window[half + i + 1] ?? -1);
    return [...first, ...(await pass(window.slice(half), counted, targets))];
  } finally {
    cache.dispose();
  }
}
