// The activations of kernels/nn/activation.h.
#pragma once
#include "kernels/cuda/context.cuh"

namespace eac::cuda {

// activation(gate) * up
__device__ __forceinline__ float glu_value(Activation a, float g, float u) {
  switch (a) {
    case Activation::silu: return __fdividef(g, 1 + __expf(-g)) * u;
    case Activation::gelu: return 0.5f * g * (1 + erff(g * 0.70710678f)) * u;
    case Activation::gelu_tanh: return 0.5f * g * (1 + tanhf(0.79788456f * (g + 0.044715f * g * g * g))) * u;
    case Activation::relu: return fmaxf(g, 0.f) * u;
    case Activation::clamped_swiglu: break;
  }
  g = fminf(g, 7.f);
  u = fminf(fmaxf(u, -7.f), 7.f);
  return g / (1 + __expf(-1.702f * g)) * (u + 1);
}

}  // namespace eac::cuda
