// Dense matrix products over strided operands, f32 and f64.
//
// DEFINITION  C (m × n, row stride ldc) = beta * C + alpha * A (m × k) · B (k × n);  beta is 0 or 1, and C is not read when it is 0.
//             Operands are addressed by element strides, so a transpose is a swap of strides.
// REGULARITY  An element of C depends only on its row of A and its column of B: not on m, n, tiling or threads.
//             An element of Y (linear) likewise on its token, its row of W and its bias: one token alone (decoding) gets bit for bit
//             what it gets among many (prefill). The two families sum in different orders, and so do the instruction sets.
#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "kernels/matmul/matrix.h"

namespace eac {

struct Operand {
  const void* data;
  DType dtype;                     // f32, f16, bf16 (f64 with gemm_f64 only); converted while packing
  int64_t row_stride, col_stride;  // in elements
};

// On the calling thread only: for use inside a parallel_for body.
void gemm_f32_serial(int64_t m, int64_t n, int64_t k, float alpha, Operand a, Operand b, float beta, float* c, int64_t ldc);
// On the whole pool.
void gemm_f32(int64_t m, int64_t n, int64_t k, float alpha, Operand a, Operand b, float beta, float* c, int64_t ldc);
void gemm_f64(int64_t m, int64_t n, int64_t k, double alpha, Operand a, Operand b, double beta, double* c, int64_t ldc);
// C (n × n) += alpha * X^T diag(w) X with X (m × n), w (m) or null; both triangles are written and equal.
void syrk_f32(int64_t m, int64_t n, float alpha, const float* x, int64_t ldx, const float* w, float* c, int64_t ldc);

// Y (n × out, row stride ldy) = beta * Y + X (n × in, row stride ldx) · W^T (+ bias). beta 0 or 1. bias: f32/f16/bf16 (out) or null.
// Exact path: weights dequantized (without rounding: see kernels/cpu/simd.inl), f32 arithmetic throughout.
void linear(const float* x, int64_t ldx, int64_t n, const Matrix& w, const Tensor* bias, float beta, float* y, int64_t ldy);
// The rows [begin, end) of W only (columns of Y), on the calling thread: the piece that parallel kernels are made of.
// y points at column 0 of Y.
void linear_serial(const float* x, int64_t ldx, int64_t n, const Matrix& w, const Tensor* bias, int64_t begin, int64_t end,
                   float beta, float* y, int64_t ldy);

// The oracle: three plain loops in f64.
void linear_reference(const float* x, int64_t ldx, int64_t n, const Matrix& w, const Tensor* bias, float beta, float* y,
                      int64_t ldy);

}  // namespace eac
