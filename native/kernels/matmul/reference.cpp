// The oracle of the matrix products: plain loops in f64, no vectors, no threads.
#include "kernels/matmul/gemm.h"

namespace eac {
namespace {

double weight(const Tensor& w, int64_t r, int64_t c) { return element(w, r * w.cols() + c); }

double weight(const QuantMatrix& q, int64_t r, int64_t c) {
  const uint8_t* block = q.codes.as<uint8_t>() + r * q.row_bytes() + c / quant_block * quant_block_bytes(q.bits);
  const int i = int(c % quant_block);
  const int code = q.bits == 4   ? (block[i % 16] >> (i / 16 * 4)) & 15
                   : q.bits == 2 ? (block[i % 8] >> (i / 8 * 2)) & 3
                                 : ((block[i % 8] >> (i / 8 * 2)) & 3) | ((block[8 + i / 8] >> (i % 8)) & 1) << 2;
  const int64_t g = r * q.groups() + c / q.group_size;
  return double(f16_to_f32(q.scales.as<uint16_t>()[g])) * (code - q.zeros.as<uint8_t>()[g]);
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

}  // namespace eac
