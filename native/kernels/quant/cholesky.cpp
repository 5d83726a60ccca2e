#include "kernels/quant/cholesky.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/thread_pool.h"
#include "kernels/matmul/gemm.h"
#include "kernels/matmul/scratch.h"

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

// A diagonal block's inverse: dividing by the block becomes a product, which runs at the speed of the vector kernels.
struct LeafInverse {
  double at[leaf * leaf] = {};
  LeafInverse(const double* l, int64_t n, int64_t ld) {
    for (int64_t i = 0; i < n; i++) std::copy_n(l + i * ld, i + 1, at + i * leaf);
    invert_leaf(at, n, leaf);
  }
};

// X (m × n) := alpha A B, of which one is X.
void replace_by_product(double* x, int64_t ld, int64_t m, int64_t n, int64_t k, double alpha, Operand a, Operand b) {
  thread_local Scratch scratch;
  double* product = scratch.get<double>(m * n);
  gemm_f64(m, n, k, alpha, a, b, 0.0, product, n);
  parallel_rows(m, 64, [&](int64_t r) { std::copy_n(product + r * n, n, x + r * ld); });
}

// X (m × n) := X L^-T.
void solve_right_transposed(double* x, int64_t m, const double* l, int64_t n, int64_t ld) {
  if (n <= leaf) {
    const LeafInverse inverse(l, n, ld);
    return replace_by_product(x, ld, m, n, n, 1.0, plain(x, ld), transposed(inverse.at, leaf));
  }
  const int64_t h = split(n);
  solve_right_transposed(x, m, l, h, ld);
  subtract_product(m, n - h, h, plain(x, ld), transposed(l + h * ld, ld), x + h, ld);
  solve_right_transposed(x + h, m, l + h * ld + h, n - h, ld);
}

// X (m × n) := X L^-1.
void solve_right(double* x, int64_t m, const double* l, int64_t n, int64_t ld) {
  if (n <= leaf) {
    const LeafInverse inverse(l, n, ld);
    return replace_by_product(x, ld, m, n, n, 1.0, plain(x, ld), plain(inverse.at, leaf));
  }
  const int64_t h = split(n);
  solve_right(x + h, m, l + h * ld + h, n - h, ld);
  subtract_product(m, h, n - h, plain(x + h, ld), plain(l + h * ld, ld), x, ld);
  solve_right(x, m, l, h, ld);
}

// X (n × m) := -L^-1 X.
void solve_left_negated(double* x, int64_t m, const double* l, int64_t n, int64_t ld) {
  if (n <= leaf) {
    const LeafInverse inverse(l, n, ld);
    return replace_by_product(x, ld, n, m, n, -1.0, plain(inverse.at, leaf), plain(x, ld));
  }
  const int64_t h = split(n);
  solve_left_negated(x, m, l, h, ld);
  gemm_f64(n - h, m, h, 1.0, plain(l + h * ld, ld), plain(x, ld), 1.0, x + h * ld, ld);  // the upper part is negated already
  solve_left_negated(x + h * ld, m, l + h * ld + h, n - h, ld);
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
