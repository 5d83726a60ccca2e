/** Likelihood of tokens, and divergence from a reference, from hidden states: logits are computed a piece at a time. */
import type { Control, Tensor } from '../../types/native';
import { EacMoeError } from '../errors';
import type { MoeModel } from '../model/model';
import { native } from '../native';

/** Hidden states after the last layer, f32 [tokens, hidden], and whose they are. */
export interface Hidden {
  model: MoeModel;
  h: Tensor;
}

export interface RowScores {
  /** Negative log-likelihood in nats of each row's target; 0 where it has none. */
  nll: Float64Array;
  /** KL(reference || model) in nats; only with a reference. */
  kl?: Float64Array;
}

/**
 * Scores rows of hidden states against `targets` (token ids; -1 = none). Two models go in lockstep, so that no more than one piece of
 * each one's logits exists at a time.
 */
export async function scoreRows(
  { model, h }: Hidden,
  targets: Int32Array,
  reference?: Hidden,
  control?: Control,
): Promise<RowScores> {
  const scores: RowScores = { nll: new Float64Array(targets.length) };
  if (reference) scores.kl = new Float64Array(targets.length);
  const { tokenNll, klDivergence } = native();
  await model.decoder.logits(
    h,
    async (logits, begin) => {
      const end = begin + logits.shape[0]!;
      scores.nll.set(await tokenNll(logits, targets.slice(begin, end)), begin);
      await reference?.model.decoder.logits(
        reference.h.rows(begin, end),
        async (other, offset) => {
          const rows = logits.rows(offset, offset + other.shape[0]!);
          scores.kl!.set(await klDivergence(other, rows), begin + offset);
        },
        control,
      );
    },
    control,
  );
  return scores;
}

/** The sum, or NON_FINITE: a NaN never passes for a result. */
export function finiteSum(model: MoeModel, values: Iterable<number>): number {
  let sum = 0;
  for (const value of values) sum += value;
  if (!Number.isFinite(sum)) {
    throw new EacMoeError('NON_FINITE', `${model.path}: the logits hold NaN or infinite values`);
  }
  return sum;
}
