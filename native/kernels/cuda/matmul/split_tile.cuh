// Products of f32 matrices on the bf16 tensor cores: x = high + low, both bf16, and x y = high high + high low + low high, which leaves
// an error of about 2^-16 of each product.
//
// LAYOUT  A tile's row is 64 columns: 256 bytes, 16 units of 16 bytes; units 0..7 hold the high parts and 8..15 the low ones.
//         Unit u of row r lies at u ^ (r % 8), so that 8 rows of one unit, as a warp loads them, meet no bank twice.
#pragma once
#include "kernels/cuda/context.cuh"

namespace eac::cuda {

inline constexpr int tile_columns = 64, tile_row_bytes = 256;

__device__ __forceinline__ unsigned char* tile_unit(unsigned char* tile, int row, int unit) {
  return tile + row * tile_row_bytes + ((unit ^ (row & 7)) << 4);
}

__device__ __forceinline__ void split_pair(float a, float b, uint32_t& high, uint32_t& low) {
  high = pack_bf16(a, b);
  low = pack_bf16(a - bf16_low(high), b - bf16_high(high));
}

struct Split8 {
  uint4 high, low;
};
__device__ __forceinline__ Split8 split8(const float4& a, const float4& b) {
  Split8 s;
  split_pair(a.x, a.y, s.high.x, s.low.x);
  split_pair(a.z, a.w, s.high.y, s.low.y);
  split_pair(b.x, b.y, s.high.z, s.low.z);
  split_pair(b.z, b.w, s.high.w, s.low.w);
  return s;
}

// `rows` rows of a tile on their way from memory through the registers of `threads` threads: loads are issued long before store() splits
// them. 8 columns a piece; a piece's address is null where there is nothing: zeros.
template <int rows, int threads> struct Staged {
  static constexpr int pieces = rows * 8 / threads;
  float4 v[pieces][2];

  // at(row, column) gives the address of 8 floats, aligned to 16 bytes, or null.
  template <class At> __device__ __forceinline__ void load(At at) {
#pragma unroll
    for (int i = 0; i < pieces; i++) {
      const int piece = int(threadIdx.x) + i * threads;
      const float4* from = reinterpret_cast<const float4*>(at(piece / 8, piece % 8 * 8));
      v[i][0] = from ? from[0] : make_float4(0, 0, 0, 0);
      v[i][1] = from ? from[1] : make_float4(0, 0, 0, 0);
    }
  }
  __device__ __forceinline__ void store(unsigned char* tile) const {
#pragma unroll
    for (int i = 0; i < pieces; i++) {
      const int piece = int(threadIdx.x) + i * threads, row = piece / 8, unit = piece % 8;
      const Split8 s = split8(v[i][0], v[i][1]);
      *reinterpret_cast<uint4*>(tile_unit(tile, row, unit)) = s.high;
      *reinterpret_cast<uint4*>(tile_unit(tile, row, unit + 8)) = s.low;
    }
  }
};

// The operands of 16 columns (step) of a tile for mma_bf16. part 0: high, 8: low.
// a: rows [row, row + 16).
__device__ __forceinline__ void load_a(uint32_t (&a)[4], unsigned char* tile, int row, int step, int part) {
  const int lane = int(threadIdx.x % 32);
  load_matrices(a, tile_unit(tile, row + lane % 16, part + step * 2 + lane / 16));
}
// b of x y^T: rows [row, row + 16) of y; b[0], b[1] for the first 8 of them, b[2], b[3] for the others.
__device__ __forceinline__ void load_b(uint32_t (&b)[4], unsigned char* tile, int row, int step, int part) {
  const int lane = int(threadIdx.x % 32);
  load_matrices(b, tile_unit(tile, row + lane / 16 * 8 + lane % 8, part + step * 2 + lane / 8 % 2));
}
// b of x y: rows [row, row + 16) of y, of which columns 16 step .. 16 step + 15.
__device__ __forceinline__ void load_b_rows(uint32_t (&b)[4], unsigned char* tile, int row, int step, int part) {
  const int lane = int(threadIdx.x % 32);
  load_matrices_transposed(b, tile_unit(tile, row + lane % 16, part + step * 2 + lane / 16));
}

// d0, d1 += (a_high + a_low) (b_high + b_low) without the product of the low parts; d0 takes the first 8 columns of b.
__device__ __forceinline__ void mma_split(float (&d0)[4], float (&d1)[4], const uint32_t (&a_high)[4], const uint32_t (&a_low)[4],
                                          const uint32_t (&b_high)[4], const uint32_t (&b_low)[4]) {
  const uint32_t high0[2] = {b_high[0], b_high[1]}, high1[2] = {b_high[2], b_high[3]};
  const uint32_t low0[2] = {b_low[0], b_low[1]}, low1[2] = {b_low[2], b_low[3]};
  mma_bf16(d0, a_low, high0);
  mma_bf16(d1, a_low, high1);
  mma_bf16(d0, a_high, low0);
  mma_bf16(d1, a_high, low1);
  mma_bf16(d0, a_high, high0);
  mma_bf16(d1, a_high, high1);
}

}  // namespace eac::cuda
