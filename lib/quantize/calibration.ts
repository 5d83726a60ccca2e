/** Calibration sequences: from texts, from token ids, or sampled from the model itself. */
import { EacMoeError } from '../errors';
import { cacheWidths } from '../model/attention';
import type { MoeModel } from '../model/model';
import { seededRandom } from '../model/random';
import { withSignal } from '../native';
import type { CalibrationSource } from './options';

export interface CalibrationRequest {
  source: CalibrationSource;
  samples: number;
  seqLen: number;
  seed: number;
  signal?: AbortSignal;
  onProgress?: (fraction: number) => void;
}

/** Key-value memory that sampling may take at a time. */
const SAMPLING_BYTES = 2 ** 30;

/** At most `samples` sequences of at most `seqLen` token ids. */
export async function calibrationSequences(
  model: MoeModel,
  request: CalibrationRequest,
): Promise<Int32Array[]> {
  const { source } = request;
  return source === 'self' ? sampleSelf(model, request) : givenSequences(model, { ...request, source });
}

/** What texts and token ids need of a model: no weights. */
export type Vocabulary = Pick<MoeModel, 'architecture' | 'tokenizer'>;

/** `calibrationSequences` of texts or token ids. */
export async function givenSequences(
  model: Vocabulary,
  request: Omit<CalibrationRequest, 'source'> & { source: Exclude<CalibrationSource, 'self'> },
): Promise<Int32Array[]> {
  const { source, samples, seqLen, seed } = request;
  if (!Array.isArray(source)) {
    throw new EacMoeError(
      'CALIBRATION',
      `calibration must be a list of texts, a list of token arrays, or 'self'`,
    );
  }
  const all = source.every((s) => typeof s === 'string')
    ? windows(await joinTexts(model, source, request.signal), seqLen)
    : source.flatMap((ids, i) => cut(checkTokens(ids, i, model.architecture.vocabSize), seqLen));
  if (all.length === 0) {
    throw new EacMoeError(
      'CALIBRATION',
      "calibration: the texts are empty; give some text, or calibration: 'self'",
    );
  }
  return spread(all, samples, seed);
}

/** All texts as one stream of tokens, an end-of-text token after each. */
async function joinTexts(model: Vocabulary, texts: string[], signal?: AbortSignal): Promise<Int32Array> {
  const { tokenizer } = model;
  const end = tokenizer.eosIds[0];
  const ids: number[] = [];
  for (const text of texts) {
    if (text.trim() === '') continue;
    for (const id of await tokenizer.encodeAsync(text, { signal })) ids.push(id);
    if (end !== undefined) ids.push(end);
  }
  return Int32Array.from(ids);
}

function checkTokens(ids: unknown, index: number, vocabSize: number): Int32Array {
  const where = `calibration[${index}]`;
  if (!Array.isArray(ids) && !ArrayBuffer.isView(ids)) {
    throw new EacMoeError('CALIBRATION', `${where}: expected texts only, or token arrays only`);
  }
  return Int32Array.from(ids as ArrayLike<number>, (id) => {
    if (Number.isInteger(id) && id >= 0 && id < vocabSize) return id;
    throw new EacMoeError('CALIBRATION', `${where}: ${id} is not a token id (0 to ${vocabSize - 1})`);
  });
}

/** Whole windows of the stream; all of it when it is shorter than one. */
function windows(ids: Int32Array, seqLen: number): Int32Array[] {
  const whole = cut(ids, seqLen).filter((w) => w.length === seqLen);
  return whole.length > 0 || ids.length < 2 ? whole : [ids];
}

function cut(ids: Int32Array, seqLen: number): Int32Array[] {
  const pieces: Int32Array[] = [];
  for (let i = 0; i < ids.length; i += seqLen) pieces.push(ids.slice(i, i + seqLen));
  return pieces;
}

/** `count` of them in order, one from each of `count` equal stretches: evenly over all tokens, chosen by the seed. */
function spread<T>(items: T[], count: number, seed: number): T[] {
  if (items.length <= count) return items;
  const random = seededRandom(seed);
  return Array.from({ length: count }, (_, i) => {
    const from = Math.floor((i * items.length) / count);
    const to = Math.floor(((i + 1) * items.length) / count);
    return items[from + Math.floor(random() * (to - from))]!;
  });
}

/** Ancestral sampling at temperature 1 from the begin-of-text token (or a random one), many sequences in step. */
async function sampleSelf(model: MoeModel, request: CalibrationRequest): Promise<Int32Array[]> {
  const { samples, seqLen, seed, signal, onProgress } = request;
  const { vocabSize, layers } = model.architecture;
  const random = seededRandom(seed);
  const start = startToken(model);
  const bytes =
    seqLen *
    layers.reduce((sum, { attention }) => {
      const { keyWidth, valueWidth } = cacheWidths(attention);
      return sum + 4 * (keyWidth + valueWidth);
    }, 0);
  const batchSize = Math.max(1, Math.min(samples, 64, Math.floor(SAMPLING_BYTES / bytes)));
  const result: Int32Array[] = [];
  while (result.length < samples) {
    const n = Math.min(batchSize, samples - result.length);
    const rows = Array.from({ length: n }, () => new Int32Array(seqLen));
    const caches = rows.map(() => model.createCache());
    try {
      for (const row of rows) row[0] = start ?? Math.floor(random() * vocabSize);
      for (let t = 1; t < seqLen; t++) {
        const batch = {
          ids: Int32Array.from(rows, (row) => row[t - 1]!),
          sequences: caches.map((cache) => ({ length: 1, cache })),
        };
        const uniform = Float64Array.from(rows, random);
        const ids = await withSignal(signal, (control) =>
          model.decoder.step(batch, { temperature: 1, topK: 0, topP: 1, uniform }, { control }),
        );
        rows.forEach((row, i) => (row[t] = ids[i]!));
        if (t % 16 === 0) onProgress?.((result.length + (n * t) / seqLen) / samples);
      }
    } finally {
      for (const cache of caches) cache.dispose();
    }
    result.push(...rows);
  }
  return result;
}

/** Without a tokenizer the begin-of-text id comes from the configuration, or is drawn at random. */
function startToken(model: MoeModel): number | undefined {
  try {
    return model.tokenizer.bosId ?? model.tokenizer.eosIds[0];
  } catch {
    const id = model.checkpoint.config.value('bos_token_id');
    return typeof id === 'number' ? id : undefined;
  }
}
