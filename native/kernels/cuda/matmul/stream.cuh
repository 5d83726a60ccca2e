// Products of quantized weights with at most 8 rows: decoding.
//
// SHAPES      as in product.cuh, but all rows take part in every expert's product: hidden is (chosen experts and the shared one, n, channels),
//             and its rows are multiplied by the routing weight, 0 for tokens that did not choose the expert, so that out is the sum of all
//             experts' down products over one long row of hidden values. Nothing is sorted.
// REGULARITY  Results depend on n through the number of slices only.
#pragma once
#include "kernels/cuda/matmul/product.cuh"

namespace eac::cuda {

// The experts that any of n tokens chose. There are places for as many as can be, most of them taken: with fewer slots than experts a place is
// a slot, whose expert has it unless an earlier slot chose the same; else a place is an expert.
struct Choice {
  const int32_t* indices;  // (n, top_k)
  int slots, experts;      // n top_k

  int places() const { return slots < experts ? slots : experts; }
};
// -1: none. All lanes of a warp must call; it need not have waited for earlier launches.
__device__ __forceinline__ int expert_at(const Choice& c, int place) {
  const bool by_slot = c.slots < c.experts;
  const int expert = by_slot ? load_written(c.indices + place) : place, end = by_slot ? place : c.slots;
  bool found = false;
#pragma unroll 4
  for (int s = threadIdx.x % 32; s < end; s += 32) found |= load_written(c.indices + s) == expert;
  const bool chosen = __any_sync(0xffffffffu, found) != by_slot;
  return chosen && uint32_t(expert) < uint32_t(c.experts) ? expert : -1;
}

struct Stream {
  Role role;
  int n, channels, shared_channels;
  const Expert* list;
  Choice choice;
  int places;           // of the choice; behind them the shared expert
  const float* factor;  // (places + 1, n)
  bool shared, biases;  // of gate and up
  Planes in;
  Activation activation;
  Planes hidden;              // ((places + 1) n, ...)
  float* out;                 // (slices, n, channels)
  int slices, shared_slices;  // down: that each expert's product is cut into
  int blocks, shared_blocks;  // of an expert's gate_up; multiply_stream() knows
};

// How many slices of a row of `cols` fill the GPU, if there are `products` of `channels` outputs.
int stream_slices(const Context& c, int64_t products, int64_t channels, int64_t cols);
// With a shared expert, gate_up may start before what precedes the launch before it has ended.
void multiply_stream(Context& c, const Stream& s);

}  // namespace eac::cuda
