// Codes in and out of the two layouts: the block layout of quant_matrix.h, and the GPTQ v2 checkpoint layout of quantize.h.
#include <algorithm>
#include <vector>

#include "core/thread_pool.h"
#include "kernels/quant/group_params.h"

namespace eac {
namespace {

// codes (32) -> one block, and back.
void pack_block(const uint8_t* c, int bits, uint8_t* out) {
  if (bits == 4) {
    for (int j = 0; j < 16; j++) out[j] = uint8_t(c[j] | c[j + 16] << 4);
    return;
  }
  for (int j = 0; j < 8; j++) out[j] = uint8_t((c[j] & 3) | (c[j + 8] & 3) << 2 | (c[j + 16] & 3) << 4 | (c[j + 24] & 3) << 6);
  if (bits == 2) return;
  for (int j = 0; j < 4; j++) {
    int high = 0;
    for (int i = 0; i < 8; i++) high |= (c[8 * j + i] >> 2) << i;
    out[8 + j] = uint8_t(high);
  }
}

void unpack_block(const uint8_t* in, int bits, uint8_t* c) {
  if (bits == 4) {
    for (int j = 0; j < 16; j++) c[j] = in[j] & 15, c[j + 16] = in[j] >> 4;
    return;
  }
  for (int j = 0; j < 8; j++)
    for (int k = 0; k < 4; k++) c[j + 8 * k] = in[j] >> (2 * k) & 3;
  if (bits == 2) return;
  for (int i = 0; i < 32; i++) c[i] = uint8_t(c[i] | (in[8 + i / 8] >> (i % 8) & 1) << 2);
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
  q.codes = Tensor::zeros(DType::u8, {rows, q.row_bytes()});
  q.scales = Tensor::zeros(DType::f16, {rows, q.groups()});
  q.zeros = Tensor::zeros(DType::u8, {rows, q.groups()});
  return q;
}

void pack_row(const uint8_t* codes, int64_t cols, int bits, uint8_t* out) {
  const int64_t whole = cols / quant_block * quant_block;
  for (int64_t c = 0; c < whole; c += quant_block, out += quant_block_bytes(bits)) pack_block(codes + c, bits, out);
  if (whole == cols) return;
  uint8_t last[quant_block] = {};
  std::copy(codes + whole, codes + cols, last);
  pack_block(last, bits, out);
}

void unpack_row(const uint8_t* packed, int64_t cols, int bits, uint8_t* codes) {
  const int64_t whole = cols / quant_block * quant_block;
  for (int64_t c = 0; c < whole; c += quant_block, packed += quant_block_bytes(bits)) unpack_block(packed, bits, codes + c);
  if (whole == cols) return;
  uint8_t last[quant_block];
  unpack_block(packed, bits, last);
  std::copy(last, last + (cols - whole), codes + whole);
}

Tensor unpack_codes(const QuantMatrix& q) {
  Tensor codes = Tensor::zeros(DType::u8, {q.rows, q.cols});
  parallel_for(q.rows, [&](int64_t r) {
    unpack_row(q.codes.as<uint8_t>() + r * q.row_bytes(), q.cols, q.bits, codes.as<uint8_t>() + r * q.cols);
  });
  return codes;
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
  std::copy_n(scales_f16.as<uint16_t>(), q.scales.size(), q.scales.as<uint16_t>());
  std::copy_n(zeros_u8.as<uint8_t>(), q.zeros.size(), q.zeros.as<uint8_t>());
  parallel_for(q.rows, [&](int64_t r) {
    pack_row(codes.as<uint8_t>() + r * q.cols, q.cols, bits, q.codes.as<uint8_t>() + r * q.row_bytes());
  });
  return q;
}

Tensor dequantize(const QuantMatrix& q) {
  Tensor w = Tensor::zeros(DType::f32, {q.rows, q.cols});
  parallel_for(q.rows, [&](int64_t r) {
    std::vector<uint8_t> codes(q.cols);
    unpack_row(q.codes.as<uint8_t>() + r * q.row_bytes(), q.cols, q.bits, codes.data());
    for (int64_t g = 0, c = 0; c < q.cols; g++) {
      const float scale = f16_to_f32(q.scales.as<uint16_t>()[r * q.groups() + g]);
      const int zero = q.zeros.as<uint8_t>()[r * q.groups() + g];
      for (const int64_t end = std::min(q.cols, c + q.group_size); c < end; c++)
        w.f32()[r * q.cols + c] = scale * float(codes[c] - zero);
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
    uint8_t codes[quant_block];
    for (int64_t r = 0; r < rows; r++) {
      unpack_block(q.codes.as<uint8_t>() + r * q.row_bytes() + b * quant_block_bytes(q.bits), q.bits, codes);
      pack_words(codes, q.bits, t.qweight.i32() + b * q.bits * rows + r, rows);
    }
  });
  for (int64_t g = 0; g < groups; g++) {
    for (int64_t r = 0; r < rows; r++) t.scales.as<uint16_t>()[g * rows + r] = q.scales.as<uint16_t>()[r * groups + g];
    for (int64_t b = 0; b < blocks_of(rows); b++) {
      uint8_t zeros[quant_block] = {};
      for (int64_t r = b * quant_block; r < std::min(rows, (b + 1) * quant_block); r++)
        zeros[r - b * quant_block] = q.zeros.as<uint8_t>()[r * groups + g];
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
  const int64_t bytes = quant_block_bytes(bits);
  parallel_for(q.blocks(), [&](int64_t b) {
    uint8_t codes[quant_block];
    const int64_t used = std::min(quant_block, cols - b * quant_block);
    for (int64_t r = 0; r < rows; r++) {
      unpack_words(t.qweight.i32() + b * bits * rows + r, rows, bits, codes);
      std::fill(codes + used, codes + quant_block, uint8_t(0));
      pack_block(codes, bits, q.codes.as<uint8_t>() + r * q.row_bytes() + b * bytes);
    }
  });
  for (int64_t g = 0; g < groups; g++) {
    for (int64_t r = 0; r < rows; r++) q.scales.as<uint16_t>()[r * groups + g] = t.scales.as<uint16_t>()[g * rows + r];
    for (int64_t b = 0; b < blocks_of(rows); b++) {
      uint8_t zeros[quant_block];
      unpack_words(t.qzeros.i32() + g * zero_words + b * bits, 1, bits, zeros);
      for (int64_t r = b * quant_block; r < std::min(rows, (b + 1) * quant_block); r++)
        q.zeros.as<uint8_t>()[r * groups + g] = zeros[r - b * quant_block];
    }
  }
  return q;
}

}  // namespace eac
