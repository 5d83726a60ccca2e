#include "kernels/nn/activation.h"

#include "kernels/cpu/isa.h"

namespace eac {

void glu(Activation a, float* gate, const float* up, int64_t n) {
  switch (a) {
    case Activation::silu: return isa().silu_mul(gate, up, n);
    case Activation::gelu: return isa().gelu_mul(gate, up, n);
    case Activation::gelu_tanh: return isa().gelu_tanh_mul(gate, up, n);
    case Activation::relu: return isa().relu_mul(gate, up, n);
    case Activation::clamped_swiglu: return isa().clamped_swiglu(gate, up, n);
  }
}

}  // namespace eac
