// A launch of matrix products: a linear layer, or one of the two steps of a sparse-expert dispatch for all experts at once.
//
// SHAPES      plain    out (n, channels) = x (n, cols) weight^T + bias
//             gate_up  hidden (pairs, channels) = activation(x gate^T + bias) * (x up^T + bias), row `pair` from x[tokens[pair]]
//             down     out (pairs, channels) = hidden down^T + bias
// TILES       A block computes a tile: a slab of channels for `rows` pairs of one expert. Tiles of an expert follow each other, those with the
//             same weights first, so that blocks that run at the same time share weights and inputs in the L2. Which tiles there are is known
//             on the device only: the grid is an upper bound, and blocks without a tile end.
// SLICES      Where tiles are too few to fill the GPU, blockIdx.y cuts the channels in; each slice writes sums of its own, added up later in
//             order (add_slices, combine).
#pragma once
#include "kernels/cuda/matmul/planes.cuh"
#include "kernels/cuda/nn/pointwise.cuh"

namespace eac::cuda {

// So many rows at most are streamed past: stream.cuh, stream_linear.cu, gemv.cu.
inline constexpr int64_t few_rows = 8;

enum class Role : int32_t { plain, gate_up, down };
// Who multiplies: the tensor cores, from codes or from bf16 weights, or the CUDA cores in f32.
enum class Path : int32_t { codes, bf16, scalar };

// Copies of 16 bytes need rows that begin at multiples of 16.
__host__ __device__ inline Path path_of(const Weight& w) {
  if (w.storage == Storage::quantized) return Path::codes;
  return w.storage == Storage::bf16 && w.cols % 8 == 0 && reinterpret_cast<uintptr_t>(w.data) % 16 == 0 ? Path::bf16
                                                                                                        : Path::scalar;
}

struct Product {
  Role role;
  Path path;      // experts on another path are another launch's
  int tile_rows;  // 16 or 64, with wgmma 128
  int64_t n, cols, channels, shared_channels;
  Weight weight;              // plain
  const Expert* list;         // else: (routed, and the shared one)
  int64_t routed;             // experts
  const int32_t* begin;       // (routed + 2) first pair of each expert
  const int32_t* first_tile;  // (routed + 2)
  const int32_t* tokens;      // (pairs) or null: the input has a row a pair

  Planes in;  // paths codes, bf16
  const float* x;
  int64_t x_stride;  // path scalar

  Activation activation;
  Planes hidden;  // high null: not wanted in this form
  float* hidden_f32;
  int64_t hidden_stride;

  float* out;
  int64_t slices, slice_stride;
  bool add;
  Storage bias_storage;
  const void* bias;  // plain
};

struct Tile {
  const Expert* expert;  // null: plain
  int64_t channel, channels, pair;
  int rows;
  const float* bias[2] = {};  // of gate and up, or of down; may be null
};

inline int64_t slabs_of(int64_t channels, int64_t slab) { return ceil_div(channels, slab); }
// Blocks that suffice for any choice of experts: an expert's last tile may be short.
inline int64_t most_tiles(const Product& p, int64_t pairs, int64_t slab) {
  const int64_t tile_rows = p.tile_rows;
  if (p.role == Role::plain) return ceil_div(p.n, tile_rows) * slabs_of(p.channels, slab);
  const int64_t tiles = pairs / tile_rows + (pairs < p.routed ? pairs : p.routed);
  const int64_t shared = p.shared_channels ? ceil_div(p.n, tile_rows) * slabs_of(p.shared_channels, slab) : 0;
  return tiles * slabs_of(p.channels, slab) + shared;
}

// The tile of this block; false: none. All threads must call.
__device__ __forceinline__ bool find_tile(const Product& p, int slab, Tile& tile) {
  const int64_t b = blockIdx.x, tile_rows = p.tile_rows;
  if (p.role == Role::plain) {
    const int64_t tiles = (p.n + tile_rows - 1) / tile_rows, pair = b % tiles * tile_rows;
    tile = {nullptr, b / tiles * slab, p.channels, pair, int(min(tile_rows, p.n - pair))};
    return true;
  }
  __shared__ int found;
  if (threadIdx.x == 0) found = -1;
  __syncthreads();
  const int64_t slabs = (p.channels + slab - 1) / slab, shared_slabs = (p.shared_channels + slab - 1) / slab;
  for (int64_t e = threadIdx.x; e <= p.routed; e += blockDim.x) {
    const int64_t first = p.first_tile[e] * slabs;
    const int64_t blocks = (p.first_tile[e + 1] - p.first_tile[e]) * (e < p.routed ? slabs : shared_slabs);
    if (b >= first && b < first + blocks) found = int(e);
  }
  __syncthreads();
  const int64_t e = found;
  if (e < 0) return false;
  const int64_t tiles = p.first_tile[e + 1] - p.first_tile[e], i = b - p.first_tile[e] * slabs;
  const int64_t pair = p.begin[e] + i % tiles * tile_rows;
  tile = {p.list + e, i / tiles * slab, e < p.routed ? p.channels : p.shared_channels, pair,
          int(min(tile_rows, p.begin[e + 1] - pair))};
  if (p.role == Role::down)
    tile.bias[0] = tile.expert->down_bias;
  else
    tile.bias[0] = tile.expert->gate_bias, tile.bias[1] = tile.expert->up_bias;
  return path_of(p.role == Role::down ? tile.expert->down : tile.expert->gate) == p.path;
}

// `second`: the up matrix, else the one there is.
__device__ __forceinline__ Weight matrix_of(const Product& p, const Tile& t, bool second) {
  if (p.role == Role::plain) return p.weight;
  if (p.role == Role::down) return t.expert->down;
  return second ? t.expert->up : t.expert->gate;
}

__device__ __forceinline__ int64_t input_row(const Product& p, int64_t pair) { return p.tokens ? p.tokens[pair] : pair; }

__device__ __forceinline__ void store_out(const Product& p, const Tile& t, int row, int64_t channel, float v) {
  if (blockIdx.y == 0) {
    if (p.bias) v += load_float(p.bias_storage, p.bias, channel);
    if (t.bias[0]) v += t.bias[0][channel];
  }
  float* to = p.out + blockIdx.y * p.slice_stride + (t.pair + row) * p.channels + channel;
  *to = p.add ? *to + v : v;
}

// Channels from t.channels on are padding: zeros, which the planes need up to whole units.
__device__ __forceinline__ void store_hidden(const Product& p, const Tile& t, int row, int64_t channel, float gate, float up) {
  const bool real = channel < t.channels;
  if (real && t.bias[0]) gate += t.bias[0][channel];
  if (real && t.bias[1]) up += t.bias[1][channel];
  const float v = real ? glu_value(p.activation, gate, up) : 0.f;
  if (p.hidden.high && channel < (t.channels + unit_cols - 1) / unit_cols * unit_cols)
    store_split(p.hidden, t.pair + row, channel, v);
  if (p.hidden_f32 && real) p.hidden_f32[(t.pair + row) * p.hidden_stride + channel] = v;
}

// Rows of a tile, where an expert (plain: the only one) has about `each`.
int tile_rows_for(const Context& c, bool tensor_cores, int64_t each);
// How many slices keep the GPU busy.
int64_t tile_slices(const Context& c, const Product& p, int64_t pairs);
// The launch of p.path; pairs: all of the routed experts, at most.
void multiply_product(Context& c, const Product& p, int64_t pairs);
// Its parts.
inline constexpr int tile_slab = 256, scalar_slab = 64;                      // channels of a block
void multiply_tiles(Context& c, const Product& p, int64_t pairs);            // tiles.cu: codes, bf16
void multiply_warpgroup_tiles(Context& c, const Product& p, int64_t pairs);  // warpgroup_tiles.cu: the same with wgmma
void multiply_scalar(Context& c, const Product& p, int64_t pairs);           // scalar.cu

}  // namespace eac::cuda
