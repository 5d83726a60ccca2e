// A weight matrix quantized in groups of consecutive input channels.
//
// SHAPES      W (rows = out channels, cols = in channels); groups = ceil(cols / group_size), the last may be shorter.
// DEFINITION  W[r, c] = scale[r, c / group_size] * (code[r, c] - zero[r, c / group_size]),  0 <= code, zero < 2^bits
//             scale is an f16 value, kept as such so that memory and checkpoint agree bit for bit.
//             A symmetric matrix has zero = 2^(bits-1) everywhere.
// LAYOUT      Codes lie in blocks of 32 channels, a row after the other, cols padded up to 32 (padding codes are 0):
//               2 bit:  8 bytes; byte j holds the codes j, j+8, j+16, j+24 in bits 0-1, 2-3, 4-5, 6-7
//               3 bit: 12 bytes; 8 bytes with the low two bits as above, then 4 bytes: bit i = bit 2 of code i
//               4 bit: 16 bytes; byte j holds code j in its low and code j+16 in its high nibble
// LIMITS      group_size is a positive multiple of 32 (so a block never straddles two groups), or >= cols.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "core/tensor.h"

namespace eac {

inline constexpr int64_t quant_block = 32;
constexpr int64_t quant_block_bytes(int bits) { return bits * quant_block / 8; }

struct QuantMatrix {
  int bits = 4;
  int64_t rows = 0, cols = 0, group_size = 128;
  bool symmetric = false;
  Tensor codes;   // u8  (rows, blocks * quant_block_bytes(bits))
  Tensor scales;  // f16 (rows, groups)
  Tensor zeros;   // u8  (rows, groups)

  int64_t blocks() const { return (cols + quant_block - 1) / quant_block; }
  int64_t groups() const { return (cols + group_size - 1) / group_size; }
  int64_t row_bytes() const { return blocks() * quant_block_bytes(bits); }
};

}  // namespace eac
