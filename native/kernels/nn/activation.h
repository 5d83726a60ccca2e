// Pointwise pieces of the feed-forward blocks.
#pragma once
#include <cstdint>

namespace eac {

enum class Activation { silu, gelu, gelu_tanh, relu };

// gate = activation(gate) * up, n values.
void glu(Activation a, float* gate, const float* up, int64_t n);

}  // namespace eac
