import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { canSlice, TokenStream, Tokenizer } from '../../lib/model/tokenizer';
import { describeWith, expectError, expectRejection, readJson, scratch, shared } from '../checkpoint/helpers';

const root = scratch();
let count = 0;

/** A tokenizer with bytes for letters: every byte of UTF-8 is a token of its own. */
function byteTokenizer(files: Record<string, unknown> = {}): string {
  const dir = join(root, `t${count++}`);
  mkdirSync(dir);
  // GPT-2's printable names of the 256 bytes.
  const printable = (b: number): boolean => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let extra = 0;
  const names = Array.from({ length: 256 }, (_, b) => String.fromCodePoint(printable(b) ? b : 256 + extra++));
  const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true };
  const special = (content: string, id: number) => ({
    id,
    content,
    single_word: false,
    lstrip: false,
    rstrip: false,
    normalized: false,
    special: true,
  });
  const json = {
    version: '1.0',
    added_tokens: [special('<s>', 256), special('</s>', 257)],
    normalizer: null,
    pre_tokenizer: byteLevel,
    post_processor: {
      type: 'TemplateProcessing',
      single: [{ SpecialToken: { id: '<s>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
      pair: [{ Sequence: { id: 'A', type_id: 0 } }, { Sequence: { id: 'B', type_id: 1 } }],
      special_tokens: { '<s>': { id: '<s>', ids: [256], tokens: ['<s>'] } },
    },
    decoder: byteLevel,
    model: { type: 'BPE', vocab: Object.fromEntries(names.map((name, b) => [name, b])), merges: [] },
  };
  for (const [name, value] of Object.entries({ 'tokenizer.json': json, ...files })) {
    if (value !== null)
      writeFileSync(join(dir, name), typeof value === 'string' ? value : JSON.stringify(value));
  }
  return dir;
}

describe('loading', () => {
  test('what is missing or broken is named', () => {
    const dir = byteTokenizer({ 'tokenizer.json': null });
    expectError(() => Tokenizer.load(dir), 'TOKENIZER', join(dir, 'tokenizer.json'), 'no such file');
    expectError(
      () => Tokenizer.load(byteTokenizer({ 'tokenizer.json': null, 'tokenizer.model': 'x' })),
      'TOKENIZER',
      'tokenizer.model',
      'AutoTokenizer',
    );
    expectError(
      () => Tokenizer.load(byteTokenizer({ 'tokenizer.json': '{' })),
      'TOKENIZER',
      'tokenizer.json',
      'JSON',
    );
    expectError(
      () => Tokenizer.load(byteTokenizer({ 'tokenizer.json': {} })),
      'TOKENIZER',
      'tokenizer.json',
      'cannot be used',
    );
    expectError(
      () => Tokenizer.load(byteTokenizer({ 'tokenizer_config.json': '[]' })),
      'TOKENIZER',
      'tokenizer_config.json',
    );
  });

  test('begin and end of text: generation_config, then config, then tokenizer_config', () => {
    const tokenizer_config = { bos_token: { content: '<s>' }, eos_token: '</s>' };
    const config = { bos_token_id: 1, eos_token_id: 2 };
    const load = (files: Record<string, unknown>) => {
      const { bosId, eosIds } = Tokenizer.load(byteTokenizer(files));
      return [bosId, eosIds];
    };
    expect(load({})).toEqual([undefined, []]);
    expect(load({ 'tokenizer_config.json': tokenizer_config })).toEqual([256, [257]]);
    expect(load({ 'tokenizer_config.json': tokenizer_config, 'config.json': config })).toEqual([1, [2]]);
    expect(load({ 'config.json': config, 'generation_config.json': { eos_token_id: [5, 6] } })).toEqual([
      1,
      [5, 6],
    ]);
  });
});

describe('text and ids', () => {
  const tokenizer = (): Tokenizer => Tokenizer.load(byteTokenizer());

  test('special tokens only when asked for', () => {
    const t = tokenizer();
    expect(t.encode('ab')).toEqual([97, 98].map((b) => t.tokenId(String.fromCharCode(b))));
    expect(t.encode('ab', { addSpecialTokens: true })).toEqual([256, 97, 98]);
    expect(t.encode('')).toEqual([]);
    expect(t.decode([])).toBe('');
    expect(t.decode([256, 97, 257])).toBe('<s>a</s>');
    expect(t.decode([256, 97, 257], { skipSpecialTokens: true })).toBe('a');
    expect(t.decode(t.encode("a , b . n't"))).toBe("a , b . n't");
    expect(t.vocabSize).toBe(258);
  });

  test('a stream gives whole characters only', () => {
    const t = tokenizer();
    const text = 'naïve — 日本語 🙂!';
    const stream = t.stream();
    const pieces = t.encode(text).map((id) => stream.push(id));
    expect(pieces.join('') + stream.end()).toBe(text);
    expect(pieces.filter((p) => p !== '')).toEqual([...text]);
    const cut = t.stream();
    expect(
      t
        .encode('🙂')
        .slice(0, 3)
        .map((id) => cut.push(id)),
    ).toEqual(['', '', '']);
    expect(cut.end()).toContain('\uFFFD');
    expect(cut.end()).toBe('');
  });

  test('damage does not hold a stream back for ever', () => {
    const stream = tokenizer().stream();
    let out = '';
    for (let i = 0; i < 100; i++) out += stream.push(187);
    expect(out.length).toBeGreaterThan(50);
  });

  test('a stream keeps the spaces of tokenizers that drop the first', () => {
    // As SentencePiece decoders do: the very first space of a text is dropped.
    const decode = (ids: number[]): string =>
      ids
        .map((id) => ` w${id}`)
        .join('')
        .slice(1);
    const fresh = new TokenStream(decode);
    expect([1, 2, 3].map((id) => fresh.push(id))).toEqual(['w1', ' w2', ' w3']);
    const after = new TokenStream(decode, [9]);
    expect([1, 2].map((id) => after.push(id))).toEqual([' w1', ' w2']);
  });
});

describe('chat templates', () => {
  const template =
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
  const messages = [{ role: 'user', content: 'hi' }];
  const load = (files: Record<string, unknown>): Tokenizer => Tokenizer.load(byteTokenizer(files));

  test('from tokenizer_config.json, chat_template.json or chat_template.jinja', () => {
    const config = { bos_token: { content: '<s>' }, chat_template: template };
    const t = load({ 'tokenizer_config.json': config });
    expect(t.hasChatTemplate).toBe(true);
    expect(t.applyChatTemplate(messages)).toBe('<s>[user] hi\n');
    expect(t.applyChatTemplate(messages, { addGenerationPrompt: true })).toBe('<s>[user] hi\n[assistant]');
    const named = [
      { name: 'tool_use', template: 'no' },
      { name: 'default', template },
    ];
    expect(
      load({ 'tokenizer_config.json': { ...config, chat_template: named } }).applyChatTemplate(messages),
    ).toBe('<s>[user] hi\n');
    expect(load({ 'chat_template.json': { chat_template: template } }).applyChatTemplate(messages)).toBe(
      '[user] hi\n',
    );
    expect(
      load({ 'tokenizer_config.json': config, 'chat_template.jinja': 'file' }).applyChatTemplate(messages),
    ).toBe('file');
  });

  test('none, a broken one, one that refuses', () => {
    expect(load({}).hasChatTemplate).toBe(false);
    expectError(() => load({}).applyChatTemplate(messages), 'TOKENIZER', 'no chat template');
    expectError(
      () => load({ 'chat_template.jinja': '{% for %}' }).applyChatTemplate(messages),
      'TOKENIZER',
      'cannot be applied',
    );
    const refusing = "{{ raise_exception('roles must alternate') }}";
    expectError(
      () => load({ 'chat_template.jinja': refusing }).applyChatTemplate(messages),
      'TOKENIZER',
      'roles must alternate',
    );
  });
});

test('only tokenizers that provably allow it are sliced', () => {
  const byteLevel = { type: 'ByteLevel', add_prefix_space: false, use_regex: true };
  const qwen =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
  const split = (Regex: string) => ({
    type: 'Split',
    pattern: { Regex },
    behavior: 'Isolated',
    invert: false,
  });
  const sequence = (...pretokenizers: object[]) => ({ type: 'Sequence', pretokenizers });
  const base = { normalizer: null, pre_tokenizer: byteLevel, added_tokens: [] };
  expect(canSlice(base)).toBe(true);
  expect(
    canSlice({
      ...base,
      normalizer: { type: 'NFC' },
      pre_tokenizer: sequence(split(qwen), { ...byteLevel, use_regex: false }),
    }),
  ).toBe(true);
  expect(canSlice({ ...base, normalizer: { type: 'Prepend' } })).toBe(false);
  expect(canSlice({ ...base, pre_tokenizer: null })).toBe(false);
  expect(canSlice({ ...base, pre_tokenizer: { type: 'Metaspace' } })).toBe(false);
  expect(canSlice({ ...base, pre_tokenizer: { ...byteLevel, add_prefix_space: true } })).toBe(false);
  expect(canSlice({ ...base, pre_tokenizer: { ...byteLevel, use_regex: false } })).toBe(false);
  expect(canSlice({ ...base, pre_tokenizer: sequence(split('.+'), byteLevel) })).toBe(false);
  expect(canSlice({ ...base, added_tokens: [{ content: 'a', rstrip: true }] })).toBe(false);
  expect(canSlice({ ...base, added_tokens: [{ content: 'a\n' }] })).toBe(false);
});

describeWith('models/trio-moe-9m/tokenizer.json', 'the trained model', () => {
  const load = (): Tokenizer => Tokenizer.load(join(shared, 'models/trio-moe-9m'));

  test('ids as the reference has them', () => {
    const tokenizer = load();
    const rows = JSON.parse(readFileSync(join(shared, 'goldens/tokenizer.json'), 'utf8')) as {
      text: string;
      ids: number[];
    }[];
    expect(rows.length).toBeGreaterThan(0);
    for (const { text, ids } of rows) {
      expect(tokenizer.encode(text)).toEqual(ids);
      expect(tokenizer.decode(ids)).toBe(text);
      const stream = tokenizer.stream();
      expect(ids.map((id) => stream.push(id)).join('') + stream.end()).toBe(text);
    }
    expect([tokenizer.vocabSize, tokenizer.bosId, tokenizer.eosIds]).toEqual([4096, 0, [0]]);
  });

  test.each(['prose', 'math', 'code'])(
    '%s: encoding in slices gives the same ids and lets others run',
    async (domain) => {
      const tokenizer = load();
      const text = readFileSync(join(shared, `data/heldout/${domain}.txt`), 'utf8').slice(0, 150_000);
      let turns = 0;
      const timer = setInterval(() => turns++, 0);
      const ids = await tokenizer.encodeAsync(text);
      clearInterval(timer);
      expect(turns).toBeGreaterThan(2);
      expect(ids).toEqual(tokenizer.encode(text));
      const controller = new AbortController();
      const running = tokenizer.encodeAsync(text, { signal: controller.signal });
      controller.abort();
      await expectRejection(running, 'ABORTED');
    },
  );

  test('the same under a tokenizer of the Qwen kind, with odd white space', async () => {
    const dir = join(root, 'qwen');
    mkdirSync(dir);
    copyFileSync(
      join(shared, 'models/trio-moe-9m/tokenizer_config.json'),
      join(dir, 'tokenizer_config.json'),
    );
    const json = readJson(join(shared, 'models/trio-moe-9m/tokenizer.json'));
    const Regex =
      "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
    const pretokenizers = [
      { type: 'Split', pattern: { Regex }, behavior: 'Isolated', invert: false },
      { type: 'ByteLevel', add_prefix_space: false, trim_offsets: false, use_regex: false },
    ];
    writeFileSync(
      join(dir, 'tokenizer.json'),
      JSON.stringify({
        ...json,
        normalizer: { type: 'NFC' },
        pre_tokenizer: { type: 'Sequence', pretokenizers },
      }),
    );
    const tokenizer = Tokenizer.load(dir);
    const pieces = [
      'word',
      '\n',
      '\n\n',
      ' \n ',
      "don't\n's",
      '. \n',
      '\r\n',
      'e\u0301\n\u0301',
      '12\n',
      '\t',
      '<|endoftext|>',
      ' ',
      '日本\n',
    ];
    let seed = 1;
    const next = (n: number): number => (seed = (seed * 48271) % 2147483647) % n;
    let text = '';
    while (text.length < 120_000) text += pieces[next(pieces.length)]!;
    expect(await tokenizer.encodeAsync(text)).toEqual(tokenizer.encode(text));
  });
});
