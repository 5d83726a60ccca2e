/**
 * Multiple choice: the answer is the choice that the model finds likeliest after the context.
 *
 * DEFINITION  Context and choice are encoded separately, no special tokens added. A choice's log-likelihood is the sum over its tokens;
 *             `accuracy` divides it by the choice's length in bytes of UTF-8, `acc` does not. Ties go to the first choice.
 */
import type { Control, Sequence } from '../../types/native';
import { EacMoeError } from '../errors';
import type { MoeModel } from '../model/model';
import { finiteSum, scoreRows } from './score';

export interface ChoiceRow {
  context: string;
  choices: string[];
  /** Index of the right one. */
  answer: number;
}

export interface ChoiceResult {
  /** Share of the rows answered rightly by log-likelihood a byte. */
  accuracy: number;
  /** By plain log-likelihood. */
  acc: number;
  /** Rows. */
  n: number;
}

/** A row in tokens. */
export interface EncodedRow {
  context: number[];
  choices: number[][];
  /** Of the choices. */
  bytes: number[];
  answer: number;
}

/** Checks and encodes rows; errors count them from 1, as lines of a file. */
export function encodeRows(model: MoeModel, rows: readonly ChoiceRow[]): EncodedRow[] {
  if (!rows?.length) {
    throw new EacMoeError(
      'INVALID_ARGUMENT',
      'choices: expected at least one row { context, choices, answer }',
    );
  }
  return rows.map((row, i) => {
    checkRow(row, `choices, row ${i + 1}`);
    const encoded = {
      context: model.tokenizer.encode(row.context),
      choices: row.choices.map((choice) => model.tokenizer.encode(choice)),
      bytes: row.choices.map((choice) => Buffer.byteLength(choice)),
      answer: row.answer,
    };
    const longest = encoded.context.length + Math.max(...encoded.choices.map((c) => c.length)) - 1;
    const { maxPositions } = model.architecture;
    if (longest > maxPositions) {
      throw new EacMoeError(
        'INVALID_ARGUMENT',
        `choices, row ${i + 1}: needs ${longest} tokens; the model was made for ${maxPositions}`,
      );
    }
    return encoded;
  });
}

function checkRow(row: ChoiceRow, where: string): void {
  const text = (value: unknown) => typeof value === 'string' && value !== '';
  const { context, choices, answer } = Object(row) as Partial<ChoiceRow>;
  const fail = (what: string) => {
    throw new EacMoeError('INVALID_ARGUMENT', `${where}: ${what}`);
  };
  if (!text(context)) fail('context must be a text that is not empty');
  if (!Array.isArray(choices) || choices.length < 2 || !choices.every(text)) {
    fail('choices must be a list of two or more texts, none of them empty');
  }
  if (!Number.isInteger(answer) || answer! < 0 || answer! >= choices!.length) {
    fail(`answer must be an integer from 0 to ${choices!.length - 1}; found ${JSON.stringify(answer)}`);
  }
}

/** Tokens that a row takes to evaluate, roughly. */
export function rowTokens({ context, choices }: EncodedRow): number {
  return context.length + choices.reduce((sum, choice) => sum + choice.length, 0);
}

export async function evaluateChoices(
  model: MoeModel,
  rows: readonly EncodedRow[],
  control: Control,
  onTokens: (tokens: number) => void,
): Promise<ChoiceResult> {
  let [right, rightByte] = [0, 0];
  for (const row of rows) {
    const nll = model.policy ? await scoreWhole(model, row, control) : await scoreCached(model, row, control);
    if (smallest(nll) === row.answer) right++;
    if (smallest(nll.map((n, i) => n / row.bytes[i]!)) === row.answer) rightByte++;
    onTokens(rowTokens(row));
  }
  return { accuracy: rightByte / rows.length, acc: right / rows.length, n: rows.length };
}

function smallest(values: number[]): number {
  return values.indexOf(Math.min(...values));
}

/** The context runs once; its keys and values serve all choices. */
async function scoreCached(model: MoeModel, row: EncodedRow, control: Control): Promise<number[]> {
  const cache = model.decoder.createCache();
  const before = Int32Array.from(row.context.slice(0, -1));
  try {
    if (before.length > 0) {
      const sequences = [{ length: before.length, cache }];
      const { activations } = model;
      await model.decoder.run({ ids: before, sequences }, { activations, control }, () => undefined);
    }
    const nll: number[] = [];
    for (const choice of row.choices) {
      nll.push(await score(model, row.context.slice(-1), choice, control, cache));
      cache.truncate(before.length);
    }
    return nll;
  } finally {
    cache.dispose();
  }
}

/** Under pruning the counts are those of context and choice together, as one input: each choice is a pass of its own. */
async function scoreWhole(model: MoeModel, row: EncodedRow, control: Control): Promise<number[]> {
  const nll: number[] = [];
  for (const choice of row.choices) nll.push(await score(model, row.context, choice, control));
  return nll;
}

/** Negative log-likelihood of `choice` after `context` (and after what the cache holds). */
async function score(
  model: MoeModel,
  context: number[],
  choice: number[],
  control: Control,
  cache?: Sequence['cache'],
): Promise<number> {
  const { decoder, policy, activations } = model;
  const ids = Int32Array.from([...context, ...choice.slice(0, -1)]);
  const batch = { ids, sequences: [{ length: ids.length, cache }] };
  return decoder.run(batch, { policy, activations, control }, async (frame) => {
    const h = frame.tensor(decoder.h).rows(context.length - 1, ids.length);
    const { nll } = await scoreRows({ model, h }, Int32Array.from(choice), undefined, control);
    return finiteSum(model, nll);
  });
}
