// Weights as they are published, brought into the form that the other kernels take: a float matrix [out, in].
//
// copy_part
//   SHAPES      m [a, b] of any element type -> [rows, b], or [rows, a] where transposed
//   DEFINITION  out[r, c] = m[from + r * step, c], or m[c, from + r * step] where transposed
//
// decode_fp8
//   SHAPES      codes u8 [rows, cols]; scales f32, f16 or bf16 [ceil(rows / block_rows), ceil(cols / block_cols)] -> bf16 [rows, cols]
//   DEFINITION  out[r, c] = bf16(e4m3(codes[r, c]) * scales[r / block_rows, c / block_cols]): the product in f32, then to nearest even
//   LAYOUT      a code is s eeee mmm. e > 0: (1 + m / 8) 2^(e - 7); e = 0: m / 8 2^-6. No infinity; 0x7f and 0xff are NaN.
//   LIMITS      A NaN code, or a scale that is not finite, is an error NON_FINITE with its place. Products too large become infinite.
//   Source      arXiv 2209.05433 (e4m3); DeepSeek-V3, arXiv 2412.19437 section 3.3, and weight_dequant of its published inference code
//
// decode_mxfp4
//   SHAPES      blocks u8 [a, 16 g]; scales u8 [a, g] -> bf16 [rows, 32 g]
//   DEFINITION  out[r, 32 j + i] = e2m1(code i of block j) * 2^(scales[a', j] - 127), a' = from + r * step; exact, or infinite
//   LAYOUT      a block of 32 codes takes 16 bytes, code 2 i in the low and 2 i + 1 in the high nibble of byte i. A code is s ee m:
//               0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
//   LIMITS      Scale 255 is NaN: an error NON_FINITE with its place.
//   Source      OCP Microscaling Formats (MX) Specification v1.0, sections 5.3 and 6.3
#pragma once
#include "core/tensor.h"

namespace eac {

// Rows from, from + step, ... of a matrix.
struct RowRange {
  int64_t from, step, rows;
};

Tensor copy_part(const Tensor& m, const RowRange& part, bool transposed);
Tensor decode_fp8(const Tensor& codes, const Tensor& scales, int64_t block_rows, int64_t block_cols);
Tensor decode_mxfp4(const Tensor& blocks, const Tensor& scales, const RowRange& part);

// The definitions, element by element.
Tensor copy_part_reference(const Tensor& m, const RowRange& part, bool transposed);
Tensor decode_fp8_reference(const Tensor& codes, const Tensor& scales, int64_t block_rows, int64_t block_cols);
Tensor decode_mxfp4_reference(const Tensor& blocks, const Tensor& scales, const RowRange& part);

}  // namespace eac
