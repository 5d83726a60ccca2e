/** The element types of safetensors files, and which of them can become a native tensor. */
import type { DType } from '../../types/native';

/** Bits an element takes in a file. */
const FILE_BITS: ReadonlyMap<string, number> = new Map([
  ['F64', 64],
  ['I64', 64],
  ['U64', 64],
  ['C64', 64],
  ['F32', 32],
  ['I32', 32],
  ['U32', 32],
  ['F16', 16],
  ['BF16', 16],
  ['I16', 16],
  ['U16', 16],
  ['BOOL', 8],
  ['U8', 8],
  ['I8', 8],
  ['F8_E4M3', 8],
  ['F8_E5M2', 8],
  ['F8_E8M0', 8],
  ['F8_E4M3FNUZ', 8],
  ['F8_E5M2FNUZ', 8],
  ['F6_E2M3', 6],
  ['F6_E3M2', 6],
  ['F4', 4],
]);

const NATIVE: ReadonlyMap<string, DType> = new Map([
  ['F32', 'f32'],
  ['F16', 'f16'],
  ['BF16', 'bf16'],
  ['F64', 'f64'],
  ['I32', 'i32'],
  ['U8', 'u8'],
  // Codes, to be decoded. Behind U8: a u8 tensor is written as U8.
  ['F8_E4M3', 'u8'],
]);

export const KNOWN_DTYPES: readonly string[] = [...FILE_BITS.keys()];
export const NATIVE_DTYPES: readonly string[] = [...NATIVE.keys()];
/** What weights may be stored as. */
export const WEIGHT_DTYPES: readonly string[] = ['F32', 'F16', 'BF16'];

/** The native dtype of a file's dtype, if there is one. */
export function nativeDType(dtype: string): DType | undefined {
  return NATIVE.get(dtype);
}

/** The file's spelling of a native dtype. */
export function fileDType(dtype: DType): string {
  for (const [name, value] of NATIVE) if (value === dtype) return name;
  return dtype.toUpperCase();
}

/** Bytes of one element; a fraction for sub-byte types, undefined for unknown ones. */
export function elementBytes(dtype: string): number | undefined {
  const bits = FILE_BITS.get(dtype);
  return bits === undefined ? undefined : bits / 8;
}

/** Bytes of a tensor, or undefined for an unknown dtype, a fraction of a byte, or a size beyond 2^53. */
export function tensorBytes(dtype: string, shape: readonly number[]): number | undefined {
  const bits = FILE_BITS.get(dtype);
  if (bits === undefined) return undefined;
  const total = shape.reduce((product, n) => product * n, bits);
  return total <= Number.MAX_SAFE_INTEGER && total % 8 === 0 ? total / 8 : undefined;
}
