/** The GGUF writer of `npm run bench:peers`, read back by hand and by llama.cpp. */
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { native } from '../../lib/native';
import {
  f16,
  RANDOM_TYPES,
  ggmlBytes,
  RandomBlocks,
  writeGguf,
  type GgufTensor,
} from '../../scripts/peers/gguf';
import {
  layerConfig,
  peerModel,
  wholeConfig,
  writeCheckpoint,
  writePeerModel,
  type ModelConfig,
} from '../../scripts/peers/models';
import { measure, type Runner } from '../../scripts/peers/layer';
import { PeerUnavailable, Side } from '../../scripts/peers/side';
import { copyBinaries } from '../../scripts/peers/variants';
import { measureWhole } from '../../scripts/peers/whole';

let dir: string;
beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), 'eac-moe-gguf-'));
});
afterAll(() => rmSync(dir, { recursive: true, force: true }));

/** Reads what the writer can write, from the format's description. */
class Reader {
  at = 0;
  readonly #file: Buffer;

  constructor(file: Buffer) {
    this.#file = file;
  }

  u32 = () => this.#file.readUInt32LE((this.at += 4) - 4);
  u64 = () => Number(this.#file.readBigUInt64LE((this.at += 8) - 8));
  f32 = () => this.#file.readFloatLE((this.at += 4) - 4);
  bool = () => this.#file[this.at++] === 1;

  string = () => {
    const length = this.u64();
    return this.#file.toString('utf8', this.at, (this.at += length));
  };

  value = (type = this.u32()): unknown => {
    if (type === 9) {
      const [element, length] = [this.u32(), this.u64()];
      return Array.from({ length }, () => this.value(element));
    }
    return { 4: this.u32, 6: this.f32, 7: this.bool, 8: this.string }[type]!();
  };
}

function readGguf(path: string) {
  const file = readFileSync(path);
  const r = new Reader(file);
  const magic = file.toString('latin1', 0, (r.at = 4));
  const [version, tensorCount, entryCount] = [r.u32(), r.u64(), r.u64()];
  const metadata = Object.fromEntries(
    Array.from({ length: entryCount }, () => [r.string(), r.value()] as const),
  );
  const tensors = Array.from({ length: tensorCount }, () => ({
    name: r.string(),
    shape: Array.from({ length: r.u32() }, r.u64),
    type: r.u32(),
    offset: r.u64(),
  }));
  return { magic, version, metadata, tensors, dataAt: Math.ceil(r.at / 32) * 32, file };
}

describe('GGUF writer', () => {
  const metadata = {
    'general.architecture': 'llama',
    'llama.block_count': 3,
    'llama.rope.freq_base': { f32: 10000 },
    'llama.epsilon': 0.5,
    flag: true,
    'tokenizer.ggml.tokens': ['a', 'zwölf', ''],
  };
  const bytes = (n: number, value: number) => new Uint8Array(n).fill(value);
  const tensors: GgufTensor[] = [
    { name: 'odd', type: 'F32', shape: [3], data: () => [bytes(12, 1)] },
    { name: 'blocks', type: 'Q4_0', shape: [64, 3], data: () => [bytes(100, 2), bytes(8, 2)] },
    { name: 'experts', type: 'Q2_K', shape: [256, 2, 2], data: () => [bytes(336, 3)] },
  ];

  test('header, entries and tensors read back; data is aligned to 32', async () => {
    const path = join(dir, 'small.gguf');
    const size = await writeGguf(path, metadata, tensors);
    const read = readGguf(path);
    expect(read).toMatchObject({ magic: 'GGUF', version: 3 });
    expect(read.metadata).toEqual({ ...metadata, 'llama.rope.freq_base': 10000 });
    expect(read.tensors).toEqual([
      { name: 'odd', shape: [3], type: 0, offset: 0 },
      { name: 'blocks', shape: [64, 3], type: 2, offset: 32 },
      { name: 'experts', shape: [256, 2, 2], type: 10, offset: 160 },
    ]);
    expect(read.file.byteLength).toBe(size);
    expect(size).toBe(read.dataAt + 160 + 352);
    const data = read.file.subarray(read.dataAt);
    expect([...data.subarray(0, 32)]).toEqual([...bytes(12, 1), ...bytes(20, 0)]);
    expect([...data.subarray(32, 160)]).toEqual([...bytes(108, 2), ...bytes(20, 0)]);
    expect([...data.subarray(160)]).toEqual([...bytes(336, 3), ...bytes(16, 0)]);
  });

  test('data of another size is refused, and rows that are not whole blocks', async () => {
    const short = { ...tensors[0]!, data: () => [bytes(8, 1)] };
    await expect(writeGguf(join(dir, 'short.gguf'), {}, [short])).rejects.toThrow("'odd' has 8 bytes");
    expect(() => ggmlBytes('Q3_K', [128, 2])).toThrow('not whole blocks of Q3_K');
  });

  test('block sizes are those of ggml-common.h', () => {
    const halves = 2;
    expect(ggmlBytes('Q4_0', [32])).toBe(halves + 32 / 2);
    expect(ggmlBytes('IQ4_NL', [32])).toBe(halves + 32 / 2);
    expect(ggmlBytes('Q2_K', [256])).toBe(2 * halves + 256 / 16 + 256 / 4);
    expect(ggmlBytes('Q3_K', [256])).toBe(halves + 256 / 4 + 256 / 8 + 12);
    expect(ggmlBytes('Q6_K', [256])).toBe(halves + 256 / 16 + (3 * 256) / 4);
    expect(ggmlBytes('Q4_0', [2048, 1408, 60])).toBe((2048 * 1408 * 60 * 18) / 32);
  });

  test('f16 agrees with the native conversion, subnormals and carries included', () => {
    const values = Float32Array.of(1, 0.1, 1 / 3, 65504, 6.1e-5, 3e-6, 2 ** -24, 0.99999, 2047.9);
    const converted = new Uint16Array(
      native().fromArray(values, 'f16', [values.length]).toBytes().slice().buffer,
    );
    expect(Array.from(values, f16)).toEqual([...converted]);
  });

  test.each(RANDOM_TYPES)(
    'random %s: as many bytes as the tensor has, another place for each tensor',
    (type) => {
      const shape = [256, 300];
      const random = new RandomBlocks(1);
      const [a, b] = [1, 2].map(() => Buffer.concat([...random.tensor(type, shape, 0.01)()]));
      expect(a!.byteLength).toBe(ggmlBytes(type, shape));
      expect(a!.equals(b!)).toBe(false);
    },
  );

  test('random Q4_0 has mean 0 and the deviation asked for', () => {
    const blocks = Buffer.concat([...new RandomBlocks(1).tensor('Q4_0', [2048, 64], 0.02)()]);
    const d = native().fromBytes(blocks.subarray(0, 2), 'f16', [1]).toArray()[0]!;
    const values: number[] = [];
    for (let i = 0; i < blocks.length; i++) {
      if (i % 18 >= 2) values.push(d * ((blocks[i]! & 15) - 8), d * ((blocks[i]! >> 4) - 8));
    }
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    const deviation = Math.sqrt(values.reduce((a, b) => a + b * b, 0) / values.length);
    expect(Math.abs(mean)).toBeLessThan(0.005);
    expect(deviation).toBeGreaterThan(0.018);
    expect(deviation).toBeLessThan(0.022);
  });
});

describe('times of sides that stand still now and then', () => {
  /** Takes `step` ms a layer and token; decoding, the first `slow` of 10 tokens take ten times that. */
  const runner = (layers: number[], step: number, slow: number[]): Runner => ({
    prefill: async (model, ids) => layers[model]! * step * ids.length,
    decode: async (model, ids) => ids.map((_, i) => layers[model]! * step * (i % 10 < slow[model]! ? 10 : 1)),
  });

  test('a layer is the difference over the layers between, slow steps left out', async () => {
    const sides = [runner([2, 6], 1, [0, 0]), runner([2, 6], 3, [7, 2])] as const;
    const [one, many] = [await measure(sides, 4, 1, 3), await measure(sides, 4, 8, 3)];
    expect(one.map(({ ms, bestMs }) => [ms, bestMs])).toEqual([
      [1, 1],
      [3, 3],
    ]);
    expect(many.map(({ ms, bestMs }) => [ms, bestMs])).toEqual([
      [8, 8],
      [24, 24],
    ]);
  });

  test('decode is the rate of all tokens, at best that of the fastest', async () => {
    const side = runner([1], 2, [5]);
    const [ours] = await measureWhole([side, side], 3);
    expect(ours!.prefill).toBeCloseTo(500);
    expect(ours!.bestDecode).toBeCloseTo(500);
    expect(ours!.decode).toBeCloseTo(500 / ((30 + 10 * 34) / 64));
  });
});

const binary = resolve(__dirname, `../../node_modules/@node-llama-cpp/${process.platform}-${process.arch}`);
const withPeer = existsSync(binary) ? describe : describe.skip;
if (!existsSync(binary)) console.warn(`skipped: no node-llama-cpp binary for this machine (${binary})`);

withPeer('models for the comparison', () => {
  const SMALL = { name: 'small', hidden: 256, width: 288, experts: 6, topK: 2 };
  const configs: [string, ModelConfig][] = [
    ['layer', layerConfig(SMALL, 2)],
    [
      'whole',
      {
        ...wholeConfig(2),
        vocab_size: 512,
        hidden_size: 256,
        num_attention_heads: 2,
        num_key_value_heads: 2,
        num_experts: 6,
        num_experts_per_tok: 2,
        moe_intermediate_size: 96,
        shared_expert_intermediate_size: 512,
        intermediate_size: 512,
      },
    ],
  ];
  let sides: Side[] = [];
  beforeAll(async () => {
    sides = [await Side.start('ours', { threads: 2 }), await Side.start('peer', { threads: 2 })];
  });
  afterAll(async () => {
    for (const side of sides) await side.stop();
  });

  test.each(
    configs.flatMap(([name, config]) => ([4, 3, 2] as const).map((bits) => ({ name, config, bits }))),
  )('$name, $bits bit: both sides load it and compute numbers', async ({ name, config, bits }) => {
    const [ours, peer] = sides as [Side, Side];
    const checkpoint = join(dir, `${name}-${bits}`);
    await writeCheckpoint(checkpoint, config, bits);
    await writePeerModel(
      `${checkpoint}.gguf`,
      peerModel(config, ({ 4: 'Q4_0', 3: 'Q3_K', 2: 'Q2_K' } as const)[bits]),
    );
    await ours.load({ path: checkpoint });
    await peer.load({ path: `${checkpoint}.gguf` });
    const ids = Array.from({ length: 40 }, (_, i) => (i * 37) % 512);
    for (const side of [ours, peer]) {
      expect(await side.finite(0, ids)).toBe(true);
      expect(await side.prefill(0, ids)).toBeGreaterThan(0);
      expect(await side.decode(0, [1, 2, 3])).toHaveLength(3);
      await side.unload();
    }
  });

  test('a file that computes NaN is found out', async () => {
    const model = peerModel(layerConfig(SMALL, 1), 'Q4_0');
    const norm = model.tensors.find((t) => t.name === 'output_norm.weight')!;
    norm.data = () => [new Uint8Array(new Float32Array(SMALL.hidden).fill(NaN).buffer)];
    const path = join(dir, 'nan.gguf');
    await writePeerModel(path, model);
    await expect(sides[1]!.loadChecked({ path })).rejects.toThrow('computes NaN');
    await sides[1]!.unload();
  });

  test('a folder without binaries is reported as such', async () => {
    const starting = Side.start('peer', { threads: 1, binaries: join(dir, 'nothing') });
    await expect(starting).rejects.toThrow(PeerUnavailable);
  });

  const onX64 = process.platform === 'linux' && process.arch === 'x64' ? test : test.skip;
  onX64('llama.cpp can be held to an instruction set', async () => {
    const peer = await Side.start('peer', { threads: 1, binaries: await copyBinaries('baseline', dir) });
    expect(peer.info.cpu).toMatch(/^x64: /);
    expect(peer.info.cpu).not.toContain('AVX');
    await peer.stop();
  });

  test('a file that is no model is an error of that call, and the side lives on', async () => {
    await expect(sides[1]!.load({ path: join(dir, 'absent.gguf') })).rejects.toThrow();
    await expect(sides[0]!.load({ path: join(dir, 'absent') })).rejects.toThrow('absent');
    expect(await sides[1]!.peakMemory()).toBeGreaterThan(1e6);
  });
});
