#include "kernels/nn/norm.h"

#include <cmath>
#include <vector>

#include "core/thread_pool.h"

namespace eac {
namespace {

std::vector<float> as_f32(const Tensor& t) {
  std::vector<float> v(size_t(t.size()));
  for (size_t i = 0; i < v.size(); i++) v[i] = float(element(t, int64_t(i)));
  return v;
}

}  // namespace

void rms_norm(const float* x, int64_t n, int64_t d, const Tensor& weight, float eps, float* y) {
  const std::vector<float> w = as_f32(weight);
  parallel_rows(n, 16, [&](int64_t i) {
    const float* xi = x + i * d;
    float* yi = y + i * d;
    double sum = 0;
    for (int64_t j = 0; j < d; j++) sum += double(xi[j]) * xi[j];
    const float r = float(1.0 / std::sqrt(sum / double(d) + eps));
    for (int64_t j = 0; j < d; j++) yi[j] = xi[j] * r * w[size_t(j)];
  });
}

void layer_norm(const float* x, int64_t n, int64_t d, const Tensor& weight, const Tensor& bias, float eps, float* y) {
  const std::vector<float> w = as_f32(weight), b = as_f32(bias);
  parallel_rows(n, 16, [&](int64_t i) {
    const float* xi = x + i * d;
    float* yi = y + i * d;
    double mean = 0, var = 0;
    for (int64_t j = 0; j < d; j++) mean += xi[j];
    mean /= double(d);
    for (int64_t j = 0; j < d; j++) var += (xi[j] - mean) * (xi[j] - mean);
    const float r = float(1.0 / std::sqrt(var / double(d) + eps)), m = float(mean);
    for (int64_t j = 0; j < d; j++) yi[j] = (xi[j] - m) * r * w[size_t(j)] + b[size_t(j)];
  });
}

}  // namespace eac
