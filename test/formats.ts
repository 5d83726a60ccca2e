/** FP8 and MXFP4 in plain arithmetic, from their definitions: what the library's decoders are held against, and how the tests publish models. */
import type { TensorEntry } from '../lib/checkpoint/safetensors';
import type { SyntheticOptions } from './synthetic';

/** The number nearest to x in bf16, ties to even; x is an f32 number. */
export function toBf16(x: number): number {
  if (x === 0 || !Number.isFinite(x)) return x;
  const exponent = Math.max(-126, Math.floor(Math.log2(Math.abs(x))));
  // log2 may round up just below a power of two.
  const place = 2 ** (Math.abs(x) < 2 ** exponent && exponent > -126 ? exponent - 1 : exponent);
  const steps = (Math.abs(x) / place) * 128;
  const below = Math.floor(steps);
  const up = steps - below > 0.5 || (steps - below === 0.5 && below % 2 === 1);
  const rounded = ((up ? below + 1 : below) / 128) * place;
  return Math.sign(x) * (rounded >= 2 ** 128 ? Infinity : rounded);
}

/** The bits of numbers that bf16 can hold. */
export function bf16Bytes(values: ArrayLike<number>): Uint8Array {
  const bits = new Uint32Array(Float32Array.from(values).buffer);
  return new Uint8Array(Uint16Array.from(bits, (u) => u >>> 16).buffer);
}

export function fromBf16(bits: ArrayLike<number>): Float32Array {
  return new Float32Array(Uint32Array.from(bits, (u) => u << 16).buffer);
}

/** s eeee mmm, bias 7 */
export function e4m3(code: number): number {
  const [exponent, fraction] = [(code >> 3) & 15, code & 7];
  const magnitude =
    exponent === 15 && fraction === 7
      ? NaN
      : exponent === 0
        ? (fraction / 8) * 2 ** -6
        : (1 + fraction / 8) * 2 ** (exponent - 7);
  return code & 0x80 ? -magnitude : magnitude;
}

/** s ee m, bias 1 */
export function e2m1(code: number): number {
  return [0, 0.5, 1, 1.5, 2, 3, 4, 6][code & 7]! * (code & 8 ? -1 : 1);
}

/** Rows and columns of a matrix or block. */
export type Size = [number, number];

export const blocksOf = ([rows, cols]: Size, [r, c]: Size): Size => [
  Math.ceil(rows / r),
  Math.ceil(cols / c),
];

export function decodeFp8(
  codes: Uint8Array,
  scales: ArrayLike<number>,
  size: Size,
  block: Size,
): Float32Array {
  const across = blocksOf(size, block)[1];
  return Float32Array.from(codes, (code, i) => {
    const [row, col] = [Math.floor(i / size[1]), i % size[1]];
    const scale = scales[Math.floor(row / block[0]) * across + Math.floor(col / block[1])]!;
    // The product of two f32 numbers is exact in a double when one has four bits.
    return toBf16(Math.fround(e4m3(code) * scale));
  });
}

/** 32 codes a block along the inputs, scale 2^(s - 127), the low nibble first: [rows, groups * 16] and [rows, groups] -> [rows, groups * 32]. */
export function decodeMxfp4(blocks: Uint8Array, scales: Uint8Array): Float32Array {
  return Float32Array.from({ length: 2 * blocks.length }, (_, i) => {
    const byte = blocks[i >> 1]!;
    return e2m1(i % 2 === 0 ? byte & 15 : byte >> 4) * 2 ** (scales[Math.floor(i / 32)]! - 127);
  });
}

/** Index of the nearest of rising numbers. */
function nearest(sorted: number[], x: number): number {
  let [low, high] = [0, sorted.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle]! <= x) low = middle;
    else high = middle;
  }
  return x - sorted[low]! <= sorted[high]! - x ? low : high;
}

const E4M3 = Array.from({ length: 127 }, (_, code) => e4m3(code));
const E2M1 = Array.from({ length: 8 }, (_, code) => e2m1(code));

/** As DeepSeek-V3 publishes: the largest magnitude of a block becomes 448. */
export function encodeFp8(
  values: Float32Array,
  size: Size,
  block: Size,
): { codes: Uint8Array; scales: Float32Array } {
  const [down, across] = blocksOf(size, block);
  const scales = new Float32Array(down * across);
  const blockOf = (i: number) =>
    Math.floor(Math.floor(i / size[1]) / block[0]) * across + Math.floor((i % size[1]) / block[1]);
  values.forEach((v, i) => (scales[blockOf(i)] = Math.max(scales[blockOf(i)]!, Math.abs(v) / 448)));
  const codes = Uint8Array.from(values, (v, i) => {
    const code = nearest(E4M3, Math.abs(v) / scales[blockOf(i)]!);
    return v < 0 ? code | 0x80 : code;
  });
  return { codes, scales };
}

/** As gpt-oss is published: the largest magnitude of a block of 32 comes to lie below 8. */
export function encodeMxfp4(values: Float32Array): { blocks: Uint8Array; scales: Uint8Array } {
  const scales = new Uint8Array(values.length / 32);
  for (let g = 0; g < scales.length; g++) {
    const largest = values.subarray(32 * g, 32 * g + 32).reduce((a, b) => Math.max(a, Math.abs(b)), 0);
    scales[g] = largest === 0 ? 0 : Math.floor(Math.log2(largest)) - 2 + 127;
  }
  const code = (i: number): number => {
    const n = nearest(E2M1, Math.abs(values[i]!) / 2 ** (scales[Math.floor(i / 32)]! - 127));
    return values[i]! < 0 ? n | 8 : n;
  };
  return {
    blocks: Uint8Array.from({ length: values.length / 2 }, (_, i) => code(2 * i) | (code(2 * i + 1) << 4)),
    scales,
  };
}

/** A matrix as two tensors of a file. */
export function fp8Entries(name: string, values: Float32Array, size: Size, block: Size): TensorEntry[] {
  const { codes, scales } = encodeFp8(values, size, block);
  return [
    { name, dtype: 'F8_E4M3', shape: size, data: codes },
    {
      name: `${name}_scale_inv`,
      dtype: 'F32',
      shape: blocksOf(size, block),
      data: new Uint8Array(scales.buffer),
    },
  ];
}

/** Experts' matrices, [experts, rows, inputs], as two tensors of a file. */
export function mxfp4Entries(
  name: string,
  values: Float32Array,
  shape: [number, number, number],
): TensorEntry[] {
  const { blocks, scales } = encodeMxfp4(values);
  const groups = [shape[0], shape[1], shape[2] / 32];
  return [
    { name: `${name}_blocks`, dtype: 'U8', shape: [...groups, 16], data: blocks },
    { name: `${name}_scales`, dtype: 'U8', shape: groups, data: scales },
  ];
}

/**
 * For `writeSynthetic`: gathers experts' matrices and biases in the tensors that the family publishes, as bf16 or MXFP4 (biases stay bf16).
 */
export function fuseExperts(format: 'bf16' | 'mxfp4'): NonNullable<SyntheticOptions['store']> {
  const gathered = new Map<string, { all: Float32Array; left: number }>();
  return ({ fused }, bits) => {
    if (!fused) return undefined;
    const { tensor, expert, from, step } = fused;
    const [experts, a, b] = fused.shape as [number, number, number?];
    const [rows, inputs] = b === undefined ? [a, 1] : fused.transposed ? [b, a] : [a, b];
    const size = experts * rows * inputs;
    const group = gathered.get(tensor) ?? { all: new Float32Array(size), left: size };
    gathered.set(tensor, group);
    fromBf16(bits).forEach((value, i) => {
      const row = expert * rows + from + Math.floor(i / inputs) * step;
      group.all[row * inputs + (i % inputs)] = value;
    });
    group.left -= bits.length;
    if (group.left > 0) return [];
    if (format === 'mxfp4' && b !== undefined)
      return mxfp4Entries(tensor, group.all, [experts, rows, inputs]);
    const stored =
      b !== undefined && fused.transposed
        ? group.all.map((_, i) => {
            const [e, c, r] = [Math.floor(i / (rows * inputs)), Math.floor(i / rows) % inputs, i % rows];
            return group.all[(e * rows + r) * inputs + c]!;
          })
        : group.all;
    return [{ name: tensor, dtype: 'BF16', shape: fused.shape, data: bf16Bytes(stored) }];
  };
}
