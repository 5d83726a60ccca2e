// Quantized weights on the GPU, and how they become operands of the tensor cores.
//
// LAYOUT      The matrix of kernels/quant/quant_matrix.h in units of 16 rows × 64 channels, in the order in which mma_bf16 wants them as its
//             operand a: a panel of 16 rows has its units one after the other, so a product reads one stream. A lane's share of a unit are 32
//             codes, 16 pairs of channels: pair 4 s + f is register f of the operand for the channels 16 s .. 16 s + 15 of the unit. The pairs
//             are packed into `bits` words, a pair's first code in the low half and its second at the same place in the high half:
//               2 bit: pair i at bit 2 (i % 8) of word i / 8
//               3 bit: pair i < 15 at bit 3 (i % 5) of word i / 5; bit b of pair 15 at bit 15 of word b
//               4 bit: pair i at bit 4 (i % 4) of word i / 4
//             A unit holds words 0 .. 3 (4 bit) or 0 and 1 (2 and 3 bit) lane by lane, then word 2 (3 bit) lane by lane: loads are whole.
//             Rows and channels are padded with codes 0.
//             params (panels, groups, 8, 2): for rows r and r + 8 of a panel a word, the f16 scale below, the zero point above.
// DEFINITION  A code c at bit p of a half word, p + bits <= 7, becomes a bf16 without arithmetic: 0x4300 | c << p is 128 + c 2^p.
//             One fused multiply-add with 2^-p and -(2^(7 - p) + zero) leaves c - zero, exactly. The scale multiplies the sum of a
//             group's products, so weights are never rounded.
// LIMITS      group_size is a multiple of 32, so a group ends between the halves (32 channels, 8 pairs) of a unit, or at least cols.
// Source of the magic number: Kim et al., Who Says Elephants Can't Run, 2022.
#pragma once
#include "kernels/cuda/context.cuh"

namespace eac::cuda {

inline constexpr int unit_rows = 16, unit_cols = 64;
__host__ __device__ constexpr int unit_bytes(int bits) { return bits * unit_rows * unit_cols / 8; }

__host__ __device__ inline int64_t panels_of(int64_t rows) { return (rows + unit_rows - 1) / unit_rows; }
__host__ __device__ inline int64_t units_of(int64_t cols) { return (cols + unit_cols - 1) / unit_cols; }
__host__ __device__ inline int64_t groups_of(int64_t cols, int64_t group_size) { return (cols + group_size - 1) / group_size; }
// The halves of units that a group has.
__host__ __device__ inline int64_t halves_of_group(const Weight& w) {
  return w.group_size < w.cols ? w.group_size / 32 : 2 * units_of(w.cols);
}

struct Place {
  int word, bit;
};
template <int bits> __host__ __device__ constexpr Place place_of(int pair) {
  constexpr int each = 16 / bits;
  return {pair / each, pair % each * bits};
}

// A lane's words of a unit that starts at `unit`, in global memory or, copied as it is, in shared memory.
template <int bits> struct Codes {
  uint32_t word[bits];

  __device__ __forceinline__ void load_global(const unsigned char* unit, int lane) {
    load(unit, lane, [](auto* p) { return load_once(p); });
  }
  __device__ __forceinline__ void load_shared(const unsigned char* unit, int lane) {
    load(unit, lane, [](auto* p) { return *p; });
  }

 private:
  template <class Load> __device__ __forceinline__ void load(const unsigned char* unit, int lane, Load fetch) {
    if constexpr (bits == 4) {
      const uint4 v = fetch(reinterpret_cast<const uint4*>(unit) + lane);
      word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
    } else {
      const uint2 v = fetch(reinterpret_cast<const uint2*>(unit) + lane);
      word[0] = v.x, word[1] = v.y;
      if constexpr (bits == 3) word[2] = fetch(reinterpret_cast<const uint32_t*>(unit + 256) + lane);
    }
  }
};

// The scales and zero points of a lane's two rows.
struct GroupParams {
  float scale[2];
  uint32_t zero[2];  // in both halves

  __device__ __forceinline__ explicit GroupParams(uint2 v)
      : scale{half_to_float(uint16_t(v.x)), half_to_float(uint16_t(v.y))},
        zero{(v.x >> 16) | (v.x & 0xffff0000u), (v.y >> 16) | (v.y & 0xffff0000u)} {}
};
__device__ __forceinline__ const uint2* params_of(const Weight& w, int64_t panel, int lane) {
  return static_cast<const uint2*>(w.params) + panel * groups_of(w.cols, w.group_size) * 8 + lane / 4;
}

inline constexpr uint32_t both = 0x10001u, magic = 0x4300u * both;
// The operand of 16 channels: `pair` is 4 times their number in the unit.
template <int bits, int pair>
__device__ __forceinline__ uint32_t code_minus_zero(const Codes<bits>& codes, const uint32_t (&zero)[2]) {
  constexpr uint32_t mask = (1u << bits) - 1;
  constexpr int bit = bits == 3 && pair == 15 ? 0 : place_of<bits>(pair).bit;
  // The places where a code can stay lie 6 bits apart (2 and 3 bit); of four bits only the first fits.
  constexpr int shift = bits == 4 ? bit : bit / 6 * 6, at = bit - shift;
  uint32_t v;
  if constexpr (bits == 3 && pair == 15)
    v = (codes.word[0] >> 15 & both) | (codes.word[1] >> 14 & 2 * both) | (codes.word[2] >> 13 & 4 * both) | magic;
  else
    v = and_or(codes.word[place_of<bits>(pair).word] >> shift, (mask << at) * both, magic);
  constexpr uint32_t exponent = uint32_t(at) << 7;
  // A multiply-add, where shift and or would be two instructions.
  const uint32_t minus_zero = zero[pair % 2] * (1u << at) + (0xc300u - exponent) * both;
  return fma_bf16(v, (0x3f80u - exponent) * both, minus_zero);
}
template <int bits, int first>
__device__ __forceinline__ void operand(const Codes<bits>& codes, const GroupParams& g, uint32_t (&a)[4]) {
  a[0] = code_minus_zero<bits, first>(codes, g.zero), a[1] = code_minus_zero<bits, first + 1>(codes, g.zero);
  a[2] = code_minus_zero<bits, first + 2>(codes, g.zero), a[3] = code_minus_zero<bits, first + 3>(codes, g.zero);
}

}  // namespace eac::cuda
