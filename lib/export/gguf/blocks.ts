/**
 * Quantized groups in ggml's block types. A weight of a group is s (q - z), with q of b <= 4 bit.
 *
 * DEFINITION  Q2_0  d (c - 1),  c of 2 bit  the groups of 2 bit with z = 1, and with z = 2 by d = -s
 *             Q4_0  d (c - 8),  c of 4 bit  all of 2 and 3 bit; of 4 bit those with z = 8, and with z = 7 by d = -s
 *             Q4_1  d c + m,    c of 4 bit  all with d = s; m = -s z is rounded to f16
 *             Q5_0  d (c - 16), c of 5 bit  all
 *             F16, F32                      the weights themselves
 *             What a type cannot hold is set to the nearest value it has.
 * LAYOUT      Q2_0  f16 d | 16 bytes: value 4 j + i in bits 2 i of byte j
 *             Q4_0  f16 d | 16 bytes: value j in the low half of byte j, value j + 16 in the high half;  Q4_1  f16 d | f16 m | the same
 *             Q5_0  f16 d | u32: bit 4 of value j in bit j | 16 bytes as Q4_0
 * Source      ggml-common.h, ggml-quants.c (https://github.com/ggml-org/llama.cpp)
 */
import { GGML_TYPES, type GgmlTypeName } from './writer';

/** By size. */
export const CANDIDATES = ['Q2_0', 'Q4_0', 'Q4_1', 'Q5_0', 'F16', 'F32'] as const satisfies GgmlTypeName[];
export type BlockTypeName = (typeof CANDIDATES)[number];

/** Codes in the memory of JavaScript, with what makes weights of them. */
export interface Codes {
  /** u8 [rows, cols] */
  codes: Uint8Array;
  /** [rows, groups]: the bits of f16, and the numbers. */
  scaleBits: Uint16Array;
  scales: Float32Array;
  zeros: Uint8Array;
  rows: number;
  cols: number;
  bits: number;
  groupSize: number;
}

const SIGNED: Partial<Record<BlockTypeName, { low: number; high: number }>> = {
  Q2_0: { low: -1, high: 2 },
  Q4_0: { low: -8, high: 7 },
  Q5_0: { low: -16, high: 15 },
};

interface Levels {
  /** Code in the block for each q. */
  codes: Uint8Array;
  /** The weight for each q, in units of s; NaN: not known without s. */
  values: Float64Array;
  negative: boolean;
}

const cache = new Map<string, Levels>();

/** How a type holds the group's levels q - z: with the sign of d under which fewer of them are cut off. */
function levelsOf(type: BlockTypeName, bits: number, zero: number): Levels {
  const key = `${type} ${bits} ${zero}`;
  const known = cache.get(key);
  if (known) return known;
  const { low, high } = SIGNED[type] ?? { low: -Infinity, high: Infinity };
  const top = 2 ** bits - 1;
  const cut = (from: number, to: number): number => Math.max(0, low - from) + Math.max(0, to - high);
  const negative = cut(zero - top, zero) < cut(-zero, top - zero);
  const sign = negative ? -1 : 1;
  const clamp = (level: number): number => Math.min(high, Math.max(low, level));
  const values = Float64Array.from({ length: top + 1 }, (_, q) => sign * clamp(sign * (q - zero)));
  const codes = Uint8Array.from({ length: top + 1 }, (_, q) => (SIGNED[type] ? sign * values[q]! - low : q));
  const levels = { codes, values, negative };
  cache.set(key, levels);
  return levels;
}

const half = new Float32Array(1);
const halfBits = new Uint32Array(half.buffer);

/** The bits of the f16 number nearest to x, ties to even; beyond its range, infinity. */
export function f16Bits(x: number): number {
  half[0] = x;
  const sign = (halfBits[0]! >>> 16) & 0x8000;
  const size = Math.abs(half[0]);
  if (!(size < 65520)) return sign | (size === size ? 0x7c00 : 0x7e00);
  // Below 2^-14 steps are of 2^-24, else of 2^(e - 10).
  const exponent = Math.max(-14, Math.floor(Math.log2(size || 1e-30)));
  const steps = size / 2 ** (exponent - 10);
  const even = roundEven(steps);
  // A carry runs into the exponent, as it should.
  return sign | (even + (exponent > -14 || even >= 1024 ? (exponent + 14) << 10 : 0));
}

function roundEven(x: number): number {
  const low = Math.floor(x);
  const rest = x - low;
  return rest > 0.5 || (rest === 0.5 && low % 2 === 1) ? low + 1 : low;
}

export function f16Value(bits: number): number {
  const fraction = bits & 0x3ff;
  const exponent = (bits >> 10) & 31;
  const size = exponent === 0 ? fraction * 2 ** -24 : (1 + fraction / 1024) * 2 ** (exponent - 15);
  return bits & 0x8000 ? -size : size;
}

/** Whether rows of this many channels, in groups of this size, are whole blocks that lie within groups. */
export function fits(type: BlockTypeName, cols: number, groupSize: number): boolean {
  const { values } = GGML_TYPES[type];
  return cols % values === 0 && (groupSize >= cols || groupSize % values === 0);
}

/** Squared error of a weight q of a group in a type. */
function squaredError(type: BlockTypeName, bits: number, scale: number, zero: number, q: number): number {
  if (type === 'F32') return 0;
  const weight = scale * (q - zero);
  if (type === 'F16') return (f16Value(f16Bits(weight)) - weight) ** 2;
  if (type === 'Q4_1') return (f16Value(f16Bits(-scale * zero)) + scale * zero) ** 2;
  return (scale * levelsOf(type, bits, zero).values[q]! - weight) ** 2;
}

export interface Loss {
  /** Sum of squared weights. */
  energy: number;
  /** Sum of squared errors, by candidate; Infinity where rows are not whole blocks. */
  errors: number[];
}

export const noLoss = (): Loss => ({ energy: 0, errors: CANDIDATES.map(() => 0) });

/** Adds to `loss` what each candidate makes of rows [begin, end). */
export function addLoss(m: Codes, begin: number, end: number, loss: Loss): void {
  const groups = m.scales.length / m.rows;
  const counts = new Uint32Array(2 ** m.bits);
  for (let row = begin; row < end; row++) {
    for (let g = 0; g < groups; g++) {
      const from = g * m.groupSize;
      const to = Math.min(m.cols, from + m.groupSize);
      counts.fill(0);
      for (let c = row * m.cols + from, stop = row * m.cols + to; c < stop; c++) counts[m.codes[c]!]!++;
      addGroup(m, m.scales[row * groups + g]!, m.zeros[row * groups + g]!, counts, loss);
    }
  }
}

function addGroup(m: Codes, scale: number, zero: number, counts: Uint32Array, loss: Loss): void {
  for (let q = 0; q < counts.length; q++) {
    if (counts[q] === 0) continue;
    loss.energy += counts[q]! * (scale * (q - zero)) ** 2;
    for (const [i, type] of CANDIDATES.entries()) {
      loss.errors[i]! += fits(type, m.cols, m.groupSize)
        ? counts[q]! * squaredError(type, m.bits, scale, zero, q)
        : Infinity;
    }
  }
}

/** Row `row` as blocks of a type, to `out` from byte `at`. Returns the byte behind it. */
export function encodeRow(m: Codes, row: number, type: BlockTypeName, out: DataView, at: number): number {
  const { values, bytes } = GGML_TYPES[type];
  const groups = m.scales.length / m.rows;
  for (let c = 0; c < m.cols; c += values, at += bytes) {
    const group = row * groups + Math.floor(c / m.groupSize);
    const [scale, zero] = [m.scales[group]!, m.zeros[group]!];
    const from = row * m.cols + c;
    if (type === 'F32') out.setFloat32(at, scale * (m.codes[from]! - zero), true);
    else if (type === 'F16') out.setUint16(at, f16Bits(scale * (m.codes[from]! - zero)), true);
    else {
      const { codes, negative } = levelsOf(type, m.bits, zero);
      out.setUint16(at, m.scaleBits[group]! ^ (negative ? 0x8000 : 0), true);
      if (type === 'Q4_1') out.setUint16(at + 2, f16Bits(-scale * zero), true);
      if (type === 'Q2_0') quarters(m.codes, from, codes, out, at + 2);
      else halves(m.codes, from, codes, out, at + bytes - 16);
      if (type === 'Q5_0') out.setUint32(at + 2, fifthBits(m.codes, from, codes), true);
    }
  }
  return at;
}

function quarters(q: Uint8Array, from: number, codes: Uint8Array, out: DataView, at: number): void {
  for (let j = 0; j < 16; j++, from += 4) {
    const [a, b, c, d] = [codes[q[from]!]!, codes[q[from + 1]!]!, codes[q[from + 2]!]!, codes[q[from + 3]!]!];
    out.setUint8(at + j, a | (b << 2) | (c << 4) | (d << 6));
  }
}

function halves(q: Uint8Array, from: number, codes: Uint8Array, out: DataView, at: number): void {
  for (let j = 0; j < 16; j++)
    out.setUint8(at + j, (codes[q[from + j]!]! & 15) | ((codes[q[from + j + 16]!]! & 15) << 4));
}

function fifthBits(q: Uint8Array, from: number, codes: Uint8Array): number {
  let bits = 0;
  for (let j = 0; j < 32; j++) bits |= (codes[q[from + j]!]! >> 4) << j;
  return bits >>> 0;
}
