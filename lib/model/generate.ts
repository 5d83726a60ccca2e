/** Text generation: prefill, then one token a step through the key-value cache. */
import type { Activations, KvCache } from '../../types/native';
import type { Architecture } from '../architecture/types';
import { EacMoeError } from '../errors';
import { withSignal } from '../native';
import type { Decoder } from './decoder';
import type { ExpertPolicy } from './policy';
import { seededRandom } from './random';
import type { ChatMessage, Tokenizer } from './tokenizer';

/** What generation needs of a model. */
export interface TextModel {
  readonly architecture: Architecture;
  readonly tokenizer: Tokenizer;
  readonly decoder: Decoder;
  readonly policy: ExpertPolicy | undefined;
  readonly activations: Activations;
  createCache(): KvCache;
}

export interface GenerateOptions {
  /** Most tokens to generate; default 256. */
  maxNewTokens?: number;
  /** 0 (default) always takes the likeliest token. */
  temperature?: number;
  /** Sample among the k likeliest tokens; 0 (default) = all. */
  topK?: number;
  /** Sample among the likeliest tokens that together reach this probability; 1 (default) = all. */
  topP?: number;
  /** Default 0. */
  seed?: number;
  /** Texts that end the generation; they are not part of the output. */
  stop?: string | string[];
  /** Treat the prompt as a user's message and put it through the model's chat template. */
  chat?: boolean;
  /** Go on after an end-of-text token; default false. */
  ignoreEos?: boolean;
  /** Prompt tokens a prefill pass takes at most; default 2048. Pruning counts per pass. */
  prefillChunk?: number;
  signal?: AbortSignal;
}

export interface GenerateResult {
  /** `eos`: an end-of-text token; `stop`: a stop text; `length`: maxNewTokens reached. */
  reason: 'eos' | 'stop' | 'length';
  promptTokens: number;
  newTokens: number;
  ids: number[];
  prefillSeconds: number;
  decodeSeconds: number;
}

type Checked = Required<Omit<GenerateOptions, 'signal' | 'stop'>> & { stop: string[]; signal?: AbortSignal };

export async function* generate(
  model: TextModel,
  prompt: string | ArrayLike<number> | ChatMessage[],
  options: GenerateOptions,
): AsyncGenerator<string, GenerateResult, void> {
  const o = check(options);
  const promptIds = await encodePrompt(model, prompt, o);
  const stream = model.tokenizer.stream(promptIds);
  const holder = new StopText(o.stop);
  const cache = model.createCache();
  const result: GenerateResult = {
    reason: 'length',
    promptTokens: promptIds.length,
    newTokens: 0,
    ids: [],
    prefillSeconds: 0,
    decodeSeconds: 0,
  };
  const next = stepper(model, cache, o);
  try {
    let begun = performance.now();
    let id = await prefill(next, promptIds, o.prefillChunk);
    result.prefillSeconds = (performance.now() - begun) / 1000;
    begun = performance.now();
    while (result.newTokens < o.maxNewTokens) {
      if (!o.ignoreEos && model.tokenizer.eosIds.includes(id)) {
        result.reason = 'eos';
        break;
      }
      result.ids.push(id);
      result.newTokens++;
      const piece = holder.push(stream.push(id));
      result.decodeSeconds = (performance.now() - begun) / 1000;
      if (piece) yield piece;
      if (holder.stopped) {
        result.reason = 'stop';
        return result;
      }
      if (result.newTokens < o.maxNewTokens) id = await next([id]);
    }
    result.decodeSeconds = (performance.now() - begun) / 1000;
    const rest = holder.push(stream.end()) + holder.end();
    if (rest) yield rest;
    return result;
  } finally {
    cache.dispose();
  }
}

/** Feeds tokens to the model and samples the next one. */
function stepper(model: TextModel, cache: KvCache, o: Checked): (ids: number[]) => Promise<number> {
  const random = seededRandom(o.seed);
  const { temperature, topK, topP } = o;
  return async (ids) =>
    withSignal(o.signal, async (control) => {
      const batch = { ids: Int32Array.from(ids), sequences: [{ length: ids.length, cache }] };
      const sampling = { temperature, topK, topP, uniform: Float64Array.of(random()) };
      const [id] = await model.decoder.step(batch, sampling, {
        policy: model.policy,
        activations: model.activations,
        control,
      });
      return id!;
    });
}

async function prefill(
  next: (ids: number[]) => Promise<number>,
  ids: number[],
  chunk: number,
): Promise<number> {
  let id = 0;
  for (let i = 0; i < ids.length; i += chunk) id = await next(ids.slice(i, i + chunk));
  return id;
}

async function encodePrompt(
  model: TextModel,
  prompt: string | ArrayLike<number> | ChatMessage[],
  o: Checked,
): Promise<number[]> {
  let ids: number[];
  if (typeof prompt === 'string') {
    const text = o.chat
      ? model.tokenizer.applyChatTemplate([{ role: 'user', content: prompt }], { addGenerationPrompt: true })
      : prompt;
    ids = await model.tokenizer.encodeAsync(text, { addSpecialTokens: !o.chat, signal: o.signal });
  } else if (isConversation(prompt)) {
    const text = model.tokenizer.applyChatTemplate(prompt, { addGenerationPrompt: true });
    ids = await model.tokenizer.encodeAsync(text, { signal: o.signal });
  } else ids = Array.from(prompt);
  const { vocabSize } = model.architecture;
  if (ids.length === 0) {
    const { bosId } = model.tokenizer;
    if (bosId === undefined) throw new EacMoeError('INVALID_ARGUMENT', 'prompt: expected at least one token');
    ids = [bosId];
  }
  for (const id of ids) {
    if (!Number.isInteger(id) || id < 0 || id >= vocabSize) {
      throw new EacMoeError(
        'INVALID_ARGUMENT',
        `prompt: token id ${id} is not an integer from 0 to ${vocabSize - 1}`,
      );
    }
  }
  return ids;
}

function isConversation(prompt: ArrayLike<number> | ChatMessage[]): prompt is ChatMessage[] {
  return typeof prompt[0] === 'object';
}

/** Holds back text that may be the beginning of a stop text. */
class StopText {
  stopped = false;
  readonly #stops: string[];
  #held = '';

  constructor(stops: string[]) {
    this.#stops = stops;
  }

  push(piece: string): string {
    this.#held += piece;
    const found = this.#stops.map((s) => this.#held.indexOf(s)).filter((i) => i >= 0);
    if (found.length > 0) {
      this.stopped = true;
      const text = this.#held.slice(0, Math.min(...found));
      this.#held = '';
      return text;
    }
    let keep = 0;
    for (const stop of this.#stops) {
      for (let n = Math.min(stop.length - 1, this.#held.length); n > keep; n--) {
        if (this.#held.endsWith(stop.slice(0, n))) keep = n;
      }
    }
    const text = this.#held.slice(0, this.#held.length - keep);
    this.#held = this.#held.slice(this.#held.length - keep);
    return text;
  }

  end(): string {
    const text = this.#held;
    this.#held = '';
    return text;
  }
}

function check(options: GenerateOptions): Checked {
  const number = (
    name: keyof GenerateOptions,
    fallback: number,
    ok: (n: number) => boolean,
    what: string,
  ) => {
    const value = options[name] ?? fallback;
    if (typeof value !== 'number' || !ok(value)) {
      throw new EacMoeError('INVALID_ARGUMENT', `${name} must be ${what}; found ${JSON.stringify(value)}`);
    }
    return value;
  };
  const whole = (least: number) => (n: number) => Number.isSafeInteger(n) && n >= least;
  const stop = typeof options.stop === 'string' ? [options.stop] : (options.stop ?? []);
  if (stop.some((s) => typeof s !== 'string' || s === '')) {
    throw new EacMoeError('INVALID_ARGUMENT', 'stop must be a text, or several, none of them empty');
  }
  return {
    maxNewTokens: number('maxNewTokens', 256, whole(1), 'a positive integer'),
    temperature: number('temperature', 0, (n) => n >= 0 && n < Infinity, 'a number >= 0'),
    topK: number('topK', 0, whole(0), 'an integer >= 0'),
    topP: number('topP', 1, (n) => n > 0 && n <= 1, 'in (0, 1]'),
    seed: number('seed', 0, whole(0), 'an integer >= 0'),
    prefillChunk: number('prefillChunk', 2048, whole(1), 'a positive integer'),
    stop,
    chat: options.chat ?? false,
    ignoreEos: options.ignoreEos ?? false,
    signal: options.signal,
  };
}
