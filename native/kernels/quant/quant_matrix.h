// A weight matrix quantized in groups of consecutive input channels.
//
// SHAPES      W (rows = out channels, cols = in channels); groups = ceil(cols / group_size), the last may be shorter.
// DEFINITION  W[r, c] = scale[r, c / group_size] * (code[r, c] - zero[r, c / group_size]),  0 <= code, zero < 2^bits
//             scale is an f16 value, kept as such so that memory and checkpoint agree bit for bit.
//             A symmetric matrix has zero = 2^(bits-1) everywhere.
// LAYOUT      One for all instruction sets. Rows lie in panels of 16, channels in blocks of 32, both padded (padding codes and scales
//             are 0). A block of a panel is a unit of 8 steps; a step holds 4 channels of 16 rows, as the dot-product instructions want
//             them: 64 codes, code 4 r + c = row r, channel 4 step + c. A unit packs them into vectors of 64 bytes, byte by byte:
//               2 bit: 2 vectors; vector i holds the steps 4 i .. 4 i + 3 in bits 0-1, 2-3, 4-5, 6-7
//               3 bit: 3 vectors; vector i holds the steps 2 i and 2 i + 1 in bits 0-2 and 3-5; the low two bits of steps 6 and 7 are
//                      bits 6-7 of vectors 0 and 1, their bit 2 is bit 6 and bit 7 of vector 2
//               4 bit: 4 vectors; vector i holds step 2 i in the low and step 2 i + 1 in the high nibble
//             A panel's units follow each other, and so do the panels: a product reads one stream. Scales and zero points lie
//             (panels, groups, 16).
// LIMITS      group_size is a positive multiple of 32 (so a block never straddles two groups), or >= cols.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "core/tensor.h"

namespace eac {

inline constexpr int64_t quant_block = 32;
inline constexpr int64_t quant_panel = 16;
constexpr int64_t quant_unit_bytes(int bits) { return bits * quant_block * quant_panel / 8; }

struct QuantMatrix {
  int bits = 4;
  int64_t rows = 0, cols = 0, group_size = 128;
  bool symmetric = false;
  Tensor codes;   // u8  (panels, blocks * quant_unit_bytes(bits))
  Tensor scales;  // f16 (panels, groups, 16)
  Tensor zeros;   // u8  (panels, groups, 16)

  int64_t panels() const { return (rows + quant_panel - 1) / quant_panel; }
  int64_t blocks() const { return (cols + quant_block - 1) / quant_block; }
  int64_t groups() const { return (cols + group_size - 1) / group_size; }
  int64_t panel_bytes() const { return blocks() * quant_unit_bytes(bits); }
  // Where the scale and the zero point of a row and group lie.
  int64_t param_index(int64_t row, int64_t group) const {
    return (row / quant_panel * groups() + group) * quant_panel + row % quant_panel;
  }
  uint16_t& scale(int64_t row, int64_t group) const { return scales.as<uint16_t>()[param_index(row, group)]; }
  uint8_t& zero(int64_t row, int64_t group) const { return zeros.as<uint8_t>()[param_index(row, group)]; }
};

}  // namespace eac
