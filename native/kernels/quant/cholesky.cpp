#include "kernels/quant/cholesky.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/thread_pool.h"
#include "kernels/matmul/gemm.h"

namespace eac {
namespace {

constexpr int64_t leaf = 64;        // below this size: plain loops
constexpr int64_t syrk_leaf = 256;  // below this size a full square is cheaper than its lower half in pieces

// Half of n, rounded so that the left part is a whole number of leaves.
int64_t split(int64_t n) { return (n / 2 + leaf - 1) / leaf * leaf; }

Operand plain(const double* a, int64_t ld) { return {a, DType::f64, ld, 1}; }
Operand transposed(const double* a, int64_t ld) { return {a, DType::f64, 1, ld}; }

void subtract_product(int64_t m, int64_t n, int64_t k, Operand a, Operand b, double* c, int64_t ldc) {
  gemm_f64(m, n, k, -1.0, a, b, 1.0, c, ldc);
}

// Runs body(begin, end) over pieces of [0, n).
void parallel_ranges(int64_t n, int64_t piece, FunctionRef<void(int64_t, int64_t)> body) {
  parallel_for((n + piece - 1) / piece, [&](int64_t i) { body(i * piece, std::min(n, (i + 1) * piece)); });
}

// X (m × n) := X L^-T. The rows are independent; the leaf transposes L so that updates run along a row.
void solve_right_transposed(double* x, int64_t m, const double* l, int64_t n, int64_t ld) {
  if (n > leaf) {
    const int64_t h = split(n);
    solve_right_transposed(x, m, l, h, ld);
    subtract_product(m, n - h, h, plain(x, ld), transposed(l + h * ld, ld), x + h, ld);
    solve_right_transposed(x + h, m, l + h * ld + h, n - h, ld);
    return;
  }
  double lt[leaf * leaf];
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j <= i; j++) lt[j * leaf + i] = l[i * ld + j];
  parallel_ranges(m, leaf, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      double* row = x + r * ld;
      for (int64_t j = 0; j < n; j++) {
        const double v = row[j] /= lt[j * leaf + j];
        for (int64_t k = j + 1; k < n; k++) row[k] -= v * lt[j * leaf + k];
      }
    }
  });
}

// X (m × n) := X L^-1.
void solve_right(double* x, int64_t m, const double* l, int64_t n, int64_t ld) {
  if (n > leaf) {
    const int64_t h = split(n);
    solve_right(x + h, m, l + h * ld + h, n - h, ld);
    subtract_product(m, h, n - h, plain(x + h, ld), plain(l + h * ld, ld), x, ld);
    solve_right(x, m, l, h, ld);
    return;
  }
  parallel_ranges(m, leaf, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      double* row = x + r * ld;
      for (int64_t j = n - 1; j >= 0; j--) {
        const double v = row[j] /= l[j * ld + j];
        for (int64_t k = 0; k < j; k++) row[k] -= v * l[j * ld + k];
      }
    }
  });
}

// X (n × m) := -L^-1 X. The columns are independent.
void solve_left_negated(double* x, int64_t m, const double* l, int64_t n, int64_t ld) {
  if (n > leaf) {
    const int64_t h = split(n);
    solve_left_negated(x, m, l, h, ld);
    gemm_f64(n - h, m, h, 1.0, plain(l + h * ld, ld), plain(x, ld), 1.0, x + h * ld, ld);  // the upper part is negated already
    solve_left_negated(x + h * ld, m, l + h * ld + h, n - h, ld);
    return;
  }
  parallel_ranges(m, leaf, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < n; i++) {
      double* row = x + i * ld;
      const double scale = -1.0 / l[i * ld + i];
      for (int64_t k = 0; k < i; k++) {
        const double v = l[i * ld + k];
        const double* done = x + k * ld;  // holds -solution, hence the plus
        for (int64_t c = begin; c < end; c++) row[c] += v * done[c];
      }
      for (int64_t c = begin; c < end; c++) row[c] *= scale;
    }
  });
}

// The lower triangle of C (n × n) -= A A^T, A (n × k).
void subtract_gram(double* c, const double* a, int64_t n, int64_t k, int64_t ld) {
  if (n <= syrk_leaf) return subtract_product(n, n, k, plain(a, ld), transposed(a, ld), c, ld);
  const int64_t h = split(n);
  subtract_gram(c, a, h, k, ld);
  subtract_product(n - h, h, k, plain(a + h * ld, ld), transposed(a, ld), c + h * ld, ld);
  subtract_gram(c + h * ld + h, a + h * ld, n - h, k, ld);
}

void cholesky_leaf(double* a, int64_t n, int64_t ld) {
  for (int64_t j = 0; j < n; j++) {
    double pivot = a[j * ld + j];
    for (int64_t k = 0; k < j; k++) pivot -= a[j * ld + k] * a[j * ld + k];
    if (!(pivot > 0 && pivot <= std::numeric_limits<double>::max()))
      throw Error("NOT_POSITIVE_DEFINITE", "the Hessian is not positive definite even with its damping: raise the damping");
    const double d = std::sqrt(pivot);
    a[j * ld + j] = d;
    for (int64_t i = j + 1; i < n; i++) {
      double s = a[i * ld + j];
      for (int64_t k = 0; k < j; k++) s -= a[i * ld + k] * a[j * ld + k];
      a[i * ld + j] = s / d;
    }
  }
}

void invert_leaf(double* l, int64_t n, int64_t ld) {
  for (int64_t j = 0; j < n; j++) {
    l[j * ld + j] = 1 / l[j * ld + j];
    for (int64_t i = j + 1; i < n;
         i++) {  // rows above i hold the inverse's column j already; row i still holds L, its diagonal too
      double s = 0;
      for (int64_t k = j; k < i; k++) s += l[i * ld + k] * l[k * ld + j];
      l[i * ld + j] = -s / l[i * ld + i];
    }
  }
}

}  // namespace

void cholesky_lower(double* a, int64_t n, int64_t ld) {
  if (n <= leaf) return cholesky_leaf(a, n, ld);
  const int64_t h = split(n);
  double *a21 = a + h * ld, *a22 = a21 + h;
  cholesky_lower(a, h, ld);
  solve_right_transposed(a21, n - h, a, h, ld);
  subtract_gram(a22, a21, n - h, h, ld);
  cholesky_lower(a22, n - h, ld);
}

void invert_lower(double* l, int64_t n, int64_t ld) {
  if (n <= leaf) return invert_leaf(l, n, ld);
  const int64_t h = split(n);
  double *l21 = l + h * ld, *l22 = l21 + h;
  solve_left_negated(l21, h, l22, n - h, ld);
  solve_right(l21, n - h, l, h, ld);
  invert_lower(l, h, ld);
  invert_lower(l22, n - h, ld);
}

}  // namespace eac
