#include <algorithm>

#include "core/thread_pool.h"
#include "kernels/convert/convert.h"

namespace eac {
namespace {

constexpr float magnitudes[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};

// One block: what its 16 codes stand for under its scale, then a look-up a code.
void decode_block(const uint8_t* block, uint8_t scale, uint16_t* out) {
  const float power = std::bit_cast<float>(scale ? uint32_t(scale) << 23 : 0x00400000u);  // 2^-127 is subnormal
  uint16_t value[16];
  for (int code = 0; code < 8; code++) {
    value[code] = uint16_t(std::bit_cast<uint32_t>(magnitudes[code] * power) >> 16);  // two significant bits: nothing to round
    value[code + 8] = uint16_t(value[code] | 0x8000u);
  }
  for (int i = 0; i < 16; i++) {
    out[2 * i] = value[block[i] & 15];
    out[2 * i + 1] = value[block[i] >> 4];
  }
}

}  // namespace

Tensor decode_mxfp4(const Tensor& blocks, const Tensor& scales, const RowRange& part) {
  const int64_t groups = scales.cols(), band = 16;
  for (int64_t r = 0; r < part.rows; r++) {
    const int64_t row = part.from + r * part.step;
    const uint8_t* s = scales.as<uint8_t>() + row * groups;
    if (const uint8_t* nan = std::find(s, s + groups, uint8_t(255)); nan != s + groups)
      throw Error("NON_FINITE", "the scale at [" + std::to_string(row) + ", " + std::to_string(nan - s) + "] is NaN");
  }
  Tensor out = Tensor::zeros(DType::bf16, {part.rows, 32 * groups});
  parallel_for((part.rows + band - 1) / band, [&](int64_t b) {
    for (int64_t r = b * band; r < std::min(part.rows, (b + 1) * band); r++) {
      const int64_t row = part.from + r * part.step;
      for (int64_t j = 0; j < groups; j++)
        decode_block(blocks.as<uint8_t>() + (row * groups + j) * 16, scales.as<uint8_t>()[row * groups + j],
                     out.as<uint16_t>() + (r * groups + j) * 32);
    }
  });
  return out;
}

}  // namespace eac
