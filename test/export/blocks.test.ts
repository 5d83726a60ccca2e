/** ggml's block types: read back by the definitions of ggml-quants.c. */
import fc from 'fast-check';
import {
  addLoss,
  CANDIDATES,
  encodeRow,
  f16Bits,
  f16Value,
  fits,
  noLoss,
  type BlockTypeName,
  type Codes,
} from '../../lib/export/gguf/blocks';
import { GGML_TYPES } from '../../lib/export/gguf/writer';
import { native } from '../../lib/native';

/** dequantize_row_*, value by value. */
function decode(type: BlockTypeName, data: DataView, count: number): number[] {
  const { values, bytes } = GGML_TYPES[type];
  const half = (at: number) => f16Value(data.getUint16(at, true));
  return Array.from({ length: count }, (_, i) => {
    const at = Math.floor(i / values) * bytes;
    const j = i % values;
    const nibble = (from: number) => (data.getUint8(from + (j % 16)) >> (j < 16 ? 0 : 4)) & 15;
    switch (type) {
      case 'Q2_0':
        return half(at) * (((data.getUint8(at + 2 + (j >> 2)) >> (2 * (j & 3))) & 3) - 1);
      case 'Q4_0':
        return half(at) * (nibble(at + 2) - 8);
      case 'Q4_1':
        return half(at) * nibble(at + 4) + half(at + 2);
      case 'Q5_0':
        return half(at) * ((nibble(at + 6) | (((data.getUint32(at + 2, true) >>> j) & 1) << 4)) - 16);
      case 'F16':
        return half(at);
      case 'F32':
        return data.getFloat32(at, true);
    }
  });
}

function matrix(bits: number, zeros: (group: number) => number, groupSize = 64, rows = 3, cols = 192): Codes {
  const groups = Math.ceil(cols / groupSize);
  const scaleBits = Uint16Array.from({ length: rows * groups }, (_, i) => f16Bits(0.01 + 0.0007 * i));
  return {
    codes: Uint8Array.from({ length: rows * cols }, (_, i) => (i * 7 + (i >> 4)) % 2 ** bits),
    scaleBits,
    scales: Float32Array.from(scaleBits, f16Value),
    zeros: Uint8Array.from({ length: rows * groups }, (_, g) => zeros(g)),
    rows,
    cols,
    bits,
    groupSize,
  };
}

function roundTrip(m: Codes, type: BlockTypeName): { weights: number[]; found: number[] } {
  const { values, bytes } = GGML_TYPES[type];
  const rowBytes = (m.cols / values) * bytes;
  const groups = m.scales.length / m.rows;
  const weights: number[] = [];
  const found: number[] = [];
  for (let row = 0; row < m.rows; row++) {
    const data = new DataView(new ArrayBuffer(rowBytes + 1));
    expect(encodeRow(m, row, type, data, 0)).toBe(rowBytes);
    found.push(...decode(type, data, m.cols));
    for (let c = 0; c < m.cols; c++) {
      const g = row * groups + Math.floor(c / m.groupSize);
      weights.push(m.scales[g]! * (m.codes[row * m.cols + c]! - m.zeros[g]!));
    }
  }
  return { weights, found };
}

test.each<[BlockTypeName, number, string, (g: number) => number]>([
  ['Q2_0', 2, 'zero points 1 and 2', (g) => 1 + (g % 2)],
  ['Q4_0', 2, 'any zero point', (g) => g % 4],
  ['Q4_0', 3, 'any zero point', (g) => g % 8],
  ['Q4_0', 4, 'zero points 7 and 8', (g) => 7 + (g % 2)],
  ['Q5_0', 4, 'any zero point', (g) => (5 * g) % 16],
  ['Q4_1', 4, 'zero point 0', () => 0],
])('%s holds %d bit exactly: %s', (type, bits, _, zeros) => {
  const m = matrix(bits, zeros);
  const { weights, found } = roundTrip(m, type);
  expect(found.every((x, i) => x === weights[i])).toBe(true);
  const loss = noLoss();
  addLoss(m, 0, m.rows, loss);
  expect(loss.errors[CANDIDATES.indexOf(type)]).toBe(0);
});

test.each(CANDIDATES)('%s: the loss told is that of the bytes written', (type) => {
  for (const bits of [2, 3, 4]) {
    const m = matrix(bits, (g) => (3 * g) % 2 ** bits);
    const { weights, found } = roundTrip(m, type);
    const loss = noLoss();
    addLoss(m, 0, 1, loss);
    addLoss(m, 1, m.rows, loss);
    const squares = weights.map((w, i) => (found[i]! - (type === 'F32' ? Math.fround(w) : w)) ** 2);
    const error = squares.reduce((a, b) => a + b, 0);
    expect(loss.errors[CANDIDATES.indexOf(type)]).toBeCloseTo(error, 12);
    expect(loss.energy).toBeCloseTo(
      weights.reduce((sum, w) => sum + w * w, 0),
      9,
    );
    // Q4_1 rounds the minimum only: a thousandth of a step.
    if (type === 'Q4_1') expect(Math.sqrt(error / loss.energy)).toBeLessThan(1e-3);
  }
});

test('blocks lie within groups', () => {
  expect(fits('Q2_0', 128, 32)).toBe(false);
  expect(fits('Q2_0', 96, 64)).toBe(false);
  expect(fits('Q4_0', 96, 64)).toBe(true);
  expect(fits('Q4_0', 40, 32)).toBe(false);
  expect(fits('F32', 7, 3)).toBe(true);
  const loss = noLoss();
  addLoss(
    matrix(4, () => 8, 48),
    0,
    3,
    loss,
  );
  expect(loss.errors.map(Number.isFinite)).toEqual([false, false, false, false, true, true]);
});

test('f16: as the native conversion, and back', () => {
  const check = (values: number[]) => {
    const converted = new Uint16Array(
      native().fromArray(Float32Array.from(values), 'f16', [values.length]).toBytes().slice().buffer,
    );
    expect(values.map(f16Bits)).toEqual([...converted]);
  };
  check([
    0,
    -0,
    1,
    -1,
    65504,
    65519,
    65520,
    -1e9,
    Infinity,
    2 ** -14,
    2 ** -24,
    2 ** -25,
    1.5 * 2 ** -24,
    6.1e-5,
  ]);
  check([1 + 2 ** -11, 1 + 3 * 2 ** -11, 2047.9, 0.99999, 2.5 * 2 ** -24, 2 ** -14 - 2 ** -26]);
  fc.assert(fc.property(fc.float({ noNaN: true }), (x) => check([x, x * 2 ** -20])));
  for (let bits = 0; bits < 0x7c00; bits += 13) expect(f16Bits(f16Value(bits))).toBe(bits);
});
