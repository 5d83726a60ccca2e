// Pointwise pieces of the feed-forward blocks.
#pragma once
#include <cstdint>

namespace eac {

enum class Activation { silu, gelu, gelu_tanh, relu };

// gate = activation(gate) * up, n values.
void glu(Activation a, float* gate, const float* up, int64_t n);
// out (n × d) += sigmoid(gate (n)) * x (n × d); gate null: out += x.
void gated_add(const float* x, const float* gate, int64_t n, int64_t d, float* out);

}  // namespace eac
