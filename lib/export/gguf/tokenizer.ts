/**
 * The tokenizer of a model directory as GGUF metadata.
 *
 * Byte-level BPE becomes llama.cpp's 'gpt2' with the kind of its split pattern (`pre`), BPE with byte fallback (SentencePiece-like) its
 * 'llama', where merges become scores: the earlier a merge, the higher its piece.
 * Source   llama.cpp: gguf-py/gguf/vocab.py, src/llama-vocab.cpp (patterns by `pre`)
 */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { readBytes, readJsonObject } from '../../checkpoint/files';
import { EacMoeError } from '../../errors';
import { Tokenizer } from '../../model/tokenizer';
import type { GgufValue } from './writer';

const NORMAL = 1;
const CONTROL = 3;
const USER_DEFINED = 4;
const UNUSED = 5;
const BYTE = 6;

const GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
const LLAMA3 =
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const QWEN2 = LLAMA3.replace('{1,3}', '');
const GPT4O =
  "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const DEEPSEEK_V3 =
  '\\p{N}{1,3}\n[一-龥぀-ゟ゠-ヿ]+\n[!"#$%&\'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+';

/** Split patterns, several in turn joined by line feeds, and what llama.cpp calls them. */
const PRE: ReadonlyMap<string, string> = new Map([
  [GPT2, 'gpt-2'],
  [LLAMA3, 'llama-bpe'],
  [QWEN2, 'qwen2'],
  [GPT4O, 'gpt-4o'],
  [DEEPSEEK_V3, 'deepseek-v3'],
]);

interface Component {
  type?: string;
  use_regex?: boolean;
  pattern?: { Regex?: string; String?: string };
  individual_digits?: boolean;
  pretokenizers?: Component[];
}

interface TokenizerJson {
  model?: {
    type?: string;
    vocab?: Record<string, number>;
    merges?: (string | [string, string])[];
    byte_fallback?: boolean;
  };
  added_tokens?: { id: number; content: string; special?: boolean }[];
  pre_tokenizer?: Component | null;
  normalizer?: unknown;
}

function fail(path: string, what: string): never {
  throw new EacMoeError('TOKENIZER', `${path}: ${what}, which export to gguf does not know`);
}

/** The `pre` of a byte-level tokenizer. */
function preTokenizer(path: string, json: TokenizerJson): string {
  const first = json.pre_tokenizer ?? {};
  const parts = first.type === 'Sequence' ? (first.pretokenizers ?? []) : [first];
  const patterns = parts.flatMap((p) => {
    if (p.type === 'Split' && p.pattern?.Regex !== undefined) return [p.pattern.Regex];
    if (p.type === 'Digits') return [p.individual_digits ? '\\p{N}' : '\\p{N}+'];
    if (p.type === 'ByteLevel') return p.use_regex === false ? [] : [GPT2];
    return fail(path, `pre_tokenizer ${JSON.stringify(p).slice(0, 80)}`);
  });
  const joined = patterns.join('\n');
  if (joined === `\\p{N}\n${GPT2}`) return 'starcoder';
  return PRE.get(joined) ?? fail(path, `split pattern ${JSON.stringify(joined).slice(0, 120)}`);
}

/** '▁' of SentencePiece stays, a space within a byte-level piece cannot be: merges are joined by one. */
function mergeText(merge: string | [string, string]): string {
  return typeof merge === 'string' ? merge : merge.map((part) => part.replaceAll(' ', 'Ġ')).join(' ');
}

function pieces(
  json: TokenizerJson,
  vocabSize: number,
  byteFallback: boolean,
): { tokens: string[]; types: number[] } {
  const tokens = Array.from({ length: vocabSize }, (_, id) => `[PAD${id}]`);
  const types = tokens.map(() => UNUSED);
  for (const [text, id] of Object.entries(json.model!.vocab ?? {})) {
    if (id >= vocabSize) continue;
    tokens[id] = text;
    types[id] = byteFallback && /^<0x[0-9A-F]{2}>$/.test(text) ? BYTE : NORMAL;
  }
  for (const { id, content, special } of json.added_tokens ?? []) {
    if (id >= vocabSize) continue;
    tokens[id] = content;
    types[id] = special ? CONTROL : USER_DEFINED;
  }
  return { tokens, types };
}

/** Scores under which llama.cpp joins in the order of the merges: it takes the pair whose joined piece has the highest. */
function scores(json: TokenizerJson, tokens: string[]): number[] {
  const rank = new Map<string, number>();
  for (const [i, merge] of (json.model!.merges ?? []).entries()) {
    const text = (typeof merge === 'string' ? merge.split(' ') : merge).join('');
    if (!rank.has(text)) rank.set(text, i);
  }
  return tokens.map((text) => -(rank.get(text) ?? (text.length > 1 ? 1e6 : 0)) - 1);
}

/** What the tokenizer puts before a text. */
function addsBos(tokenizer: Tokenizer): boolean {
  return (
    tokenizer.bosId !== undefined && tokenizer.encode('a', { addSpecialTokens: true })[0] === tokenizer.bosId
  );
}

function chatTemplate(dir: string): Record<string, GgufValue> {
  const file = join(dir, 'chat_template.jinja');
  if (existsSync(file)) return { 'tokenizer.chat_template': readBytes(file).toString('utf8') };
  const config = join(dir, 'tokenizer_config.json');
  const template = existsSync(config) ? readJsonObject(config).chat_template : undefined;
  return typeof template === 'string' ? { 'tokenizer.chat_template': template } : {};
}

/** @throws EacMoeError TOKENIZER where there is no tokenizer.json, and for kinds that llama.cpp has no name for */
export function tokenizerMetadata(dir: string, vocabSize: number): Record<string, GgufValue> {
  const path = join(dir, 'tokenizer.json');
  const tokenizer = Tokenizer.load(dir);
  const json = readJsonObject(path) as TokenizerJson;
  if (json.model?.type !== 'BPE') fail(path, `model type ${String(json.model?.type)}`);
  const byteFallback = json.model!.byte_fallback === true;
  const { tokens, types } = pieces(json, vocabSize, byteFallback);
  const ids: [string, number | undefined][] = [
    ['bos', tokenizer.bosId],
    ['eos', tokenizer.eosIds[0]],
  ];
  return {
    'tokenizer.ggml.model': byteFallback ? 'llama' : 'gpt2',
    'tokenizer.ggml.pre': byteFallback ? 'default' : preTokenizer(path, json),
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.token_type': { i32: types },
    ...(byteFallback
      ? { 'tokenizer.ggml.scores': { f32: scores(json, tokens) } }
      : { 'tokenizer.ggml.merges': (json.model!.merges ?? []).map(mergeText) }),
    ...Object.fromEntries(
      ids.flatMap(([key, id]) => (id === undefined ? [] : [[`tokenizer.ggml.${key}_token_id`, id]])),
    ),
    'tokenizer.ggml.add_bos_token': addsBos(tokenizer),
    ...chatTemplate(dir),
  };
}
