// Products of quantized weights with at most 8 rows: decoding.
//
// SHAPES      as in product.cuh, but all rows take part in every expert's product: hidden is (chosen experts and the shared one, n, channels),
//             and its rows are multiplied by the routing weight, 0 for tokens that did not choose the expert, so that out is the sum of all
//             experts' down products over one long row of hidden values. Nothing is sorted.
// REGULARITY  Results depend on n through the number of slices only.
#pragma once
#include "kernels/cuda/matmul/product.cuh"

namespace eac::cuda {

inline constexpr int64_t stream_rows = 8;

struct Stream {
  Role role;
  int64_t n, cols, shared_cols, channels, shared_channels;
  Weight weight;  // plain
  const Expert* list;
  int64_t routed, most;   // experts; at most so many of them are chosen
  const int32_t* chosen;  // (1 + most): how many experts are chosen, and which
  const float* factor;    // (most + 1, n); the shared expert's row is the last
  bool shared;
  Planes in;
  Activation activation;
  Planes hidden;                  // ((most + 1) n, ...)
  float* out;                     // (slices, n, channels)
  int64_t slices, shared_slices;  // that each expert's product (plain: the only one) is cut into
  bool add;                       // plain, one slice: like bias
  Storage bias_storage;
  const void* bias;
};

// How many slices of a row of `cols` fill the GPU, if there are `products` of `channels` outputs.
int64_t stream_slices(const Context& c, int64_t products, int64_t channels, int64_t cols);
void multiply_stream(Context& c, const Stream& s);

}  // namespace eac::cuda
