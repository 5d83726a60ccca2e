// Activations as operands of the tensor cores: f32 split into bf16 planes.
//
// DEFINITION  high = bf16(x), low = bf16(x - high); high + low is x within 2^-17. Fast products use the high plane alone.
// LAYOUT      (rows, stride), stride the channels rounded up to whole units of 64, padded with zeros. For tiles, which go through shared memory,
//             channels are in order. For streams, which read planes into registers, stride is rounded up to pairs of units, and channel 16 s + 8 h + 2 c + i of a unit lies at
//             16 c + 4 s + 2 h + i, so that what lane c of mma_bf16 needs of a row lies together: 8 values, one 16-byte load, for each
//             half (32 channels) of the unit.
#pragma once
#include "kernels/cuda/matmul/weights.cuh"

namespace eac::cuda {

enum class Order : int32_t { channels, lanes };

struct Planes {
  uint16_t *high, *low;  // low null: not kept
  int64_t stride;        // a multiple of 64
  Order order;
};

__host__ __device__ inline int64_t plane_stride(int64_t cols, Order order) {
  constexpr int pair = 2 * unit_cols;
  return order == Order::lanes ? (cols + pair - 1) / pair * pair : units_of(cols) * unit_cols;
}

__device__ __forceinline__ int64_t place_in_plane(const Planes& p, int64_t channel) {
  if (p.order == Order::channels) return channel;
  const int64_t c = channel >> 1 & 3, s = channel >> 4 & 3, h = channel >> 3 & 1;
  return (channel & ~int64_t(63)) | c << 4 | s << 2 | h << 1 | (channel & 1);
}
__device__ __forceinline__ void store_split(const Planes& p, int64_t row, int64_t channel, float v) {
  const int64_t at = row * p.stride + place_in_plane(p, channel);
  const uint32_t high = pack_bf16(v, 0.f);
  p.high[at] = uint16_t(high);
  if (p.low) p.low[at] = uint16_t(pack_bf16(v - bf16_low(high), 0.f));
}
// Four values of a row, at `quad` in units of four places.
__device__ __forceinline__ void split_quad(const float* row, int64_t cols, int64_t quad, const Planes& p, int64_t to_row) {
  const bool lanes = p.order == Order::lanes;
  const int64_t channel = lanes ? quad / 16 * 64 + quad % 4 * 16 + quad / 4 % 4 * 2 : quad * 4;
  float v[4];
  for (int i = 0; i < 4; i++) {
    const int64_t k = channel + (lanes ? i / 2 * 8 + i % 2 : i);
    v[i] = k < cols ? row[k] : 0.f;
  }
  const uint2 high = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
  const int64_t at = to_row * (p.stride / 4) + quad;
  reinterpret_cast<uint2*>(p.high)[at] = high;
  if (p.low)
    reinterpret_cast<uint2*>(p.low)[at] = make_uint2(pack_bf16(v[0] - bf16_low(high.x), v[1] - bf16_high(high.x)),
                                                     pack_bf16(v[2] - bf16_low(high.y), v[3] - bf16_high(high.y)));
}

// The planes of x (rows, cols). Scratch: of the context, `scratch` and the one behind it.
Planes allocate_planes(Context& c, int scratch, int64_t rows, int64_t cols, Precision precision, Order order);
Planes split_planes(Context& c, int scratch, const float* x, int64_t rows, int64_t cols, Precision precision, Order order);

}  // namespace eac::cuda
