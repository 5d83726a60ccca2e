import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { normaliseConfig } from '../../lib/checkpoint/config';
import { writeJson } from '../../lib/checkpoint/files';
import {
  quantizationConfig,
  quantizationOf,
  quantizedEntries,
  readMatrix,
  type ModuleQuantization,
} from '../../lib/checkpoint/quantized';
import { writeSafetensors } from '../../lib/checkpoint/safetensors';
import { Checkpoint } from '../../lib/checkpoint/source';
import { native } from '../../lib/native';
import type { QuantMatrix, Tensor } from '../../types/native';
import { expectError, expectRejection, scratch } from './helpers';

const root = scratch();

const q = (bits: number, groupSize = 128, symmetric = false): ModuleQuantization => ({
  bits,
  groupSize,
  symmetric,
});

/** A plan like ours: attention 4 bit, experts 3 then 2, one odd expert, routers and one matrix left alone. */
function modules(): Map<string, ModuleQuantization | null> {
  const map = new Map<string, ModuleQuantization | null>();
  for (let layer = 0; layer < 12; layer++) {
    const at = `model.layers.${layer}`;
    for (const p of ['q', 'k', 'v', 'o']) map.set(`${at}.self_attn.${p}_proj`, q(4));
    map.set(`${at}.mlp.gate`, null);
    for (let e = 0; e < 12; e++) {
      for (const p of ['gate', 'up', 'down'])
        map.set(`${at}.mlp.experts.${e}.${p}_proj`, q(layer < 6 ? 3 : 2));
    }
  }
  map.set('model.layers.3.mlp.experts.7.up_proj', q(4, 32, true));
  map.set('model.layers.11.mlp.experts.0.down_proj', null);
  return map;
}

describe('quantization_config', () => {
  test('every module is found again, and few overrides are enough', () => {
    const built = quantizationConfig(modules(), 'eac-moe:1.2.3');
    expect(built).toMatchObject({
      quant_method: 'gptq',
      checkpoint_format: 'gptq_v2',
      desc_act: false,
      lm_head: false,
    });
    expect(Object.keys(built.dynamic!).length).toBeLessThan(20);
    const read = quantizationOf(
      normaliseConfig({ model_type: 'x', quantization_config: JSON.parse(JSON.stringify(built)) as object }),
    )!;
    for (const [module, value] of modules()) expect([module, read.of(module)]).toEqual([module, value]);
    expect(read.quantizers).toEqual(['eac-moe:1.2.3']);
    // Exact: no module is caught by a name that only begins alike, nor by a dot that stands for any character.
    expect(read.of('model.layers.1.self_attn.q_proj')?.bits).toBe(4);
    expect(read.of('model.layers.1.self_attn.q_proj_extra')).toEqual(q(built.bits));
    expect(read.of('model.layers.1xself_attn.q_proj')).toEqual(q(built.bits));
  });

  test('one setting needs no overrides; names of any shape work; none is an error', () => {
    expect(quantizationConfig(new Map([['a', q(2)]]), 'x').dynamic).toBeUndefined();
    const odd = new Map([
      ['h.0.1.2.w+x', q(2)],
      ['h.0.1.3.w+x', q(3)],
      ['h.1.1.3.w+x', q(3)],
      ['lone', q(4, Infinity)],
      ['b', q(2)],
      ['c', q(2)],
    ]);
    const read = quantizationOf(
      normaliseConfig({ model_type: 'x', quantization_config: quantizationConfig(odd, 'x') }),
    )!;
    for (const [module, value] of odd) expect([module, read.of(module)]).toEqual([module, value]);
    expectError(() => quantizationConfig(new Map([['a', null]]), 'x'), 'INVALID_ARGUMENT', 'no module');
  });

  test('the rules of GPTQModel: first match from the start wins, + may be left out', () => {
    const config = {
      model_type: 'x',
      quantization_config: {
        quant_method: 'gptq',
        checkpoint_format: 'gptq_v2',
        bits: 4,
        group_size: 128,
        sym: true,
        dynamic: {
          '-:a\\.skip': {},
          '.*\\.1\\.': { bits: 2, group_size: 32 },
          '+:a': { bits: 3 },
          '+:a\\.1\\.': { bits: 4 },
        },
      },
    };
    const read = quantizationOf(normaliseConfig(config))!;
    expect(read.of('a.skip.1.x')).toBeNull();
    expect(read.of('a.1.x')).toEqual(q(2, 32, true));
    expect(read.of('a.2.x')).toEqual(q(3, 128, true));
    expect(read.of('b.a.2')).toEqual(q(4, 128, true));
    expect(read.of('b.a.skip')).toEqual(q(4, 128, true));
  });

  test('what cannot be read is refused with what it is', () => {
    const gptq = { quant_method: 'gptq', checkpoint_format: 'gptq_v2', bits: 4, group_size: 128 };
    const cases: [object, ...string[]][] = [
      [{ quant_method: 'awq', bits: 4 }, 'awq', 'original'],
      [{ quant_method: 'bitnet' }, 'bitnet'],
      [{ load_in_4bit: true }, 'bitsandbytes'],
      [{ quant_method: 'compressed-tensors' }, 'compressed-tensors'],
      [{ bits: 4 }, 'nothing'],
      [{ ...gptq, checkpoint_format: 'marlin' }, 'marlin'],
      [{ ...gptq, desc_act: true }, 'desc_act'],
      [{ ...gptq, lm_head: true }, 'lm_head'],
      [{ ...gptq, bits: 8 }, 'bits is 8'],
      [{ ...gptq, dynamic: { '+:a': { bits: 8 } } }, '+:a', 'bits is 8'],
      [{ ...gptq, dynamic: { '+:a': { desc_act: true } } }, '+:a', 'desc_act'],
    ];
    for (const [quantization_config, ...texts] of cases) {
      const config = normaliseConfig({ model_type: 'x', quantization_config });
      expectError(() => quantizationOf(config), 'UNSUPPORTED_MODEL', 'quantization_config', ...texts);
    }
    const broken = (dynamic: object) =>
      normaliseConfig({ model_type: 'x', quantization_config: { ...gptq, dynamic } });
    expectError(() => quantizationOf(broken({ '+:(': {} })), 'INVALID_CHECKPOINT', '+:(');
    expectError(() => quantizationOf(broken({ '+:a': { bits: 'x' } })), 'INVALID_CHECKPOINT', 'bits', '"x"');
    expect(quantizationOf(normaliseConfig({ model_type: 'x' }))).toBeNull();
    for (const [checkpoint_format, version] of [
      ['gptq_v2', 2],
      ['gptq', 1],
      [undefined, 1],
    ]) {
      const quantization_config = { ...gptq, checkpoint_format };
      expect(quantizationOf(normaliseConfig({ model_type: 'x', quantization_config }))!.version).toBe(
        version,
      );
    }
  });
});

describe('matrices', () => {
  const shapes: [number, number, number, number, boolean][] = [
    [2, 64, 128, 32, false],
    [3, 40, 192, 128, false],
    [4, 33, 96, 64, true],
    [3, 8, 320, 128, true],
  ];

  async function write(
    dir: string,
    matrices: Map<string, QuantMatrix>,
    extra: Record<string, Tensor> = {},
  ): Promise<void> {
    mkdirSync(dir, { recursive: true });
    const config = new Map(
      [...matrices].map(([name, m]) => [name, q(m.bits, m.groupSize, m.symmetric)] as const),
    );
    await writeJson(join(dir, 'config.json'), {
      model_type: 'x',
      quantization_config: quantizationConfig(config, 'eac-moe:0'),
    });
    const entries = (await Promise.all([...matrices].map(([name, m]) => quantizedEntries(name, m)))).flat();
    const plain = Object.entries(extra).map(([name, data]) => ({ name, data }));
    const all = new Map([...entries, ...plain].map((e) => [e.name, e]));
    await writeSafetensors(join(dir, 'model.safetensors'), all.values());
  }

  async function example(
    bits: number,
    out: number,
    inputs: number,
    groupSize: number,
    symmetric: boolean,
  ): Promise<QuantMatrix> {
    const w = Float32Array.from({ length: out * inputs }, (_, i) => Math.sin(i * 1.7) * (1 + (i % 13)));
    const tensor = native().fromArray(w, 'f32', [out, inputs]);
    return native().quantizeRtn(tensor, { bits, groupSize, symmetric, clipSearch: false });
  }

  test('written and read back to the same values', async () => {
    const dir = join(root, 'round');
    const matrices = new Map<string, QuantMatrix>();
    for (const [i, shape] of shapes.entries()) matrices.set(`layers.${i}.w`, await example(...shape));
    await write(dir, matrices, { 'plain.weight': native().zeros('bf16', [4, 6]) });
    const checkpoint = Checkpoint.open(dir);
    for (const [i, [bits, out, inputs, groupSize, symmetric]] of shapes.entries()) {
      const read = (await readMatrix(checkpoint, `layers.${i}.w.weight`, out, inputs)) as QuantMatrix;
      expect(read).toMatchObject({ bits, rows: out, cols: inputs, groupSize, symmetric });
      expect((await read.dequantize()).toBytes()).toEqual(
        (await matrices.get(`layers.${i}.w`)!.dequantize()).toBytes(),
      );
    }
    expect(((await readMatrix(checkpoint, 'plain.weight', 4, 6)) as Tensor).dtype).toBe('bf16');
    await expectRejection(
      readMatrix(checkpoint, 'plain.weight', 6, 4),
      'INVALID_TENSOR',
      "'plain.weight'",
      '[4, 6]',
    );
    await expectRejection(
      readMatrix(checkpoint, 'layers.0.w.weight', 32, 128),
      'INVALID_TENSOR',
      'layers.0.w.qweight',
      '[8, 64]',
      '[8, 32]',
    );
  });

  test('a scattered group index, a missing scale, a wrong dtype, no word about the module', async () => {
    const matrix = await example(3, 32, 64, 32, false);
    const open = async (name: string, extra: Record<string, Tensor>): Promise<Checkpoint> => {
      await write(join(root, name), new Map([['m', matrix]]), extra);
      return Checkpoint.open(join(root, name));
    };
    const scattered = Int32Array.from({ length: 64 }, (_, c) => c % 2);
    const a = await open('a', { 'm.g_idx': native().fromArray(scattered, 'i32', [64]) });
    await expectRejection(
      readMatrix(a, 'm.weight', 32, 64),
      'UNSUPPORTED_MODEL',
      'm.g_idx',
      'channel 1 into group 1',
      'desc_act',
    );
    const b = await open('b', { 'm.scales': native().zeros('f32', [2, 32]) });
    await expectRejection(
      readMatrix(b, 'm.weight', 32, 64),
      'INVALID_TENSOR',
      "'m.scales'",
      'F32',
      'expected F16',
    );
    const c = await open('c', {});
    await expectRejection(readMatrix(c, 'm.weight', 32, 64, null), 'INVALID_CHECKPOINT', 'm.qweight');

    const { qweight, qzeros } = await matrix.toGptq();
    const entries = [
      { name: 'm.qweight', data: qweight },
      { name: 'm.qzeros', data: qzeros },
    ];
    await writeSafetensors(join(root, 'c', 'model.safetensors'), entries);
    await expectRejection(
      readMatrix(Checkpoint.open(join(root, 'c')), 'm.weight', 32, 64),
      'INVALID_TENSOR',
      "'m.scales' is missing",
    );
    const scales = (await matrix.toGptq()).scales;
    await writeSafetensors(join(root, 'c', 'model.safetensors'), [
      ...entries,
      { name: 'm.scales', data: scales },
    ]);
    const withoutIndex = (await readMatrix(
      Checkpoint.open(join(root, 'c')),
      'm.weight',
      32,
      64,
    )) as QuantMatrix;
    expect((await withoutIndex.dequantize()).toBytes()).toEqual((await matrix.dequantize()).toBytes());
  });

  test('group_size -1 is one group a row', async () => {
    const dir = join(root, 'wide');
    const matrix = await example(4, 16, 96, 96, false);
    await write(dir, new Map([['m', matrix]]));
    const config = {
      quant_method: 'gptq',
      checkpoint_format: 'gptq_v2',
      bits: 4,
      group_size: -1,
      sym: false,
    };
    writeFileSync(join(dir, 'config.json'), JSON.stringify({ model_type: 'x', quantization_config: config }));
    const read = (await readMatrix(Checkpoint.open(dir), 'm.weight', 16, 96)) as QuantMatrix;
    expect((await read.dequantize()).toBytes()).toEqual((await matrix.dequantize()).toBytes());
  });
});
