#include <cmath>

#include "kernels/convert/convert.h"

namespace eac {
namespace {

Tensor result(DType dtype, int64_t rows, int64_t cols) { return Tensor::zeros(dtype, {rows, cols}); }

double e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  const double magnitude = exponent ? std::ldexp(1 + fraction / 8.0, exponent - 7) : std::ldexp(fraction / 8.0, -6);
  return code & 0x80 ? -magnitude : magnitude;
}
double e2m1(int code) {
  const int exponent = code >> 1 & 3, fraction = code & 1;
  const double magnitude = exponent ? std::ldexp(1 + fraction / 2.0, exponent - 1) : fraction / 2.0;
  return code & 8 ? -magnitude : magnitude;
}
}  // namespace

Tensor copy_part_reference(const Tensor& m, const RowRange& part, bool transposed) {
  const size_t size = dtype_size(m.dtype);
  Tensor out = result(m.dtype, part.rows, transposed ? m.rows() : m.cols());
  for (int64_t r = 0; r < part.rows; r++)
    for (int64_t c = 0; c < out.cols(); c++) {
      const int64_t channel = part.from + r * part.step, from = transposed ? c * m.cols() + channel : channel * m.cols() + c;
      std::memcpy(out.as<char>() + size_t(r * out.cols() + c) * size, m.as<char>() + size_t(from) * size, size);
    }
  return out;
}

Tensor decode_fp8_reference(const Tensor& codes, const Tensor& scales, int64_t block_rows, int64_t block_cols) {
  Tensor out = result(DType::bf16, codes.rows(), codes.cols());
  for (int64_t i = 0; i < codes.size(); i++) {
    const int64_t r = i / codes.cols(), c = i % codes.cols();
    const float scale = float(element(scales, r / block_rows * scales.cols() + c / block_cols));
    out.as<uint16_t>()[i] = f32_to_bf16(float(e4m3(codes.as<uint8_t>()[i])) * scale);
  }
  return out;
}

Tensor decode_mxfp4_reference(const Tensor& blocks, const Tensor& scales, const RowRange& part) {
  Tensor out = result(DType::bf16, part.rows, 32 * scales.cols());
  for (int64_t r = 0; r < part.rows; r++)
    for (int64_t c = 0; c < out.cols(); c++) {
      const int64_t row = part.from + r * part.step;
      const int byte = blocks.as<uint8_t>()[row * blocks.cols() + c / 2], code = c % 2 ? byte >> 4 : byte & 15;
      const int exponent = scales.as<uint8_t>()[row * scales.cols() + c / 32] - 127;
      out.as<uint16_t>()[r * out.cols() + c] = f32_to_bf16(float(std::ldexp(e2m1(code), exponent)));
    }
  return out;
}

}  // namespace eac
