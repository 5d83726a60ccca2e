/** GGUF files, read by llama.cpp through node-llama-cpp. Skipped loudly where that has no binary. */
import { existsSync, readFileSync, rmSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { exportCheckpoint } from '../../lib/export';
import { MoeModel } from '../../lib/model/model';
import { Tokenizer } from '../../lib/model/tokenizer';
import { Side } from '../../scripts/peers/side';
import { expectRejection, scratch } from '../checkpoint/helpers';
import { relativeError } from '../quantize/helpers';
import { shows } from '../families/shows';
import { FAMILIES, PHIMOE, writeFamily } from './families';
import { rounded } from './helpers';

const dir = scratch();
const binary = resolve(__dirname, `../../node_modules/@node-llama-cpp/${process.platform}-${process.arch}`);
const withPeer = existsSync(binary) ? describe : describe.skip;
if (!existsSync(binary)) console.warn(`SKIPPED: no node-llama-cpp binary for this machine (${binary})`);

const IDS = Array.from({ length: 48 }, (_, i) => (i * 37 + (i >> 3)) % 288);

withPeer('llama.cpp reads it', () => {
  let peer: Side;
  beforeAll(async () => {
    peer = await Side.start('peer', { threads: 2 });
  });
  afterAll(() => peer.stop());

  async function peerLogits(path: string, ids = IDS): Promise<Float32Array> {
    await peer.load({ path });
    try {
      return Float32Array.from((await peer.logits(0, ids)).flat());
    } finally {
      await peer.unload();
    }
  }

  async function ours(path: string, ids = IDS): Promise<Float32Array> {
    const model = await MoeModel.load(path, { activations: 'float32' });
    try {
      return (await model.forward(ids)).logits;
    } finally {
      model.dispose();
    }
  }

  // Keys and values are f16 in llama.cpp; activations float32, as the weights are.
  const marked = Object.keys(FAMILIES).map((family) => [shows(family, 'gguf'), family] as const);
  test.each(marked)('%s: logits agree', async (_, family) => {
    const source = await writeFamily(join(dir, family), family);
    const output = join(dir, `${family}.gguf`);
    const { types, notes } = await exportCheckpoint(source, { format: 'gguf', output });
    expect(types.map((t) => [t.type, t.loss])).toEqual([['F32', 0]]);
    expect(notes).toEqual([]);
    expect(relativeError(await peerLogits(output), await ours(source))).toBeLessThan(2e-3);
  });

  test(`the rest is near without experts, and what llama.cpp does otherwise is said ${shows('phimoe', 'gguf', 'differs')}`, async () => {
    const source = await writeFamily(join(dir, 'phimoe'), 'phimoe', PHIMOE, 0);
    const output = join(dir, 'phimoe.gguf');
    const { notes } = await exportCheckpoint(source, { format: 'gguf', output });
    expect(notes[0]).toMatch(/root mean square.*sparse mixer/);
    // Its norms do not subtract the mean.
    expect(relativeError(await peerLogits(output), await ours(source))).toBeLessThan(0.1);
  });

  test.each([
    { bits: 4, maxLoss: 0, types: ['BF16', 'Q5_0', 'F32'] },
    { bits: 4, maxLoss: 0.001, types: ['BF16', 'Q4_1', 'F32'] },
    { bits: 3, maxLoss: 0, types: ['BF16', 'Q4_0', 'Q5_0', 'F32'] },
  ] as const)('the bundled model at $bits bit, loss up to $maxLoss', async ({ bits, maxLoss, types }) => {
    const source = await rounded(dir, `trio-${bits}-${maxLoss}`, { bits });
    const output = `${source}.gguf`;
    const report = await exportCheckpoint(source, { format: 'gguf', output, maxLoss });
    expect(report.types.map((t) => t.type).sort()).toEqual([...types].sort());
    for (const { loss, maxLoss: largest } of report.types) {
      expect(largest).toBeLessThanOrEqual(maxLoss);
      expect(loss).toBeLessThanOrEqual(largest);
    }
    const text = readFileSync(join(__dirname, '../../scripts/data/prose.txt'), 'utf8').slice(0, 2000);
    const model = await MoeModel.load(source, { activations: 'float32' });
    const ids = model.tokenizer.encode(text).slice(0, 256);
    const { logits } = await model.forward(ids);
    model.dispose();
    await peer.load({ path: output });
    expect(await peer.tokenize(0, text)).toEqual(Tokenizer.load(source).encode(text));
    const theirs = Float32Array.from((await peer.logits(0, ids)).flat());
    await peer.unload();
    // llama.cpp rounds activations to int8, ours were exact: routing may turn here and there.
    expect(relativeError(theirs, logits)).toBeLessThan(0.05);
    const vocabulary = logits.length / ids.length;
    const last = (rows: Float32Array) => rows.slice(-vocabulary);
    const top = (row: Float32Array) => row.indexOf(row.reduce((a, b) => Math.max(a, b)));
    expect(top(last(theirs))).toBe(top(last(logits)));
  });
});

describe('what llama.cpp would compute otherwise, or not read', () => {
  const refused = async (family: string, changes: object, ...texts: string[]): Promise<void> => {
    const source = await writeFamily(join(dir, `${family}-${texts[0]}`), family, changes);
    const output = join(dir, 'refused.gguf');
    await expectRejection(
      exportCheckpoint(source, { format: 'gguf', output }),
      'UNSUPPORTED_MODEL',
      ...texts,
    );
    expect(existsSync(output)).toBe(false);
  };
  test.each<[string, object, ...string[]]>([
    ['qwen2_moe', { norm_topk_prob: true }, 'never divides', "'qwen2moe'"],
    ['qwen3_moe', { norm_topk_prob: false }, 'always divides'],
    ['qwen3_moe', { mlp_only_layers: [0] }, 'no layers without experts'],
    ['glm4_moe', { n_group: 2, topk_group: 1 }, 'no groups of experts'],
    ['gpt_oss', { layer_types: Array(3).fill('full_attention') }, 'a window in every other layer'],
    ['mixtral', { hidden_act: 'gelu' }, "no activation 'gelu'"],
    ['olmoe', { num_key_value_heads: 2 }, 'as many key heads'],
  ])('%s %j', refused);

  test('a model without tokenizer, a file that exists', async () => {
    const source = await writeFamily(join(dir, 'bare'), 'mixtral');
    await expectRejection(
      exportCheckpoint(source, { format: 'gguf', output: join(source, 'config.json') }),
      'OUTPUT',
      'already exists',
    );
    rmSync(join(source, 'tokenizer.json'));
    await expectRejection(
      exportCheckpoint(source, { format: 'gguf', output: join(dir, 'bare.gguf') }),
      'TOKENIZER',
      'tokenizer.json: no such file',
    );
  });
});
