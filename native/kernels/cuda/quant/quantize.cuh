// The parameters of a quantization group, as kernels/quant/group_params.h defines them, by one warp.
#pragma once
#include "kernels/cuda/matmul/gemm.cuh"

namespace eac::cuda {

struct GroupParams {
  uint16_t scale_f16;
  uint8_t zero;
};

struct GroupOptions {
  int32_t bits;
  bool symmetric, clip_search;
};

// round(w / scale) half to even, within [low, high]; NaN becomes low.
__device__ __forceinline__ float round_limited(float w, float scale, float low, float high) {
  float x = w / scale;
  x = x > low ? x : low;
  return rintf(x < high ? x : high);
}

__device__ __forceinline__ GroupParams params_for(float lo, float hi, float shrink, const GroupOptions& o) {
  const float top = float((1 << o.bits) - 1);
  const uint16_t scale = float_to_half(fminf(fmaxf((hi - lo) * shrink / top, 1e-7f), 65504.f));
  GroupParams p{scale > 1 ? scale : uint16_t(1), uint8_t(1 << (o.bits - 1))};  // f16 bits 1 = 2^-24
  if (!o.symmetric) p.zero = uint8_t(round_limited(-lo * shrink, half_to_float(p.scale_f16), 0.f, top));
  return p;
}

// sum of importance (w - q)^2
__device__ __forceinline__ float group_error(const float* w, int64_t n, GroupParams p, int bits, const float* importance) {
  const float scale = half_to_float(p.scale_f16), low = -float(p.zero), high = float((1 << bits) - 1) + low;
  float sum = 0;
  for (int64_t i = threadIdx.x % 32; i < n; i += 32) {
    const float d = w[i] - round_limited(w[i], scale, low, high) * scale;
    sum += importance ? d * d * importance[i] : d * d;
  }
  return warp_sum(sum);
}

// w (n) in global or shared memory; importance (n) or null. All lanes call and get the result.
__device__ inline GroupParams fit_group(const float* w, int64_t n, const GroupOptions& o, const float* importance) {
  float lo = 0, hi = 0;
  for (int64_t i = threadIdx.x % 32; i < n; i += 32) lo = fminf(lo, w[i]), hi = fmaxf(hi, w[i]);
  lo = -warp_max(-lo), hi = warp_max(hi);
  if (o.symmetric) {
    hi = fmaxf(-lo, hi);
    lo = -hi;
  }
  GroupParams best = params_for(lo, hi, 1.f, o);
  if (!o.clip_search) return best;
  constexpr int steps = 12;
  constexpr double first = 0.95, last = 0.40;
  float least = group_error(w, n, best, o.bits, importance);
#pragma unroll 1
  for (int s = 0; s < steps; s++) {
    const GroupParams p = params_for(lo, hi, float(first + s * ((last - first) / (steps - 1))), o);
    const float e = group_error(w, n, p, o.bits, importance);
    if (e < least) best = p, least = e;
  }
  return best;
}

// Groups [first, first + count) of every row of w (rows, cols), one warp each: scales and zeros of q, and codes where there are any to write.
void fit_groups(Context&, const Quantize& q, const float* w, int64_t first, int64_t count, uint8_t* codes);
// GPTQ on w (rows, cols) f32, which it overwrites: gptq.cu.
void solve_gptq(Context&, const Quantize& q, float* w);

}  // namespace eac::cuda
