// Sparse-expert dispatch: the feed-forward of a Mixture-of-Experts layer.
//
// SHAPES      x (n × d); weights, indices (n × k), index -1 = no expert; gate, up (f × d), down (d × f), one of each an expert; out (n × d)
//             shared expert: gate, up (s × d), down (d × s), output gate (1 × d)
// DEFINITION  ffn_e(v) = down_e( act(gate_e v) * up_e v ), a bias added to each product where experts have them
//             out[t] = beta * out[t] + sum over slots j, in order, of weights[t,j] * ffn_e(x[t]) with e = indices[t,j]
//                      + sigmoid(output_gate · x[t]) * ffn_shared(x[t]);  without an output gate that factor is 1
// METHOD      The (token, slot) pairs are sorted by expert, the shared expert's pairs (one a token) come last. Gate, up and activation run
//             tile by tile (an expert × a block of its pairs × a block of channels), so that one hot expert and many cold ones keep all
//             threads busy; then down; then every token adds up its own slots. No atomics, no order that depends on threads.
//             An expert that no token chose is never touched. One token: the last two steps are one.
//             int8: tokens are quantized once for all their experts; a tile's hidden values are quantized while they are in the cache.
// REGULARITY  A token's result depends on nothing but the token: not on the batch, the tiling or the number of threads.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/matmul/int8.h"
#include "kernels/moe/dispatch.h"
#include "kernels/nn/activation.h"

namespace eac {

struct SharedExpert {
  Matrix gate, up, down;
  std::optional<Matrix> output_gate;
};

// One of each an expert, f32, f16 or bf16; the shared expert has none.
struct ExpertBiases {
  std::vector<Tensor> gate, up, down;
};

// Channels that share an activation scale: of the tokens, of the routed experts' hidden values and of the shared expert's.
struct Int8Blocks {
  int64_t token, hidden, shared;
};

struct Experts {
  std::vector<Matrix> gate, up, down;
  Activation activation;
  std::optional<SharedExpert> shared;
  std::optional<ExpertBiases> biases;  // kept as f32
  // If every matrix is quantized. Found once: a call should not touch experts that it does not need.
  std::optional<Int8Blocks> int8;

  Experts(std::vector<Matrix> gate, std::vector<Matrix> up, std::vector<Matrix> down, Activation activation,
          std::optional<SharedExpert> shared = std::nullopt, std::optional<ExpertBiases> biases = std::nullopt);

  size_t count() const { return gate.size(); }
  size_t count_with_shared() const { return count() + (shared ? 1 : 0); }
  // Expert `count()` is the shared one.
  const Matrix& gate_of(size_t e) const { return e < count() ? gate[e] : shared->gate; }
  const Matrix& up_of(size_t e) const { return e < count() ? up[e] : shared->up; }
  const Matrix& down_of(size_t e) const { return e < count() ? down[e] : shared->down; }
  int64_t hidden_of(size_t e) const { return out_features(gate_of(e)); }
  // Null: none.
  const Tensor* bias_of(size_t e, std::vector<Tensor> ExpertBiases::*which) const {
    return biases && e < count() ? &((*biases).*which)[e] : nullptr;
  }
};

// Buffers that grow to the largest batch and are then reused.
struct ExpertsScratch {
  Dispatch dispatch;
  Scratch rows, hidden, up, shared_weights;
  Int8Rows x8, hidden8, shared8;
};

// `activations`: how experts treat their inputs if all their matrices are quantized; else they are exact.
void run_experts(const float* x, int64_t n, int64_t d, const float* weights, const int32_t* indices, int64_t k,
                 const Experts& experts, float beta, float* out, ExpertsScratch& scratch, Activations activations);
// The oracle: token by token, slot by slot, plain loops.
void run_experts_reference(const float* x, int64_t n, int64_t d, const float* weights, const int32_t* indices, int64_t k,
                           const Experts& experts, float beta, float* out, Activations activations);

}  // namespace eac
