/** FP8 and MXFP4, every code, bit for bit. */
import { normaliseConfig } from '../../lib/checkpoint/config';
import { fp8BlockSize, publishedFormat } from '../../lib/checkpoint/published';
import { quantizationOf } from '../../lib/checkpoint/quantized';
import { native } from '../../lib/native';
import { blocksOf, decodeFp8, decodeMxfp4, e4m3, toBf16, type Size } from '../formats';
import { expectError, expectRejection } from './helpers';

const api = native();
const u8 = (values: Uint8Array, shape: number[]) => api.fromBytes(values, 'u8', shape);

/** Indices where two arrays differ; -0 is not 0. */
function differing(found: ArrayLike<number>, expected: ArrayLike<number>): number[] {
  expect(found.length).toBe(expected.length);
  return Array.from({ length: expected.length }, (_, i) => i).filter(
    (i) => !Object.is(found[i], expected[i]),
  );
}

/** A code that is not NaN. */
const finite = (code: number): number => ((code & 0x7f) === 0x7f ? 0 : code);

test('the test rounds to bf16 as the definition says', () => {
  const cases: [number, number][] = [
    [1, 1],
    [1 + 2 ** -8, 1],
    [1 + 3 * 2 ** -8, 1 + 2 ** -6],
    [-1 - 2 ** -8 - 2 ** -20, -1 - 2 ** -7],
    [2 ** -133, 2 ** -133],
    [2 ** -134, 0],
    [3 * 2 ** -134, 2 ** -132],
    [(2 - 2 ** -7) * 2 ** 127, (2 - 2 ** -7) * 2 ** 127],
    [(2 - 2 ** -8) * 2 ** 127, Infinity],
  ];
  for (const [x, rounded] of cases) expect([x, toBf16(x)]).toEqual([x, rounded]);
});

describe('FP8 (e4m3)', () => {
  test('every code under scales of every magnitude', async () => {
    const codes = Uint8Array.from({ length: 256 }, (_, i) => finite(i));
    const scales = [0, 1, -1, 0.1, 448, 1 / 448, 1.9999999, 3e38, 1.2e-38, 1e-40, 2 ** -149, 0.000244140625];
    for (let e = -149; e <= 127; e++) scales.push(Math.fround(2 ** e * 1.3));
    for (const scale of scales) {
      const f32 = Math.fround(scale);
      const decoded = await api.decodeFp8(
        u8(codes, [1, 256]),
        api.fromArray(Float32Array.of(f32), 'f32', [1, 1]),
        [128, 256],
      );
      expect(decoded.dtype).toBe('bf16');
      const expected = Array.from(codes, (code) => toBf16(Math.fround(e4m3(code) * f32)));
      expect({ scale, at: differing(decoded.toArray(), expected) }).toEqual({ scale, at: [] });
    }
  });

  test.each<[Size, Size]>([
    [
      [128, 128],
      [128, 128],
    ],
    [
      [129, 257],
      [128, 128],
    ],
    [
      [1, 5],
      [128, 128],
    ],
    [
      [300, 100],
      [64, 32],
    ],
    [
      [17, 640],
      [1, 128],
    ],
  ])('%p in blocks of %p, the last ones ragged', async (size, block) => {
    const codes = Uint8Array.from({ length: size[0] * size[1] }, (_, i) => finite((i * 37 + (i >> 8)) & 255));
    const blocks = blocksOf(size, block);
    const scales = Float32Array.from({ length: blocks[0] * blocks[1] }, (_, i) => 0.001 * (1 + i));
    const tensor = api.fromArray(scales, 'f32', blocks);
    const decoded = await api.decodeFp8(u8(codes, size), tensor, block);
    expect(differing(decoded.toArray(), decodeFp8(codes, scales, size, block))).toEqual([]);
    const half = await api.cast(tensor, 'bf16');
    const fromHalf = await api.decodeFp8(u8(codes, size), half, block);
    const rounded = half.toArray() as Float32Array;
    expect(differing(fromHalf.toArray(), decodeFp8(codes, rounded, size, block))).toEqual([]);
  });

  test('NaN, and arguments that do not fit', async () => {
    const scales = api.fromArray(Float32Array.of(1, 1, 1, 1), 'f32', [2, 2]);
    for (const nan of [0x7f, 0xff]) {
      const codes = new Uint8Array(150 * 200);
      codes[140 * 200 + 7] = nan;
      codes[149 * 200] = nan;
      await expectRejection(
        api.decodeFp8(u8(codes, [150, 200]), scales, [128, 128]),
        'NON_FINITE',
        '[140, 7]',
      );
    }
    const zeros = u8(new Uint8Array(150 * 200), [150, 200]);
    for (const bad of [NaN, Infinity]) {
      const broken = api.fromArray(Float32Array.of(1, 1, bad, 1), 'f32', [2, 2]);
      await expectRejection(api.decodeFp8(zeros, broken, [128, 128]), 'NON_FINITE', 'scale at [1, 0]');
    }
    expectError(() => api.decodeFp8(zeros, scales, [64, 128]), 'INVALID_ARGUMENT', 'scales must be [3, 2]');
    expectError(() => api.decodeFp8(zeros, scales, [0, 128]), 'INVALID_ARGUMENT', 'block');
    expectError(() => api.decodeFp8(scales, scales, [128, 128]), 'INVALID_ARGUMENT', 'u8');
    await expectRejection(api.decodeFp8(zeros, scales, [128, 128], Int32Array.of(1)), 'ABORTED');
  });
});

describe('MXFP4', () => {
  test('every code, in both nibbles, under every scale', async () => {
    const pairs = Uint8Array.from({ length: 256 }, (_, i) => i);
    const scales = Uint8Array.from({ length: 255 }, (_, i) => i);
    const blocks = new Uint8Array(255 * 256);
    for (const s of scales) blocks.set(pairs, s * 256);
    const perBlock = Uint8Array.from({ length: 255 * 16 }, (_, i) => i >> 4);
    const decoded = await api.decodeMxfp4(u8(blocks, [255, 256]), u8(perBlock, [255, 16]), {
      from: 0,
      step: 1,
      rows: 255,
    });
    expect([decoded.dtype, decoded.shape]).toEqual(['bf16', [255, 512]]);
    const expected = Float32Array.from(decodeMxfp4(blocks, perBlock), toBf16);
    expect(differing(decoded.toArray(), expected)).toEqual([]);
    // The ends of the range: 0.5 * 2^-127 is there, 2 * 2^127 is not.
    expect(decoded.toArray()[1 * 2]).toBe(2 ** -128);
    expect(expected.at(-1)).toBe(-Infinity);
  });

  test('rows of a part, NaN, and arguments that do not fit', async () => {
    const blocks = Uint8Array.from({ length: 6 * 32 }, (_, i) => (i * 11) & 255);
    const scales = Uint8Array.from({ length: 12 }, (_, i) => 120 + i);
    const all = decodeMxfp4(blocks, scales);
    const decode = (part: { from: number; step: number; rows: number }) =>
      api.decodeMxfp4(u8(blocks, [6, 32]), u8(scales, [6, 2]), part);
    const odd = await decode({ from: 1, step: 2, rows: 3 });
    expect(
      differing(
        odd.toArray(),
        [1, 3, 5].flatMap((r) => [...all.subarray(64 * r, 64 * r + 64)]),
      ),
    ).toEqual([]);
    expectError(() => decode({ from: 1, step: 2, rows: 4 }), 'INVALID_ARGUMENT', '4 rows', 'with 6');
    expectError(() => decode({ from: 0, step: 0, rows: 1 }), 'INVALID_ARGUMENT', 'step');
    scales[5] = 255;
    await decode({ from: 1, step: 2, rows: 3 });
    await expectRejection(decode({ from: 0, step: 2, rows: 3 }), 'NON_FINITE', 'scale at [2, 1]');
    expectError(
      () => api.decodeMxfp4(u8(blocks, [6, 32]), u8(scales, [12, 1]), { from: 0, step: 1, rows: 1 }),
      'INVALID_ARGUMENT',
      'blocks must be [12, 16]',
    );
  });
});

test('config.json of a published model', () => {
  const config = (quantization_config?: object) => normaliseConfig({ model_type: 'x', quantization_config });
  const fp8 = { quant_method: 'fp8', fmt: 'e4m3', activation_scheme: 'dynamic', weight_block_size: [64, 32] };
  expect(publishedFormat(config(fp8))).toBe('fp8');
  expect(publishedFormat(config({ quant_method: 'mxfp4', modules_to_not_convert: ['lm_head'] }))).toBe(
    'mxfp4',
  );
  expect([config(), config({ quant_method: 'gptq' })].map(publishedFormat)).toEqual([null, null]);
  expect(quantizationOf(config(fp8))).toBeNull();
  expect(fp8BlockSize(config(fp8))).toEqual([64, 32]);
  expect(fp8BlockSize(config({ quant_method: 'fp8' }))).toEqual([128, 128]);
  for (const weight_block_size of [[128], [128, 0], '128'])
    expectError(
      () => fp8BlockSize(config({ ...fp8, weight_block_size })),
      'INVALID_CHECKPOINT',
      'weight_block_size',
    );
});
