// Who computes what in a sparse-expert layer, found on the device: no launch depends on what the tokens chose.
#pragma once
#include "kernels/cuda/matmul/stream.cuh"

namespace eac::cuda {

// (token, slot) pairs sorted by expert, in the order of their slots; the shared expert's pairs, one a token, behind. A slot without an expert,
// or with one that does not exist, has no pair.
struct Dispatch {
  int32_t* begin;         // (experts + 2) first pair of each expert
  int32_t* first_tile;    // (experts + 2) with so many tiles of the experts before it
  int32_t* tokens;        // (pairs) of each pair
  int32_t* pair_of_slot;  // (n, top_k), -1: none
};
Dispatch sort_pairs(Context& c, const Experts& e, int tile_rows);

// For few tokens: what the products of stream.cuh need beside the weights.
struct Prepared {
  const int32_t* expert;  // (places): -1: none
  const float* factor;    // (places + 1, n) routing weights; the last row is the shared expert's
  Planes in;              // the tokens' inputs
};
Prepared prepare(Context& c, const Experts& e, const Choice& choice);

// sigmoid(output gate · x) of every token, 1 without a gate.
void shared_factors(Context& c, const Experts& e, float* factor);

}  // namespace eac::cuda
