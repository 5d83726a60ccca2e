/** How good a model is: perplexity, divergence from a reference, expert shift, multiple choice. */
import type { Activations } from '../../types/native';
import { EacMoeError } from '../errors';
import { checkActivations, type MoeModel } from '../model/model';
import { withSignal } from '../native';
import { evaluateCausal, type CausalResult } from './causal';
import { encodeRows, evaluateChoices, rowTokens, type ChoiceResult, type ChoiceRow } from './choices';
import type { ExpertShift } from './shift';
import { evaluateWindows } from './windows';

export type { CausalResult } from './causal';
export type { ChoiceResult, ChoiceRow } from './choices';
export type { ExpertShift, LayerShift, ShiftRates } from './shift';

export interface EvaluateOptions {
  /** A text, or token ids: its perplexity. */
  perplexity?: string | ArrayLike<number>;
  /** Tokens a window; default 512, at most what the model was made for. */
  seqLen?: number;
  /** Use only so many of the text's first tokens; windows are whole, so at least seqLen. */
  maxTokens?: number;
  /** Also compare with this model on the text: KL divergence, expert shift. It must be of the same shape. */
  reference?: MoeModel;
  /** Multiple-choice questions. */
  choices?: readonly ChoiceRow[];
  /** Also the perplexity of each window's second half, pruned by the counts of the first: see `Evaluation.causal`. */
  causal?: boolean;
  /**
   * How both models multiply with quantized weights: exactly (`float32`, default), so that figures speak of the weights only, or with inputs
   * rounded to int8 as `forward` and `generate` do by default.
   */
  activations?: Activations;
  onProgress?: (progress: EvaluateProgress) => void;
  signal?: AbortSignal;
}

export interface EvaluateProgress {
  stage: 'perplexity' | 'causal' | 'choices';
  /** Overall, from 0 to 1. */
  fraction: number;
  /** What is being done, for people. */
  message: string;
}

/** What was asked for; the rest is absent. */
export interface Evaluation {
  /**
   * exp of the mean negative log-likelihood over all but the first position of each window; windows do not overlap, the last, shorter
   * one is dropped, no special tokens are added.
   */
  perplexity?: number;
  /** Tokens in the windows. */
  tokens?: number;
  windows?: number;
  /** KL(reference || model) in nats, mean over the same predictions. */
  kl?: number;
  /** Against the reference's routers, over all tokens; before pruning. */
  expertShift?: ExpertShift;
  /** Share of the (sequence, layer, expert) that a pruned model's policy pruned in the text. */
  prunedExperts?: number;
  /** Share of the token-expert pairs that were not computed. */
  prunedPairs?: number;
  /** A pruned model's perplexity without looking ahead: counts from the first half of each window, perplexity of the second. */
  causal?: CausalResult;
  choices?: ChoiceResult;
  /** Size of the weight files. */
  bytes: number;
}

/**
 * Evaluates a model; one that `pruneExperts` made is evaluated as it prunes.
 *
 * @throws EacMoeError INVALID_ARGUMENT naming the option, NON_FINITE, ABORTED
 */
export async function evaluate(model: MoeModel, options: EvaluateOptions): Promise<Evaluation> {
  const activations = checkActivations(options.activations ?? 'float32');
  const evaluated = model.withActivations(activations);
  const reference = options.reference?.withActivations(activations);
  try {
    return await evaluateWith(evaluated, { ...options, reference });
  } finally {
    evaluated.dispose();
    reference?.dispose();
  }
}

async function evaluateWith(model: MoeModel, options: EvaluateOptions): Promise<Evaluation> {
  const { perplexity: text, reference, choices, causal = false, onProgress, signal } = options;
  if (text === undefined && choices === undefined) {
    throw new EacMoeError(
      'INVALID_ARGUMENT',
      'nothing to evaluate: give perplexity (a text), choices, or both',
    );
  }
  if (text === undefined && (reference || causal)) {
    const name = reference ? 'reference' : 'causal';
    throw new EacMoeError('INVALID_ARGUMENT', `${name} needs a text to compare on: give perplexity`);
  }
  if (reference) checkShape(model, reference);
  const seqLen = checkSeqLen(model, options);
  const ids = text === undefined ? new Int32Array(0) : await windowIds(model, text, seqLen, options);
  const rows = choices ? encodeRows(model, choices) : [];

  const work = rows.reduce(
    (sum, row) => sum + rowTokens(row),
    ids.length * (1 + (reference ? 1 : 0) + (causal ? 1 : 0)),
  );
  let done = 0;
  const meter =
    (stage: EvaluateProgress['stage'], message: string, weight = 1) =>
    (tokens: number) => {
      done += tokens * weight;
      onProgress?.({ stage, fraction: Math.min(1, done / work), message });
    };
  return withSignal(signal, async (control) => {
    const result: Evaluation = { bytes: model.checkpoint.byteLength };
    if (text !== undefined) {
      const onTokens = meter('perplexity', 'perplexity', reference ? 2 : 1);
      Object.assign(result, await evaluateWindows(model, reference, ids, seqLen, control, onTokens));
      result.tokens = ids.length;
      result.windows = ids.length / seqLen;
    }
    if (causal) {
      const onTokens = meter('causal', 'perplexity of second halves');
      result.causal = await evaluateCausal(model, ids, seqLen, control, onTokens);
    }
    if (choices)
      result.choices = await evaluateChoices(model, rows, control, meter('choices', 'multiple choice'));
    return result;
  });
}

/** Default length of a window. */
const SEQ_LEN = 512;

function checkSeqLen({ architecture }: MoeModel, { seqLen, causal }: EvaluateOptions): number {
  const most = architecture.maxPositions;
  const least = causal ? 4 : 2;
  const value = seqLen ?? Math.min(SEQ_LEN, most);
  if (!Number.isSafeInteger(value) || value < least || value > most) {
    throw new EacMoeError(
      'INVALID_ARGUMENT',
      `seqLen must be an integer from ${least} to ${most}, the longest sequence this model was made for; found ${value}`,
    );
  }
  return value;
}

/** The text's tokens, cut to whole windows. */
async function windowIds(
  model: MoeModel,
  text: string | ArrayLike<number>,
  seqLen: number,
  { maxTokens, signal }: EvaluateOptions,
): Promise<Int32Array> {
  if (maxTokens !== undefined && (!Number.isSafeInteger(maxTokens) || maxTokens < seqLen)) {
    throw new EacMoeError(
      'INVALID_ARGUMENT',
      `maxTokens must be an integer of at least seqLen, ${seqLen}; found ${maxTokens}`,
    );
  }
  const all = typeof text === 'string' ? await model.tokenizer.encodeAsync(text, { signal }) : text;
  if (all.length < seqLen) {
    throw new EacMoeError(
      'INVALID_ARGUMENT',
      `perplexity: the text has ${all.length} tokens, fewer than one window of seqLen ${seqLen}; give a longer text or a smaller seqLen`,
    );
  }
  const windows = Math.floor(Math.min(all.length, maxTokens ?? Infinity) / seqLen);
  const { vocabSize } = model.architecture;
  return Int32Array.from({ length: windows * seqLen }, (_, i) => {
    const id = all[i]!;
    if (Number.isInteger(id) && id >= 0 && id < vocabSize) return id;
    const what = `perplexity[${i}] is ${id}; expected a token id, an integer from 0 to ${vocabSize - 1}`;
    throw new EacMoeError('INVALID_ARGUMENT', what);
  });
}

/** KL needs the same vocabulary, expert shift the same routers. */
function checkShape(model: MoeModel, reference: MoeModel): void {
  const shape = ({ architecture: a }: MoeModel) => {
    const routers = a.layers.map(({ feedForward: f }) =>
      f.kind === 'moe' ? [f.router.out, f.router.topK] : 0,
    );
    return JSON.stringify([a.vocabSize, routers]);
  };
  if (shape(model) === shape(reference)) return;
  throw new EacMoeError(
    'INVALID_ARGUMENT',
    `reference: ${reference.path} differs from ${model.path} in vocabulary, layers or experts; expected the model it was made from`,
  );
}
