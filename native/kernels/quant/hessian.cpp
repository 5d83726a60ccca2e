// Calibration statistics and what is solved from them: Hessian, cross moments, the factor of the inverse, two-stream targets.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/thread_pool.h"
#include "kernels/matmul/gemm.h"
#include "kernels/quant/cholesky.h"
#include "kernels/quant/quantize.h"

namespace eac {
namespace {

bool is_matrix(const Tensor& t, DType dtype) { return t.dtype == dtype && t.shape.size() == 2; }
bool is_square(const Tensor& t, int64_t n) { return is_matrix(t, DType::f32) && t.rows() == n && t.cols() == n; }

Operand plain(const float* a, int64_t ld) { return {a, DType::f32, ld, 1}; }
Operand transposed(const float* a, int64_t ld) { return {a, DType::f32, 1, ld}; }

void require_finite(const Tensor& h) {
  const int64_t n = h.rows();
  parallel_for(n, [&](int64_t i) {
    int bad = 0;
    for (int64_t j = 0; j < n; j++) bad |= !(std::fabs(h.f32()[i * n + j]) <= std::numeric_limits<float>::max());
    if (bad)
      throw Error("NOT_POSITIVE_DEFINITE",
                  "the Hessian holds NaN or infinity: the calibration activations overflowed, which no damping cures; "
                  "check the model and the calibration data before you raise the damping");
  });
}

}  // namespace

void accumulate_hessian(Tensor& h, const Tensor& x, const float* weights) {
  const int64_t n = x.cols();
  require(is_matrix(x, DType::f32) && is_square(h, n), "accumulate_hessian: X must be f32 (m, n) and H f32 (n, n)");
  if (x.rows() > 0) syrk_f32(x.rows(), n, 1.0f, x.f32(), n, weights, h.f32(), n);
}

void accumulate_cross(Tensor& d, const Tensor& x_full, const Tensor& x, const float* weights) {
  const int64_t m = x.rows(), n = x.cols();
  require(
      is_matrix(x, DType::f32) && is_matrix(x_full, DType::f32) && x_full.rows() == m && x_full.cols() == n && is_square(d, n),
      "accumulate_cross: both streams must be f32 (m, n) and D f32 (n, n)");
  constexpr int64_t chunk = 2048;  // the differences of this many tokens at a time
  Tensor diff = Tensor::zeros(DType::f32, {std::min(m, chunk), n});
  for (int64_t t0 = 0; t0 < m; t0 += chunk) {
    const int64_t count = std::min(chunk, m - t0);
    parallel_for(count, [&](int64_t t) {
      const float *full = x_full.f32() + (t0 + t) * n, *quantized = x.f32() + (t0 + t) * n;
      float* out = diff.f32() + t * n;
      const float w = weights ? weights[t0 + t] : 1.0f;
      for (int64_t j = 0; j < n; j++) out[j] = (full[j] - quantized[j]) * w;
    });
    gemm_f32(n, n, count, 1.0f, transposed(diff.f32(), n), plain(x.f32() + t0 * n, n), 1.0f, d.f32(), n);
  }
}

// With J the reversal of rows and columns and J H J = L L^T, H = (J L J)(J L J)^T where J L J is upper triangular,
// so U = J L^-1 J: one factorisation and one triangular inverse, and H^-1 itself is never formed.
HessianFactor factor_hessian(const Tensor& h, double damping, bool act_order) {
  const int64_t n = h.cols();
  require(n > 0 && is_square(h, n), "factor_hessian: H must be a square f32 matrix");
  require(damping >= 0 && std::isfinite(damping), "factor_hessian: the damping must be a number of at least 0");
  require_finite(h);
  double mean = 0;
  for (int64_t i = 0; i < n; i++) mean += double(h.f32()[i * n + i]) / double(n);
  const double added = damping * (mean > 0 ? mean : 1.0);

  HessianFactor f;
  f.n = n;
  f.act_order = act_order;
  f.diagonal.resize(n);
  f.order.resize(n);
  for (int64_t i = 0; i < n; i++) f.diagonal[i] = float(double(h.f32()[i * n + i]) + added);
  std::iota(f.order.begin(), f.order.end(), 0);
  if (act_order)
    std::stable_sort(f.order.begin(), f.order.end(), [&](int32_t a, int32_t b) { return f.diagonal[a] > f.diagonal[b]; });

  Tensor l = Tensor::zeros(DType::f64, {n, n});
  double* a = l.as<double>();
  parallel_for(n, [&](int64_t i) {
    const float* row = h.f32() + int64_t(f.order[n - 1 - i]) * n;
    for (int64_t j = 0; j <= i; j++) a[i * n + j] = row[f.order[n - 1 - j]];
    a[i * n + i] += added;
  });
  cholesky_lower(a, n, n);
  invert_lower(a, n, n);
  f.u = Tensor::zeros(DType::f32, {n, n});
  parallel_for(n, [&](int64_t i) {
    const double* row = a + (n - 1 - i) * n;
    for (int64_t j = i; j < n; j++) f.u.f32()[i * n + j] = float(row[n - 1 - j]);
  });
  return f;
}

Tensor two_stream_target(const Tensor& w, const HessianFactor& f, const Tensor& d, float beta) {
  const int64_t m = w.rows(), n = f.n;
  require(w.shape.size() == 2 && w.cols() == n && is_square(d, n),
          "two_stream_target: W must be (out, n) and D f32 (n, n), like the factor");
  require(w.dtype == DType::f32 || w.dtype == DType::f16 || w.dtype == DType::bf16,
          "two_stream_target: W must be f32, f16 or bf16");
  Tensor wd = Tensor::zeros(DType::f32, {m, n}), p = Tensor::zeros(DType::f32, {m, n});
  gemm_f32(m, n, n, 1.0f, {w.data, w.dtype, n, 1}, plain(d.f32(), n), 0.0f, wd.f32(), n);
  parallel_for(m, [&](int64_t r) {
    for (int64_t i = 0; i < n; i++) p.f32()[r * n + i] = wd.f32()[r * n + f.order[i]];
  });
  // (P U^T) U in strips of columns: U is triangular, so a strip needs only part of the sum.
  constexpr int64_t strip = 256;
  const float* u = f.u.f32();
  for (int64_t c = 0; c < n; c += strip)
    gemm_f32(m, std::min(strip, n - c), n - c, 1.0f, plain(p.f32() + c, n), transposed(u + c * n + c, n), 0.0f, wd.f32() + c, n);
  for (int64_t c = 0; c < n; c += strip) {
    const int64_t end = std::min(n, c + strip);
    gemm_f32(m, end - c, end, 1.0f, plain(wd.f32(), n), plain(u + c, n), 0.0f, p.f32() + c, n);
  }
  Tensor target = std::move(wd);
  parallel_for(m, [&](int64_t r) {
    for (int64_t i = 0; i < n; i++) {
      const int64_t at = r * n + f.order[i];
      target.f32()[at] = float(element(w, at) + double(beta) * p.f32()[r * n + i]);
    }
  });
  return target;
}

}  // namespace eac
