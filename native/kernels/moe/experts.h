// Sparse-expert dispatch: the feed-forward of a Mixture-of-Experts layer.
//
// SHAPES      x (n × d); weights, indices (n × k), index -1 = no expert; gate, up (f × d), down (d × f), one of each an expert; out (n × d)
// DEFINITION  out[t] = beta * out[t] + sum over slots k, in order, of  weights[t,k] * down_e( act(gate_e x[t]) * up_e x[t] ),  e = indices[t,k]
// METHOD      The (token, slot) pairs are sorted by expert; their rows are gathered once; gate, up and activation run tile by tile
//             (an expert × a block of its rows × a block of channels), so that one hot expert and many cold ones keep all
//             threads busy; then down; then every token adds up its own slots. No atomics, no order that depends on threads.
//             An expert that no token chose is never touched.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels/matmul/matrix.h"
#include "kernels/nn/activation.h"

namespace eac {

struct Experts {
  std::vector<Matrix> gate, up, down;
  Activation activation = Activation::silu;
};

// Buffers that grow to the largest batch and are then reused.
struct ExpertsScratch {
  std::vector<int64_t> offsets, pair_of_slot;
  std::vector<int32_t> slot_of_pair;
  std::vector<float> rows, hidden, up;
};

void run_experts(const float* x, int64_t n, int64_t d, const float* weights, const int32_t* indices, int64_t k,
                 const Experts& experts, float beta, float* out, ExpertsScratch& scratch);
// The oracle: token by token, slot by slot, plain loops.
void run_experts_reference(const float* x, int64_t n, int64_t d, const float* weights, const int32_t* indices, int64_t k,
                           const Experts& experts, float beta, float* out);

}  // namespace eac
