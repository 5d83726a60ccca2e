#include <algorithm>
#include <cmath>
#include <vector>

#include "core/thread_pool.h"
#include "kernels/convert/convert.h"

namespace eac {
namespace {

// n codes under one scale; returns whether one of them is NaN. No branch and no table: the compiler makes vectors of it.
// The 7 bits of a magnitude, put where f32 has the end of its exponent and the top of its fraction, are 2^-120 times its value.
bool decode_span(const uint8_t* codes, int64_t n, float scale, uint16_t* out) {
  uint32_t nan = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint32_t code = codes[i], magnitude = code & 0x7fu;
    nan |= uint32_t(magnitude == 0x7fu);
    const float value = std::bit_cast<float>(magnitude << 20) * 0x1p120f;
    const uint32_t u = std::bit_cast<uint32_t>(value * scale);  // finite or infinite, so this rounding is f32_to_bf16's
    out[i] = uint16_t(((u + 0x7fffu + ((u >> 16) & 1u)) >> 16) ^ ((code & 0x80u) << 8));
  }
  return nan != 0;
}

std::string place(int64_t row, int64_t col) { return "[" + std::to_string(row) + ", " + std::to_string(col) + "]"; }

std::vector<float> finite_scales(const Tensor& scales) {
  std::vector<float> values(static_cast<size_t>(scales.size()));
  for (int64_t i = 0; i < scales.size(); i++) {
    values[size_t(i)] = float(element(scales, i));
    if (!std::isfinite(values[size_t(i)]))
      throw Error("NON_FINITE", "the scale at " + place(i / scales.cols(), i % scales.cols()) + " is NaN or infinite");
  }
  return values;
}

}  // namespace

Tensor decode_fp8(const Tensor& codes, const Tensor& scales, int64_t block_rows, int64_t block_cols) {
  const int64_t rows = codes.rows(), cols = codes.cols(), groups = scales.cols(), band = 16;
  const std::vector<float> scale = finite_scales(scales);
  Tensor out = Tensor::zeros(DType::bf16, {rows, cols});
  std::vector<uint8_t> nan(static_cast<size_t>((rows + band - 1) / band));
  parallel_for(int64_t(nan.size()), [&](int64_t b) {
    for (int64_t r = b * band; r < std::min(rows, (b + 1) * band); r++)
      for (int64_t j = 0, c = 0; c < cols; j++, c += block_cols)
        nan[size_t(b)] |= uint8_t(decode_span(codes.as<uint8_t>() + r * cols + c, std::min(block_cols, cols - c),
                                              scale[size_t(r / block_rows * groups + j)], out.as<uint16_t>() + r * cols + c));
  });
  for (size_t b = 0; b < nan.size(); b++)
    for (int64_t i = int64_t(b) * band * cols; nan[b] && i < codes.size(); i++)
      if ((codes.as<uint8_t>()[i] & 0x7f) == 0x7f)
        throw Error("NON_FINITE", "the code at " + place(i / cols, i % cols) + " is NaN");
  return out;
}

}  // namespace eac
