/** Expert shift: three rates over sets of chosen experts. */
import { countShift, ShiftMeter } from '../../lib/evaluate/shift';

test('compares sets, not their order', () => {
  expect(countShift(Int32Array.of(1, 2, 3, 4), Int32Array.of(4, 3, 2, 1), 4)).toEqual({
    tokens: 1,
    any: 0,
    half: 0,
    all: 0,
  });
});

test.each([
  [0, { any: 0, half: 0, all: 0 }],
  [1, { any: 1, half: 0, all: 0 }],
  [2, { any: 1, half: 1, all: 0 }],
  [3, { any: 1, half: 1, all: 0 }],
  [4, { any: 1, half: 1, all: 1 }],
])('%p of 4 experts changed', (changed, rates) => {
  const original = Int32Array.of(0, 1, 2, 3);
  const other = original.map((e, i) => (i < changed ? e + 10 : e));
  expect(countShift(original, other, 4)).toEqual({ tokens: 1, ...rates });
});

test('at least half of an odd number', () => {
  expect(countShift(Int32Array.of(0, 1, 2), Int32Array.of(0, 1, 9), 3).half).toBe(0);
  expect(countShift(Int32Array.of(0, 1, 2), Int32Array.of(0, 8, 9), 3).half).toBe(1);
  expect(countShift(Int32Array.of(0), Int32Array.of(1), 1)).toEqual({ tokens: 1, any: 1, half: 1, all: 1 });
});

test('the mean over layers and tokens, layers in order', () => {
  const meter = new ShiftMeter();
  meter.add(3, { tokens: 4, any: 4, half: 2, all: 1 });
  meter.add(1, { tokens: 2, any: 0, half: 0, all: 0 });
  meter.add(1, { tokens: 2, any: 2, half: 0, all: 0 });
  expect(meter.result()).toEqual({
    changedAny: 0.75,
    changedHalf: 0.25,
    changedAll: 0.125,
    layers: [
      { layer: 1, changedAny: 0.5, changedHalf: 0, changedAll: 0 },
      { layer: 3, changedAny: 1, changedHalf: 0.5, changedAll: 0.25 },
    ],
  });
});
