// Blocked matrix products: operands are packed into panels once per k block, then tiles of C are computed from panels.
// Source of the blocking: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008); BLIS.
#include "kernels/matmul/gemm.h"

#include <algorithm>

#include "core/thread_pool.h"
#include "kernels/cpu/isa.h"
#include "kernels/matmul/scratch.h"

namespace eac {
namespace {

// k_block is part of the result (a sum over blocks of sums), so it is the same for every level, shape and thread count.
constexpr int64_t k_block = 256;
constexpr int64_t row_block = 168;     // rows of A that stay in L2 while panels of B pass; a multiple of every mr
constexpr int64_t super_block = 4032;  // rows and columns packed at a time: bounds the packed copies to 4 MB each in f32

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T> const GemmKernels<T>& kernels() {
  if constexpr (sizeof(T) == 4)
    return isa().gemm_f32;
  else
    return isa().gemm_f64;
}

template <class T> struct Product {
  int64_t m, n, k;
  T alpha;
  PackSource a, b;  // rows of A, columns of B
  bool accumulate;
  T* c;
  int64_t ldc;
  const float* scale = nullptr;  // (k) multiplies A while packing
  bool lower = false;            // only tiles that touch the lower triangle
};

PackSource offset(const PackSource& s, int64_t i, int64_t k) {
  return {(const char*)s.data + (i * s.stride + k * s.k_stride) * int64_t(dtype_size(s.dtype)), s.dtype, s.stride, s.k_stride};
}

// Calls body(i) for i in [0, n) here or on the pool.
template <class F> void for_each(bool parallel, int64_t n, F&& body) {
  if (parallel && n > 1) {
    parallel_for(n, body);
  } else {
    for (int64_t i = 0; i < n; i++) body(i);
  }
}

// One operand's panels for one k block, a panel after the other.
template <class T>
void pack_panels(bool parallel, const PackSource& s, int64_t width, int64_t count, int64_t k, const float* scale, T* out) {
  constexpr int64_t panels_per_task = 8;
  const int64_t panels = ceil_div(count, width);
  for_each(parallel, ceil_div(panels, panels_per_task), [&](int64_t task) {
    const int64_t end = std::min(panels, (task + 1) * panels_per_task);
    for (int64_t p = task * panels_per_task; p < end; p++)
      kernels<T>().pack(offset(s, p * width, 0), width, std::min(width, count - p * width), k, scale, out + p * width * k);
  });
}

// One block of rows times one range of columns, from packed panels. (i0, j0): where the packed part lies in C.
template <class T> void block_product(const Product<T>& p, const T* a, const T* b, int64_t i0, int64_t j0, int64_t rows_begin,
                                      int64_t rows_end, int64_t cols_begin, int64_t cols_end, int64_t k, bool accumulate) {
  const auto& kern = kernels<T>();
  for (int64_t j = cols_begin; j < cols_end; j += kern.nr)
    for (int64_t i = rows_begin; i < rows_end; i += kern.mr) {
      const int64_t rows = std::min<int64_t>(kern.mr, rows_end - i), cols = std::min<int64_t>(kern.nr, cols_end - j);
      if (p.lower && j0 + j > i0 + i + rows - 1) continue;
      kern.tile(k, p.alpha, a + i * k, b + j * k, accumulate, p.c + (i0 + i) * p.ldc + j0 + j, p.ldc, rows, cols);
    }
}

template <class T> void run(const Product<T>& p, bool parallel) {
  thread_local Scratch scratch_a, scratch_b;
  const auto& kern = kernels<T>();
  const int64_t threads = parallel ? thread_count() : 1;
  for (int64_t j0 = 0; j0 < p.n; j0 += super_block)
    for (int64_t i0 = 0; i0 < p.m; i0 += super_block) {
      const int64_t n = std::min(super_block, p.n - j0), m = std::min(super_block, p.m - i0);
      if (p.lower && j0 > i0 + m - 1) continue;
      T* a = scratch_a.get<T>(ceil_div(m, kern.mr) * kern.mr * std::min(p.k, k_block));
      T* b = scratch_b.get<T>(ceil_div(n, kern.nr) * kern.nr * std::min(p.k, k_block));
      // Narrower column ranges while there are too few pieces to keep all threads busy to the end.
      const int64_t row_pieces = ceil_div(m, row_block);
      int64_t width = threads == 1 ? super_block : 512;
      while (width > 64 && row_pieces * ceil_div(n, width) < 6 * threads) width /= 2;
      if (threads > 1)
        width = ceil_div(width, kern.nr) * kern.nr;
      else
        width = ceil_div(n, kern.nr) * kern.nr;
      for (int64_t k0 = 0; k0 < p.k; k0 += k_block) {
        const int64_t k = std::min(k_block, p.k - k0);
        pack_panels(parallel, offset(p.a, i0, k0), kern.mr, m, k, p.scale ? p.scale + k0 : nullptr, a);
        pack_panels(parallel, offset(p.b, j0, k0), kern.nr, n, k, nullptr, b);
        for_each(parallel, row_pieces * ceil_div(n, width), [&](int64_t task) {
          const int64_t i = task % row_pieces * row_block, j = task / row_pieces * width;
          block_product(p, a, b, i0, j0, i, std::min(m, i + row_block), j, std::min(n, j + width), k, p.accumulate || k0 > 0);
        });
      }
    }
}

template <class T> void gemm(int64_t m, int64_t n, int64_t k, T alpha, const Operand& a, const Operand& b, T beta, T* c,
                             int64_t ldc, bool parallel) {
  require(beta == 0 || beta == 1, "gemm: beta must be 0 or 1");
  if (m <= 0 || n <= 0) return;
  if (k <= 0) {
    if (beta == 0)
      for (int64_t i = 0; i < m; i++) std::fill_n(c + i * ldc, n, T(0));
    return;
  }
  const Product<T> p{.m = m,
                     .n = n,
                     .k = k,
                     .alpha = alpha,
                     .a = {a.data, a.dtype, a.row_stride, a.col_stride},
                     .b = {b.data, b.dtype, b.col_stride, b.row_stride},
                     .accumulate = beta == 1,
                     .c = c,
                     .ldc = ldc};
  run(p, parallel && thread_count() > 1 && double(m) * double(n) * double(k) > 1e6);
}

}  // namespace

void gemm_f32_serial(int64_t m, int64_t n, int64_t k, float alpha, Operand a, Operand b, float beta, float* c, int64_t ldc) {
  gemm(m, n, k, alpha, a, b, beta, c, ldc, false);
}
void gemm_f32(int64_t m, int64_t n, int64_t k, float alpha, Operand a, Operand b, float beta, float* c, int64_t ldc) {
  gemm(m, n, k, alpha, a, b, beta, c, ldc, true);
}
void gemm_f64(int64_t m, int64_t n, int64_t k, double alpha, Operand a, Operand b, double beta, double* c, int64_t ldc) {
  gemm(m, n, k, alpha, a, b, beta, c, ldc, true);
}

void syrk_f32(int64_t m, int64_t n, float alpha, const float* x, int64_t ldx, const float* w, float* c, int64_t ldc) {
  if (m <= 0 || n <= 0) return;
  const PackSource columns{x, DType::f32, 1, ldx};
  const Product<float> p{.m = n,
                         .n = n,
                         .k = m,
                         .alpha = alpha,
                         .a = columns,
                         .b = columns,
                         .accumulate = true,
                         .c = c,
                         .ldc = ldc,
                         .scale = w,
                         .lower = true};
  const bool parallel = thread_count() > 1 && double(n) * double(n) * double(m) > 1e6;
  run(p, parallel);
  constexpr int64_t edge = 64;  // mirrored in squares, so that reads and writes both stay in the cache
  const int64_t squares = ceil_div(n, edge);
  for_each(parallel, squares, [&](int64_t si) {
    for (int64_t sj = 0; sj <= si; sj++)
      for (int64_t i = si * edge; i < std::min(n, (si + 1) * edge); i++)
        for (int64_t j = sj * edge; j < std::min(i, (sj + 1) * edge); j++) c[j * ldc + i] = c[i * ldc + j];
  });
}

}  // namespace eac
