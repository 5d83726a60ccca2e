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
// Long sums amortise what a tile of C costs to fetch and to store.
constexpr int64_t k_block = 512;
constexpr int64_t row_block = 168;      // rows of A that stay in L2 while panels of B pass; a multiple of every mr
constexpr int64_t depth = 2 * k_block;  // packed at a time: a block of C comes to L2 once for that many k
constexpr int64_t super_block = 2688;   // rows and columns packed at a time: bounds the packed copies to 11 MB each in f32

constexpr int64_t max_tile = 16 * 32;  // elements of the largest register tile, mr × nr
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
  bool lower = false;            // C is symmetric: compute its lower triangle and copy it to the upper one
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

// One operand's panels for k0 <= k < k0 + k of `depth`: for each k block its panels, one after the other.
template <class T> struct Panels {
  PackSource source;
  int64_t width, count, k;  // of a panel, of all rows (or columns), of the part of k
  const float* scale;
  T* out;
  int (*last_width)(int64_t);  // of the last panel, by how many rows it holds; null: like the others

  // Rows of memory along k: some panels a task. Rows of memory across panels: long pieces of some rows, or each would be a page of its own for
  // a few bytes; 16 at a time, so that all panels take theirs while the pages are at hand.
  bool across() const { return source.stride == 1; }
  int64_t task_panels() const { return across() ? ceil_div(1024, width) : 8; }
  int64_t task_k() const { return across() ? k_block / 4 : k_block; }
  int64_t panels() const { return ceil_div(count, width); }
  int64_t groups() const { return ceil_div(panels(), task_panels()); }
  int64_t tasks() const { return groups() * ceil_div(k, task_k()); }
  const T* block(int64_t k0) const { return out + panels() * width * k0; }
  void pack(int64_t task) const {
    const int64_t k0 = task / groups() * task_k(), k1 = std::min(k, k0 + task_k());
    const int64_t begin = k0 / k_block * k_block, n = std::min(k_block, k - begin);
    const int64_t first = task % groups() * task_panels(), end = std::min(panels(), first + task_panels());
    const int64_t step = across() ? 16 : k_block;
    for (int64_t q = k0; q < k1; q += step)
      for (int64_t p = first; p < end; p++) {
        const int64_t rows = std::min(width, count - p * width), height = last_width ? last_width(rows) : width;
        kernels<T>().pack(offset(source, p * width, q), height, rows, std::min(step, k1 - q), scale ? scale + q : nullptr,
                          out + panels() * width * begin + p * width * n + (q - begin) * height);
      }
  }
};

// Rows [i0, i1) and columns [j0, j1) of C.
struct Block {
  int64_t i0, i1, j0, j1;
};

// One block of C from packed panels of its rows and columns.
template <class T> void block_product(const Product<T>& p, const T* a, const T* b, const Block& at, int64_t k, bool accumulate) {
  const auto& kern = kernels<T>();
  for (int64_t j = at.j0; j < at.j1; j += kern.nr, b += kern.nr * k) {
    const T *panel = a, *next = b + kern.nr * k, *next_end = next + kern.nr * k;
    for (int64_t i = at.i0; i < at.i1; i += kern.mr, panel += kern.mr * k, next = std::min(next + tile_prefetch * k, next_end)) {
      const int64_t rows = std::min<int64_t>(kern.mr, at.i1 - i), cols = std::min<int64_t>(kern.nr, at.j1 - j);
      T* c = p.c + i * p.ldc + j;
      if (!p.lower || j + cols - 1 <= i) {
        kern.tile(k, p.alpha, panel, b, kern.nr, next, accumulate, c, p.ldc, rows, cols);
      } else if (j < i + rows) {  // a tile on the diagonal: its upper part belongs to mirror(), maybe of another task
        T copy[max_tile] = {};
        const auto lower = [&](int64_t r) { return std::clamp<int64_t>(i + r - j + 1, 0, cols); };
        for (int64_t r = 0; r < rows; r++) std::copy_n(c + r * p.ldc, lower(r), copy + r * cols);
        kern.tile(k, p.alpha, panel, b, kern.nr, next, accumulate, copy, cols, rows, cols);
        for (int64_t r = 0; r < rows; r++) std::copy_n(copy + r * cols, lower(r), c + r * p.ldc);
      }
    }
  }
}

// The elements of a block below the diagonal, copied to above it. In squares, so that reads and writes are whole cache lines.
void mirror(const Product<float>& p, const Block& at) {
  constexpr int64_t edge = 16;
  float square[edge * edge];
  const int64_t j1 = std::min(at.j1, at.i1);  // what lies further right is above the diagonal
  for (int64_t j = at.j0; j < j1; j += edge)
    for (int64_t i = std::max(at.i0, j); i < at.i1; i += edge) {
      const int64_t rows = std::min(edge, at.i1 - i), cols = std::min(edge, j1 - j);
      kernels<float>().pack({p.c + i * p.ldc + j, DType::f32, p.ldc, 1}, edge, rows, cols, nullptr, square);
      for (int64_t c = 0; c < cols; c++) {
        const int64_t skip = std::clamp<int64_t>(j + c - i, 0, rows);
        std::copy(square + c * edge + skip, square + c * edge + rows, p.c + (j + c) * p.ldc + i + skip);
      }
    }
}

// Columns that one task takes: fewer while there are too few tasks to keep all threads busy to the end.
int64_t task_columns(int64_t row_tasks, int64_t n, int64_t nr, int64_t threads) {
  int64_t width = 512;
  while (threads > 1 && width > 64 && row_tasks * ceil_div(n, width) < 6 * threads) width /= 2;
  return ceil_div(width, nr) * nr;
}

// The part of C and of k that is packed at a time.
template <class T> void pass(const Product<T>& p, bool parallel, const Block& at, int64_t k0) {
  thread_local Scratch scratch_a, scratch_b;
  const auto& kern = kernels<T>();
  const int64_t m = at.i1 - at.i0, n = at.j1 - at.j0, k = std::min(depth, p.k - k0);
  const Panels<T> a{offset(p.a, at.i0, k0),
                    kern.mr,
                    m,
                    k,
                    p.scale ? p.scale + k0 : nullptr,
                    scratch_a.get<T>(ceil_div(m, kern.mr) * kern.mr * k),
                    kern.height};
  const Panels<T> b{
      offset(p.b, at.j0, k0), kern.nr, n, k, nullptr, scratch_b.get<T>(ceil_div(n, kern.nr) * kern.nr * k), nullptr};
  for_each(parallel, a.tasks() + b.tasks(), [&](int64_t task) { task < a.tasks() ? a.pack(task) : b.pack(task - a.tasks()); });
  // Tasks in a row share rows of A, whose panels stay in L2.
  const int64_t row_tasks = ceil_div(m, row_block), width = task_columns(row_tasks, n, kern.nr, parallel ? thread_count() : 1),
                column_tasks = ceil_div(n, width);
  for_each(parallel, row_tasks * column_tasks, [&](int64_t task) {
    const int64_t i = task / column_tasks * row_block, j = task % column_tasks * width;
    const Block block{at.i0 + i, std::min(at.i1, at.i0 + i + row_block), at.j0 + j, std::min(at.j1, at.j0 + j + width)};
    if (p.lower && block.j0 >= block.i1) return;
    for (int64_t kb = 0; kb < k; kb += k_block) {
      const int64_t size = std::min(k_block, k - kb);
      block_product(p, a.block(kb) + i * size, b.block(kb) + j * size, block, size, p.accumulate || k0 + kb > 0);
    }
    if constexpr (sizeof(T) == 4)
      if (p.lower && k0 + k == p.k) mirror(p, block);
  });
}

template <class T> void run(const Product<T>& p, bool parallel) {
  for (int64_t j = 0; j < p.n; j += super_block)
    for (int64_t i = p.lower ? j : 0; i < p.m; i += super_block)
      for (int64_t k = 0; k < p.k; k += depth)
        pass(p, parallel, {i, std::min(p.m, i + super_block), j, std::min(p.n, j + super_block)}, k);
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
  run(p, thread_count() > 1 && double(n) * double(n) * double(m) > 1e6);
}

}  // namespace eac
