#include "kernels/nn/activation.h"

#include <algorithm>
#include <cmath>

#include "core/thread_pool.h"
#include "kernels/cpu/isa.h"

namespace eac {
namespace {

float gelu(float x) { return 0.5f * x * (1 + std::erf(x * 0.70710678f)); }
float gelu_tanh(float x) { return 0.5f * x * (1 + std::tanh(0.79788456f * (x + 0.044715f * x * x * x))); }

}  // namespace

void glu(Activation a, float* gate, const float* up, int64_t n) {
  switch (a) {
    case Activation::silu: isa().silu_mul(gate, up, n); return;
    case Activation::clamped_swiglu: isa().clamped_swiglu(gate, up, n); return;
    case Activation::gelu:
      for (int64_t i = 0; i < n; i++) gate[i] = gelu(gate[i]) * up[i];
      return;
    case Activation::gelu_tanh:
      for (int64_t i = 0; i < n; i++) gate[i] = gelu_tanh(gate[i]) * up[i];
      return;
    case Activation::relu:
      for (int64_t i = 0; i < n; i++) gate[i] = std::fmax(gate[i], 0.f) * up[i];
      return;
  }
}

}  // namespace eac
