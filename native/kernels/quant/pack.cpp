// Codes in and out of the two layouts: the panels of quant_matrix.h, and the GPTQ v2 checkpoint layout of quantize.h.
#include <algorithm>
#include <vector>

#include "core/thread_pool.h"
#include "kernels/quant/group_params.h"

namespace eac {
namespace {

// Where the codes of a step lie in the bytes of a unit: `low` bits at `shift` of a vector, the rest of them, if any, one bit elsewhere.
struct Place {
  int vector, shift, low;
  int high_vector = 0, high_shift = 0;
};
Place place_of(int bits, int step) {
  if (bits == 3 && step >= 6) return {step - 6, 6, 2, 2, step};
  const int steps = 8 / bits;
  return {step / steps, step % steps * bits, bits};
}

// One unit: the codes (16 rows, 32 channels) of a panel's block, and back. `codes` rows are `stride` apart; step s of byte i lies at
// codes[i / 4][4 s + i % 4].
void pack_unit(const uint8_t* codes, int64_t stride, int bits, uint8_t* out) {
  std::fill_n(out, quant_unit_bytes(bits), uint8_t(0));
  for (int s = 0; s < 8; s++) {
    const Place at = place_of(bits, s);
    for (int i = 0; i < 64; i++) {
      const uint8_t c = codes[i / 4 * stride + i % 4 + 4 * s];
      out[64 * at.vector + i] |= uint8_t((c & ((1 << at.low) - 1)) << at.shift);
      if (at.low < bits) out[64 * at.high_vector + i] |= uint8_t(c >> at.low << at.high_shift);
    }
  }
}

void unpack_unit(const uint8_t* in, int bits, uint8_t* codes, int64_t stride) {
  for (int s = 0; s < 8; s++) {
    const Place at = place_of(bits, s);
    for (int i = 0; i < 64; i++) {
      int c = in[64 * at.vector + i] >> at.shift & ((1 << at.low) - 1);
      if (at.low < bits) c |= (in[64 * at.high_vector + i] >> at.high_shift & 1) << at.low;
      codes[i / 4 * stride + i % 4 + 4 * s] = uint8_t(c);
    }
  }
}

// codes (32) -> a little-endian bit string of `bits` words; word w goes to out[w * stride].
void pack_words(const uint8_t* c, int bits, int32_t* out, int64_t stride) {
  uint64_t pending = 0;
  int held = 0;
  for (int i = 0; i < 32; i++) {
    pending |= uint64_t(c[i]) << held;
    held += bits;
    if (held >= 32) {
      *out = int32_t(uint32_t(pending));
      out += stride;
      pending >>= 32;
      held -= 32;
    }
  }
}

void unpack_words(const int32_t* in, int64_t stride, int bits, uint8_t* c) {
  uint64_t pending = 0;
  int held = 0;
  for (int i = 0; i < 32; i++) {
    if (held < bits) {
      pending |= uint64_t(uint32_t(*in)) << held;
      in += stride;
      held += 32;
    }
    c[i] = uint8_t(pending & ((1u << bits) - 1));
    pending >>= bits;
    held -= bits;
  }
}

int64_t blocks_of(int64_t n) { return (n + quant_block - 1) / quant_block; }

void require_tensor(const Tensor& t, DType dtype, int64_t rows, int64_t cols, const char* message) {
  require(t.dtype == dtype && t.size() == rows * cols && t.cols() == cols, message);
}

}  // namespace

QuantMatrix make_quant_matrix(int64_t rows, int64_t cols, int bits, int64_t group_size, bool symmetric) {
  require(bits >= 2 && bits <= 4, "bits must be 2, 3 or 4");
  require(cols > 0 && rows >= 0, "a quantized matrix needs at least one column");
  require(group_size > 0 && (group_size % quant_block == 0 || group_size >= cols),
          "the group size must be a positive multiple of 32, or at least the number of columns");
  QuantMatrix q;
  q.bits = bits, q.rows = rows, q.cols = cols, q.group_size = group_size, q.symmetric = symmetric;
  q.codes = Tensor::zeros(DType::u8, {q.panels(), q.panel_bytes()});
  q.scales = Tensor::zeros(DType::f16, {q.panels(), q.groups(), quant_panel});
  q.zeros = Tensor::zeros(DType::u8, {q.panels(), q.groups(), quant_panel});
  return q;
}

void pack_panel(const uint8_t* codes, int64_t panel, QuantMatrix& q) {
  uint8_t* out = q.codes.as<uint8_t>() + panel * q.panel_bytes();
  const int64_t rows = std::min(quant_panel, q.rows - panel * quant_panel);
  for (int64_t b = 0; b < q.blocks(); b++, out += quant_unit_bytes(q.bits)) {
    const int64_t c = b * quant_block, used = std::min(quant_block, q.cols - c);
    if (rows == quant_panel && used == quant_block) {
      pack_unit(codes + c, q.cols, q.bits, out);
      continue;
    }
    uint8_t edge[quant_panel * quant_block] = {};
    for (int64_t r = 0; r < rows; r++) std::copy_n(codes + r * q.cols + c, used, edge + r * quant_block);
    pack_unit(edge, quant_block, q.bits, out);
  }
}

Tensor unpack_codes(const QuantMatrix& q) {
  Tensor codes = Tensor::zeros(DType::u8, {q.rows, q.cols});
  parallel_for(q.panels(), [&](int64_t p) {
    const uint8_t* in = q.codes.as<uint8_t>() + p * q.panel_bytes();
    const int64_t rows = std::min(quant_panel, q.rows - p * quant_panel);
    for (int64_t b = 0; b < q.blocks(); b++, in += quant_unit_bytes(q.bits)) {
      uint8_t unit[quant_panel * quant_block];
      unpack_unit(in, q.bits, unit, quant_block);
      const int64_t c = b * quant_block, used = std::min(quant_block, q.cols - c);
      for (int64_t r = 0; r < rows; r++)
        std::copy_n(unit + r * quant_block, used, codes.as<uint8_t>() + (p * quant_panel + r) * q.cols + c);
    }
  });
  return codes;
}

Tensor unpack_scales(const QuantMatrix& q) {
  Tensor scales = Tensor::zeros(DType::f16, {q.rows, q.groups()});
  for (int64_t r = 0; r < q.rows; r++)
    for (int64_t g = 0; g < q.groups(); g++) scales.as<uint16_t>()[r * q.groups() + g] = q.scale(r, g);
  return scales;
}

Tensor unpack_zeros(const QuantMatrix& q) {
  Tensor zeros = Tensor::zeros(DType::u8, {q.rows, q.groups()});
  for (int64_t r = 0; r < q.rows; r++)
    for (int64_t g = 0; g < q.groups(); g++) zeros.as<uint8_t>()[r * q.groups() + g] = q.zero(r, g);
  return zeros;
}

QuantMatrix pack_codes(const Tensor& codes, const Tensor& scales_f16, const Tensor& zeros_u8, int bits, int64_t group_size,
                       bool symmetric) {
  require(codes.dtype == DType::u8 && codes.shape.size() == 2, "codes must be a u8 matrix");
  QuantMatrix q = make_quant_matrix(codes.rows(), codes.cols(), bits, group_size, symmetric);
  require_tensor(scales_f16, DType::f16, q.rows, q.groups(), "scales must be f16 (rows, groups)");
  require_tensor(zeros_u8, DType::u8, q.rows, q.groups(), "zeros must be u8 (rows, groups)");
  const auto in_range = [&](const Tensor& t) {
    return std::all_of(t.as<uint8_t>(), t.as<uint8_t>() + t.size(), [&](uint8_t v) { return v < 1 << bits; });
  };
  require(in_range(codes) && in_range(zeros_u8), "codes and zeros must be below 2^bits");
  for (int64_t r = 0; r < q.rows; r++)
    for (int64_t g = 0; g < q.groups(); g++) {
      q.scale(r, g) = scales_f16.as<uint16_t>()[r * q.groups() + g];
      q.zero(r, g) = zeros_u8.as<uint8_t>()[r * q.groups() + g];
    }
  parallel_for(q.panels(), [&](int64_t p) { pack_panel(codes.as<uint8_t>() + p * quant_panel * q.cols, p, q); });
  return q;
}

Tensor dequantize(const QuantMatrix& q) {
  const Tensor codes = unpack_codes(q);
  Tensor w = Tensor::zeros(DType::f32, {q.rows, q.cols});
  parallel_for(q.rows, [&](int64_t r) {
    const uint8_t* code = codes.as<uint8_t>() + r * q.cols;
    for (int64_t g = 0, c = 0; c < q.cols; g++) {
      const float scale = f16_to_f32(q.scale(r, g));
      const int zero = q.zero(r, g);
      for (const int64_t end = std::min(q.cols, c + q.group_size); c < end; c++)
        w.f32()[r * q.cols + c] = scale * float(code[c] - zero);
    }
  });
  return w;
}
GptqTensors to_gptq(const QuantMatrix& q) {
  const int64_t rows = q.rows, groups = q.groups(), zero_words = blocks_of(rows) * q.bits;
  GptqTensors t{Tensor::zeros(DType::i32, {q.blocks() * q.bits, rows}), Tensor::zeros(DType::i32, {groups, zero_words}),
                Tensor::zeros(DType::f16, {groups, rows}), Tensor::zeros(DType::i32, {q.cols})};
  // A block of 32 channels fills `bits` rows of qweight: iterations write disjoint rows.
  parallel_for(q.blocks(), [&](int64_t b) {
    uint8_t codes[quant_panel * quant_block];
    for (int64_t r = 0; r < rows; r++) {
      if (r % quant_panel == 0)
        unpack_unit(q.codes.as<uint8_t>() + r / quant_panel * q.panel_bytes() + b * quant_unit_bytes(q.bits), q.bits, codes,
                    quant_block);
      pack_words(codes + r % quant_panel * quant_block, q.bits, t.qweight.i32() + b * q.bits * rows + r, rows);
    }
  });
  for (int64_t g = 0; g < groups; g++) {
    for (int64_t r = 0; r < rows; r++) t.scales.as<uint16_t>()[g * rows + r] = q.scale(r, g);
    for (int64_t b = 0; b < blocks_of(rows); b++) {
      uint8_t zeros[quant_block] = {};
      for (int64_t r = b * quant_block; r < std::min(rows, (b + 1) * quant_block); r++) zeros[r - b * quant_block] = q.zero(r, g);
      pack_words(zeros, q.bits, t.qzeros.i32() + g * zero_words + b * q.bits, 1);
    }
  }
  for (int64_t c = 0; c < q.cols; c++) t.g_idx.i32()[c] = int32_t(c / q.group_size);
  return t;
}

QuantMatrix from_gptq(const GptqTensors& t, int64_t rows, int64_t cols, int bits, int64_t group_size, bool symmetric) {
  QuantMatrix q = make_quant_matrix(rows, cols, bits, group_size, symmetric);
  const int64_t groups = q.groups(), zero_words = blocks_of(rows) * bits;
  require_tensor(t.qweight, DType::i32, q.blocks() * bits, rows, "qweight must be i32 (ceil(in / 32) * bits, out)");
  require_tensor(t.qzeros, DType::i32, groups, zero_words, "qzeros must be i32 (groups, ceil(out / 32) * bits)");
  require_tensor(t.scales, DType::f16, groups, rows, "scales must be f16 (groups, out)");
  if (t.g_idx.data) {  // optional: checkpoints without act-order often leave it out
    require(t.g_idx.dtype == DType::i32 && t.g_idx.size() == cols, "g_idx must be i32 (in)");
    for (int64_t c = 0; c < cols; c++)
      require(t.g_idx.i32()[c] == c / group_size,
              "g_idx is not channel / group_size: groups of scattered channels are not supported");
  }
  parallel_for(q.blocks(), [&](int64_t b) {
    const int64_t used = std::min(quant_block, cols - b * quant_block);
    for (int64_t p = 0; p < q.panels(); p++) {
      uint8_t codes[quant_panel * quant_block] = {};
      for (int64_t r = p * quant_panel; r < std::min(rows, (p + 1) * quant_panel); r++) {
        uint8_t* row = codes + r % quant_panel * quant_block;
        unpack_words(t.qweight.i32() + b * bits * rows + r, rows, bits, row);
        std::fill(row + used, row + quant_block, uint8_t(0));
      }
      pack_unit(codes, quant_block, bits, q.codes.as<uint8_t>() + p * q.panel_bytes() + b * quant_unit_bytes(bits));
    }
  });
  for (int64_t g = 0; g < groups; g++) {
    for (int64_t r = 0; r < rows; r++) q.scale(r, g) = t.scales.as<uint16_t>()[g * rows + r];
    for (int64_t b = 0; b < blocks_of(rows); b++) {
      uint8_t zeros[quant_block];
      unpack_words(t.qzeros.i32() + g * zero_words + b * bits, 1, bits, zeros);
      for (int64_t r = b * quant_block; r < std::min(rows, (b + 1) * quant_block); r++) q.zero(r, g) = zeros[r - b * quant_block];
    }
  }
  return q;
}

}  // namespace eac
