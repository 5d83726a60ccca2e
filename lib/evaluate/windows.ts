/**
 * Perplexity, divergence and expert shift over a text.
 *
 * DEFINITION  The text's tokens in order, no special tokens added, are cut into windows of `seqLen` that do not overlap; what is left over
 *             is dropped. Perplexity: exp of the mean negative log-likelihood over all but the first position of each window. KL: over
 *             the same predictions. Shift: over all tokens. Each window is a sequence of its own.
 */
import type { Control } from '../../types/native';
import type { Batch, RunOptions } from '../model/decoder';
import type { MoeModel } from '../model/model';
import type { ExpertPolicy, ExpertSelection } from '../model/policy';
import { countShift, ShiftMeter, type ExpertShift } from './shift';
import { finiteSum, scoreRows, type RowScores } from './score';

/** Tokens a batch of windows holds at most, unless one window is longer. */
const BATCH_TOKENS = 2048;

export interface WindowResult {
  perplexity: number;
  kl?: number;
  expertShift?: ExpertShift;
  prunedExperts?: number;
  prunedPairs?: number;
}

/** Counts what a policy prunes. */
class PruneMeter {
  experts = 0;
  prunedExperts = 0;
  pairs = 0;
  prunedPairs = 0;

  watch(policy: ExpertPolicy): ExpertPolicy {
    return {
      mode: policy.mode,
      select: (selection: ExpertSelection, keep: Uint8Array) => {
        this.experts += keep.length;
        const prunes = policy.select(selection, keep);
        if (prunes) for (const kept of keep) if (!kept) this.prunedExperts++;
        return prunes;
      },
    };
  }

  add(indices: Int32Array): void {
    this.pairs += indices.length;
    for (const index of indices) if (index < 0) this.prunedPairs++;
  }
}

/** `ids` holds whole windows only. `onTokens` hears how many tokens each batch had. */
export async function evaluateWindows(
  model: MoeModel,
  reference: MoeModel | undefined,
  ids: Int32Array,
  seqLen: number,
  control: Control,
  onTokens: (tokens: number) => void,
): Promise<WindowResult> {
  const shift = reference && new ShiftMeter();
  const pruning = model.policy && new PruneMeter();
  const batchLength = seqLen * Math.max(1, Math.floor(BATCH_TOKENS / seqLen));
  let [nll, kl] = [0, 0];
  for (let begin = 0; begin < ids.length; begin += batchLength) {
    const batch = windowBatch(ids.slice(begin, begin + batchLength), seqLen);
    const scores = await scoreBatch(batch, model, reference, shift, pruning, control);
    nll += finiteSum(model, scores.nll);
    // The last row of a window predicts what lies beyond it.
    if (scores.kl)
      kl += finiteSum(
        model,
        scores.kl.filter((_, row) => (row + 1) % seqLen !== 0),
      );
    onTokens(batch.ids.length);
  }
  const predictions = (ids.length / seqLen) * (seqLen - 1);
  return {
    perplexity: Math.exp(nll / predictions),
    ...(shift && { kl: kl / predictions, expertShift: shift.result() }),
    ...(pruning && {
      prunedExperts: pruning.prunedExperts / Math.max(1, pruning.experts),
      prunedPairs: pruning.prunedPairs / Math.max(1, pruning.pairs),
    }),
  };
}

export function windowBatch(ids: Int32Array, seqLen: number): Batch {
  return { ids, sequences: Array.from({ length: ids.length / seqLen }, () => ({ length: seqLen })) };
}

/** The token after each, -1 at the end of a window. */
function nextTokens(ids: Int32Array, seqLen: number): Int32Array {
  return ids.map((_, i) => ((i + 1) % seqLen === 0 ? -1 : ids[i + 1]!));
}

async function scoreBatch(
  batch: Batch,
  model: MoeModel,
  reference: MoeModel | undefined,
  shift: ShiftMeter | undefined,
  pruning: PruneMeter | undefined,
  control: Control,
): Promise<RowScores> {
  const targets = nextTokens(batch.ids, batch.sequences[0]!.length);
  const options: RunOptions = { control, activations: model.activations };
  if (pruning) {
    options.policy = pruning.watch(model.policy!);
    options.onLayer = (_, { registers: { moe } }, frame) => {
      if (moe) pruning.add(frame.read(moe.indices) as Int32Array);
    };
  }
  if (!reference) {
    return model.decoder.run(batch, options, (frame) =>
      scoreRows({ model, h: frame.tensor(model.decoder.h) }, targets, undefined, control),
    );
  }
  const chosen = new Map<number, Int32Array>();
  const recorded: RunOptions = {
    control,
    policy: reference.policy,
    activations: reference.activations,
    onRoute: (layer, { registers }, frame) =>
      chosen.set(layer, frame.read(registers.moe!.indices) as Int32Array),
  };
  options.onRoute = (layer, { registers }, frame) => {
    const original = chosen.get(layer)!;
    const other = frame.read(registers.moe!.indices) as Int32Array;
    shift!.add(layer, countShift(original, other, original.length / batch.ids.length));
  };
  return reference.decoder.run(batch, recorded, (referenceFrame) =>
    model.decoder.run(batch, options, (frame) =>
      scoreRows(
        { model, h: frame.tensor(model.decoder.h) },
        targets,
        { model: reference, h: referenceFrame.tensor(reference.decoder.h) },
        control,
      ),
    ),
  );
}
