/**
 * Text to token ids and back, through @huggingface/tokenizers (tokenizer.json), and chat templates through @huggingface/jinja.
 */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { readBytes, readJsonObject } from '../checkpoint/files';
import { EacMoeError } from '../errors';

/** What of @huggingface/tokenizers is used here; the package is loaded on first use. */
interface Backend {
  encode(text: string, options: { add_special_tokens: boolean }): { ids: number[] };
  decode(
    ids: number[],
    options: { skip_special_tokens: boolean; clean_up_tokenization_spaces: boolean },
  ): string;
  token_to_id(token: string): number | undefined;
  get_vocab(withAddedTokens: boolean): Map<string, number>;
}

export interface EncodeOptions {
  /** Adds what tokenizer.json's post-processor adds (e.g. a begin-of-text token); default false. */
  addSpecialTokens?: boolean;
}

export interface DecodeOptions {
  /** Leaves out tokens such as end-of-text; default false. */
  skipSpecialTokens?: boolean;
}

export interface ChatMessage {
  role: string;
  content: string;
  [field: string]: unknown;
}

/** Characters encoded at a time by encodeAsync: some 15 ms. */
const SLICE = 16384;
/** Tokens that may wait for the rest of a character; UTF-8 needs 4 bytes at most, the rest of them is damage. */
const MAX_PENDING = 16;
const REPLACEMENT = '\uFFFD';

/**
 * Split patterns under which a letter before white space always ends a piece, and nothing later looks back across it: GPT-2's (the
 * ByteLevel pre-tokenizer's own), cl100k's, Llama 3's and Qwen2's.
 */
const SLICEABLE_PATTERNS: ReadonlySet<string> = new Set([
  "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
]);

interface Component {
  type?: string;
  add_prefix_space?: boolean;
  pattern?: { Regex?: string };
  behavior?: string;
  invert?: boolean;
  pretokenizers?: Component[];
}

function fail(message: string, cause?: unknown): never {
  throw new EacMoeError('TOKENIZER', message, { cause });
}

/** True when a text may be cut between a letter and white space without changing its ids. */
export function canSlice(tokenizerJson: Record<string, unknown>): boolean {
  const normalizer = tokenizerJson.normalizer as Component | null | undefined;
  // Spaces and newlines compose with nothing before them, so NFC works on either side of the cut alone.
  if (normalizer && normalizer.type !== 'NFC') return false;
  const added = (tokenizerJson.added_tokens ?? []) as {
    content?: string;
    lstrip?: boolean;
    rstrip?: boolean;
    single_word?: boolean;
  }[];
  if (added.some((t) => t.lstrip || t.rstrip || t.single_word || t.content?.includes('\n'))) return false;
  const first = tokenizerJson.pre_tokenizer as Component | null | undefined;
  const parts = first?.type === 'Sequence' ? (first.pretokenizers ?? []) : first ? [first] : [];
  const splits = parts.filter((p) => p.type === 'Split');
  const byteLevel = parts.filter((p) => p.type === 'ByteLevel') as (Component & { use_regex?: boolean })[];
  if (
    splits.length + byteLevel.length !== parts.length ||
    byteLevel.length !== 1 ||
    byteLevel[0]!.add_prefix_space
  )
    return false;
  const known = (p: Component): boolean =>
    p.behavior === 'Isolated' && !p.invert && SLICEABLE_PATTERNS.has(p.pattern?.Regex ?? '');
  // Without a split, pieces come from ByteLevel's own pattern.
  return splits.length === 0 ? byteLevel[0]!.use_regex !== false : splits.every(known);
}

/**
 * The first place at or after `from` where a letter is followed by a space or newline, or the text's end. Every pattern above ends a
 * piece after its last letter, and its look-aheads concern white space only, which then lies wholly behind the cut.
 */
function cutAfter(text: string, from: number): number {
  const boundary = /(\p{L})(?=[ \n])/gu;
  boundary.lastIndex = from;
  for (let found = boundary.exec(text); found; found = boundary.exec(text)) {
    // A letter that NFC takes apart could end in a mark, which is no letter.
    if (found[1]!.normalize('NFC') === found[1]) return boundary.lastIndex;
  }
  return text.length;
}

function tokenIds(value: unknown): number[] | undefined {
  const list = Array.isArray(value) ? value : [value];
  return list.length > 0 && list.every((id) => Number.isSafeInteger(id) && id >= 0)
    ? (list as number[])
    : undefined;
}

/** A special token of tokenizer_config.json: a string, or an object with `content`. */
function tokenText(value: unknown): string | undefined {
  if (typeof value === 'string') return value;
  const content = (value as { content?: unknown } | null | undefined)?.content;
  return typeof content === 'string' ? content : undefined;
}

function optionalJson(path: string): Record<string, unknown> {
  return existsSync(path) ? readJsonObject(path) : {};
}

function chatTemplate(dir: string, config: Record<string, unknown>): string | undefined {
  const file = join(dir, 'chat_template.jinja');
  if (existsSync(file)) return readBytes(file).toString('utf8');
  const value = optionalJson(join(dir, 'chat_template.json')).chat_template ?? config.chat_template;
  if (typeof value === 'string') return value;
  if (!Array.isArray(value)) return undefined;
  const named = value as { name?: string; template?: string }[];
  return (named.find((t) => t.name === 'default') ?? named[0])?.template;
}

function loadBackend(dir: string, json: Record<string, unknown>, config: Record<string, unknown>): Backend {
  const path = join(dir, 'tokenizer.json');
  try {
    // eslint-disable-next-line @typescript-eslint/no-require-imports
    const { Tokenizer: Implementation } = require('@huggingface/tokenizers') as {
      Tokenizer: new (j: object, c: object) => Backend;
    };
    return new Implementation(json, config);
  } catch (cause) {
    return fail(`${path}: cannot be used: ${(cause as Error).message}`, cause);
  }
}

/** A model's tokenizer. */
export class Tokenizer {
  readonly dir: string;
  /** Tokens known, with the added ones. */
  readonly vocabSize: number;
  /** Begin of text, where the model has such a token. */
  readonly bosId: number | undefined;
  /** Tokens that end a text; generation stops at any of them. */
  readonly eosIds: readonly number[];
  readonly #backend: Backend;
  readonly #config: Record<string, unknown>;
  readonly #template: string | undefined;
  readonly #sliceable: boolean;

  private constructor(dir: string) {
    const path = join(dir, 'tokenizer.json');
    if (!existsSync(path)) {
      const other = ['tokenizer.model', 'vocab.json'].find((name) => existsSync(join(dir, name)));
      const hint = other
        ? `; ${other} alone is not enough: save the tokenizer with transformers' AutoTokenizer, which writes tokenizer.json`
        : '';
      fail(`${path}: no such file; the model has no tokenizer that can be read${hint}`);
    }
    let json: Record<string, unknown>;
    try {
      json = readJsonObject(path);
      this.#config = optionalJson(join(dir, 'tokenizer_config.json'));
      this.#template = chatTemplate(dir, this.#config);
    } catch (cause) {
      fail((cause as Error).message, cause);
    }
    this.dir = dir;
    this.#backend = loadBackend(dir, json, this.#config);
    this.#sliceable = canSlice(json);
    this.vocabSize = this.#backend.get_vocab(true).size;
    const sources = ['generation_config.json', 'config.json'].map((name) => optionalJson(join(dir, name)));
    const idsOf = (key: 'bos' | 'eos'): number[] => {
      for (const source of sources) {
        const ids = tokenIds(source[`${key}_token_id`]);
        if (ids) return ids;
      }
      const text = tokenText(this.#config[`${key}_token`]);
      const id = text === undefined ? undefined : this.#backend.token_to_id(text);
      return id === undefined ? [] : [id];
    };
    this.bosId = idsOf('bos')[0];
    this.eosIds = idsOf('eos');
  }

  /** Loads the tokenizer of a model directory. Fails with code TOKENIZER, naming the file. */
  static load(dir: string): Tokenizer {
    return new Tokenizer(dir);
  }

  /** The id of a token by its text. */
  tokenId(token: string): number | undefined {
    return this.#backend.token_to_id(token);
  }

  encode(text: string, options: EncodeOptions = {}): number[] {
    if (text === '')
      return options.addSpecialTokens ? [...this.#backend.encode('', { add_special_tokens: true }).ids] : [];
    return this.#backend.encode(text, { add_special_tokens: options.addSpecialTokens ?? false }).ids;
  }

  /**
   * The same ids as `encode`, without keeping the event loop busy for long: a long text is encoded in slices cut between a letter and
   * a space or newline, where the tokenizer's rules prove that this changes nothing (byte-level BPE with a known pattern). With other
   * tokenizers (SentencePiece-like ones) the text is encoded at once.
   */
  async encodeAsync(text: string, options: EncodeOptions & { signal?: AbortSignal } = {}): Promise<number[]> {
    const { signal, ...rest } = options;
    const aborted = (): void => {
      if (signal?.aborted)
        throw new EacMoeError('ABORTED', 'the operation was aborted', { cause: signal.reason });
    };
    aborted();
    if (!this.#sliceable || rest.addSpecialTokens || text.length <= SLICE) return this.encode(text, rest);
    const ids: number[] = [];
    for (let begin = 0; begin < text.length;) {
      const end = cutAfter(text, begin + SLICE);
      for (const id of this.encode(text.slice(begin, end))) ids.push(id);
      begin = end;
      await nextTurn();
      aborted();
    }
    return ids;
  }

  decode(ids: ArrayLike<number>, options: DecodeOptions = {}): string {
    if (ids.length === 0) return '';
    return this.#backend.decode(Array.from(ids), {
      skip_special_tokens: options.skipSpecialTokens ?? false,
      // "Clean-up" would join words and punctuation that the text had apart.
      clean_up_tokenization_spaces: false,
    });
  }

  /** A decoder for tokens that come one at a time. `context`: the tokens before them, for tokenizers whose spaces depend on these. */
  stream(context: ArrayLike<number> = [], options: DecodeOptions = {}): TokenStream {
    return new TokenStream((ids) => this.decode(ids, options), Array.from(context).slice(-8));
  }

  /** Whether the model has a chat template. */
  get hasChatTemplate(): boolean {
    return this.#template !== undefined;
  }

  /** The prompt text for a conversation, by the model's own template. */
  applyChatTemplate(
    messages: readonly ChatMessage[],
    options: { addGenerationPrompt?: boolean } = {},
  ): string {
    if (this.#template === undefined) {
      fail(
        `${this.dir}: has no chat template (neither chat_template.jinja nor chat_template in tokenizer_config.json)`,
      );
    }
    const special = Object.entries(this.#config).flatMap(([key, value]) => {
      const text = key.endsWith('_token') ? tokenText(value) : undefined;
      return text === undefined ? [] : [[key, text] as const];
    });
    try {
      // eslint-disable-next-line @typescript-eslint/no-require-imports
      const { Template } = require('@huggingface/jinja') as typeof import('@huggingface/jinja', {
        with: { 'resolution-mode': 'import' },
      });
      return new Template(this.#template).render({
        ...Object.fromEntries(special),
        messages,
        add_generation_prompt: options.addGenerationPrompt ?? false,
      });
    } catch (cause) {
      return fail(`${this.dir}: the chat template cannot be applied: ${(cause as Error).message}`, cause);
    }
  }
}

/** Pieces of text from tokens; holds back what may yet become a character (the bytes of one may be spread over several tokens). */
export class TokenStream {
  readonly #decode: (ids: number[]) => string;
  /** Tokens already given out that the next ones are decoded with, then the waiting ones. */
  #ids: number[];
  #done: number;

  constructor(decode: (ids: number[]) => string, context: number[] = []) {
    this.#decode = decode;
    this.#ids = [...context];
    this.#done = context.length;
  }

  #take(force: boolean): string {
    const before = this.#decode(this.#ids.slice(0, this.#done));
    const all = this.#decode(this.#ids);
    const waiting = this.#ids.length - this.#done;
    if (!force && all.endsWith(REPLACEMENT) && waiting < MAX_PENDING) return '';
    this.#ids = this.#ids.slice(this.#done);
    this.#done = this.#ids.length;
    return all.slice(before.length);
  }

  /** The text that this token completes; often one piece, '' while a character is incomplete. */
  push(id: number): string {
    this.#ids.push(id);
    return this.#take(false);
  }

  /** What was held back; a character never completed gives U+FFFD. */
  end(): string {
    return this.#done < this.#ids.length ? this.#take(true) : '';
  }
}
