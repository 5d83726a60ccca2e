// The oracle of the matrix products: plain loops in f64, no vectors, no threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/matmul/int8.h"

namespace eac {
namespace {

double weight(const Tensor& w, int64_t r, int64_t c) { return element(w, r * w.cols() + c); }

int code_of(const QuantMatrix& q, int64_t r, int64_t c) {
  const uint8_t* unit = q.codes.as<uint8_t>() + r / quant_panel * q.panel_bytes() + c / quant_block * quant_unit_bytes(q.bits);
  const int i = int(r % quant_panel * 4 + c % 4), step = int(c % quant_block / 4);
  const int steps = 8 / q.bits;  // of a byte
  if (q.bits == 3 && step >= 6) return (unit[(step - 6) * 64 + i] >> 6) | (unit[128 + i] >> step & 1) << 2;
  return unit[step / steps * 64 + i] >> (step % steps * q.bits) & ((1 << q.bits) - 1);
}

double weight(const QuantMatrix& q, int64_t r, int64_t c) {
  const int64_t g = c / q.group_size;
  return double(f16_to_f32(q.scale(r, g))) * (code_of(q, r, c) - q.zero(r, g));
}

}  // namespace

void linear_reference(const float* x, int64_t ldx, int64_t n, const Matrix& w, const Tensor* bias, float beta, float* y,
                      int64_t ldy) {
  const int64_t out = out_features(w), in = in_features(w);
  std::visit(
      [&](const auto& m) {
        for (int64_t t = 0; t < n; t++)
          for (int64_t r = 0; r < out; r++) {
            double sum = bias ? element(*bias, r) : 0.0;
            for (int64_t c = 0; c < in; c++) sum += double(x[t * ldx + c]) * weight(m, r, c);
            y[t * ldy + r] = float(beta != 0 ? double(beta) * y[t * ldy + r] + sum : sum);
          }
      },
      w);
}

void linear_int8_reference(const float* x, int64_t ldx, int64_t n, const QuantMatrix& w, const Tensor* bias, float beta, float* y,
                           int64_t ldy) {
  const int64_t block = int8_block(w), blocks = (w.cols + block - 1) / block;
  std::vector<int> q(static_cast<size_t>(w.cols));
  std::vector<float> scale(static_cast<size_t>(blocks));
  for (int64_t t = 0; t < n; t++) {
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t begin = b * block, end = std::min(w.cols, begin + block);
      float largest = 0;
      for (int64_t c = begin; c < end; c++) largest = std::max(largest, std::fabs(x[t * ldx + c]));
      const float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
      scale[size_t(b)] = inverse == 0 ? 0 : largest / 127.0f;
      for (int64_t c = begin; c < end; c++) q[size_t(c)] = int(std::nearbyint(double(x[t * ldx + c]) * inverse));
    }
    for (int64_t r = 0; r < w.rows; r++) {
      float sum = 0;
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t begin = b * block, end = std::min(w.cols, begin + block), g = begin / w.group_size;
        int64_t dot = 0;
        for (int64_t c = begin; c < end; c++) dot += int64_t(q[size_t(c)]) * (code_of(w, r, c) - w.zero(r, g));
        sum = std::fma(float(dot) * scale[size_t(b)], f16_to_f32(w.scale(r, g)), sum);
      }
      if (bias) sum += float(element(*bias, r));
      y[t * ldy + r] = beta != 0 ? sum + y[t * ldy + r] : sum;
    }
  }
}

}  // namespace eac
