// Floats as integers of the same order, for selection by digits and for integer maxima across a warp or the grid.
#pragma once
#include "kernels/cuda/platform.cuh"

namespace eac::cuda {

// a < b as floats exactly if ordered(a) < ordered(b); both zeros are one. Every number's is above 0. Not for NaN.
__device__ __forceinline__ uint32_t ordered(float v) {
  const uint32_t bits = __float_as_uint(v + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

}  // namespace eac::cuda
