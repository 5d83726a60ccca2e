// Pointwise pieces of the feed-forward blocks.
#pragma once
#include <cstdint>

namespace eac {

// clamped_swiglu (gpt-oss): g sigmoid(1.702 g) (up + 1) with g = min(gate, 7), up within +-7.
enum class Activation { silu, gelu, gelu_tanh, relu, clamped_swiglu };

// gate = activation(gate) * up, n values; clamped_swiglu as above.
void glu(Activation a, float* gate, const float* up, int64_t n);

}  // namespace eac
