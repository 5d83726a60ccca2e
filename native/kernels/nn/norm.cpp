#include "kernels/nn/norm.h"

#include <cmath>

#include "core/thread_pool.h"
#include "kernels/cpu/isa.h"
#include "kernels/matmul/scratch.h"

namespace eac {
namespace {

// The tensor's own values, or a copy in the scratch.
const float* as_f32(const Tensor& t, Scratch& scratch) {
  if (t.dtype == DType::f32) return t.f32();
  float* copy = scratch.get<float>(t.size());
  isa().to_f32(t.dtype, t.data, t.size(), copy);
  return copy;
}

float inverse_root(double squares, int64_t d, float eps) { return float(1.0 / std::sqrt(squares / double(d) + double(eps))); }

}  // namespace

void rms_norm(const float* x, int64_t n, int64_t d, const Tensor& weight, float eps, float* y) {
  thread_local Scratch scratch;
  const float* w = as_f32(weight, scratch);
  parallel_rows(n, 16, [&](int64_t i) {
    const float* xi = x + i * d;
    isa().normalize(xi, d, 0, inverse_root(isa().squares_f64(xi, d, 0), d, eps), w, nullptr, y + i * d);
  });
}

void layer_norm(const float* x, int64_t n, int64_t d, const Tensor& weight, const Tensor& bias, float eps, float* y) {
  thread_local Scratch weight_scratch, bias_scratch;
  const float *w = as_f32(weight, weight_scratch), *b = as_f32(bias, bias_scratch);
  parallel_rows(n, 16, [&](int64_t i) {
    const float* xi = x + i * d;
    const float mean = float(isa().sum_f64(xi, d) / double(d));
    isa().normalize(xi, d, mean, inverse_root(isa().squares_f64(xi, d, mean), d, eps), w, b, y + i * d);
  });
}

}  // namespace eac
