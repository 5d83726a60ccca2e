import fc from 'fast-check';
import { convertZeros, packBits, unpackBits, unpackZeros } from '../../lib/checkpoint/zeros';
import { errorOf } from './helpers';

test('2, 3 and 4 bit values across word borders', () => {
  // 3 bit: value 10 lies in bits 30 to 32.
  const words = new Int32Array(4);
  packBits(Uint8Array.from([...Array(10).fill(0), 5, 7]), words, 1, 3);
  expect([...words]).toEqual([0, 0b01 << 30, 0b1111, 0]);
  expect([...unpackBits(words, 1, 3, 12)]).toEqual([...Array(10).fill(0), 5, 7]);
  fc.assert(
    fc.property(
      fc.constantFrom(2, 3, 4),
      fc.array(fc.nat(15), { minLength: 1, maxLength: 70 }),
      fc.nat(2),
      (bits, raw, from) => {
        const values = Uint8Array.from(raw, (x) => x % 2 ** bits);
        const packed = new Int32Array(from + Math.ceil(values.length / 32) * bits);
        packBits(values, packed, from, bits);
        expect([...unpackBits(packed, from, bits, values.length)]).toEqual([...values]);
      },
    ),
  );
});

test('version 1 holds zero points minus one, each in its own bits', () => {
  const [groups, out] = [2, 33];
  for (const bits of [2, 3, 4]) {
    const zeros = Uint8Array.from({ length: groups * out }, (_, i) => 1 + ((i * 7) % (2 ** bits - 1)));
    const words = new Int32Array(groups * 2 * bits);
    for (let g = 0; g < groups; g++)
      packBits(zeros.subarray(g * out, (g + 1) * out), words, g * 2 * bits, bits);
    const first = { words: convertZeros({ words, groups, out, bits }, 1, 'x'), groups, out, bits };
    expect([...unpackZeros(first)]).toEqual([...zeros].map((z) => z - 1));
    expect([...convertZeros(first, 2, 'x')]).toEqual([...words]);
  }
});

test('what version 1 cannot tell is refused in both directions, with its place', () => {
  const words = new Int32Array(8);
  words[4] = 0x77777077;
  words.fill(0x77777777, 0, 4).fill(0x77777777, 5);
  const zero = errorOf(() => convertZeros({ words, groups: 2, out: 32, bits: 4 }, 1, "dir: 'a.qzeros'"));
  expect(zero.message).toMatch(
    /^dir: 'a\.qzeros' has zero point 0 at output channel 2, group 1, .* version 2/,
  );
  words[4] = 0x7777f777;
  const ones = errorOf(() => convertZeros({ words, groups: 2, out: 32, bits: 4 }, 2, "dir: 'a.qzeros'"));
  expect(ones.message).toMatch(/stores 15 .* output channel 3, group 1, .*gptq_v2/);
  expect([zero.code, ones.code]).toEqual(['UNSUPPORTED_MODEL', 'UNSUPPORTED_MODEL']);
});
