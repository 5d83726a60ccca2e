// Products head by head with dense weights.
// Few tokens: 8 lanes an output; bound: memory, the weights read once. Many: a block takes 128 tokens and 64 outputs of a head on the tensor
// cores (split_tile.cuh); bound: 2 (bf16 weights, whose low parts are zero) or 3 products of bf16 for one.
#include "kernels/cuda/context.cuh"
#include "kernels/cuda/matmul/split_tile.cuh"

#include <algorithm>

namespace eac::cuda {
namespace {

constexpr int threads = 256, token_tile = 128, output_tile = 64;
constexpr int x_bytes = token_tile * tile_row_bytes, y_bytes = output_tile * tile_row_bytes;
constexpr int64_t few = 8;  // tokens

struct Work {
  HeadLinear a;
  int64_t in, out;  // of a head
};

__device__ __forceinline__ void to_floats(Storage storage, const uint4& bits, float (&v)[8]) {
  const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    v[2 * i] = storage == Storage::bf16 ? bf16_low(pairs[i]) : half_to_float(uint16_t(pairs[i]));
    v[2 * i + 1] = storage == Storage::bf16 ? bf16_high(pairs[i]) : half_to_float(uint16_t(pairs[i] >> 16));
  }
}

// 8 stored floats from element i on; `vectors`: their address is aligned to 16 bytes.
template <bool vectors>
__device__ __forceinline__ void load8(Storage storage, const void* data, int64_t i, int count, float (&v)[8]) {
  if constexpr (vectors) {
    if (storage == Storage::f32) {
      const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(data) + i);
      const float4 a = from[0], b = from[1];
      v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
      to_floats(storage, *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + i), v);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = j < count ? load_float(storage, data, i + j) : 0.f;
  }
}

// N: tokens of a block.
template <int N, bool vectors> __global__ __launch_bounds__(threads) void few_kernel(Work w) {
  wait_for_earlier();
  const HeadLinear& a = w.a;
  const int lane = int(threadIdx.x % 8);
  const int64_t output = global_thread() / 8, first = int64_t(blockIdx.y) * N;
  const bool valid = output < a.heads * w.out;
  const int64_t head = valid ? output / w.out : 0;
  float sums[N] = {};
  for (int64_t i = lane * 8; valid && i < w.in; i += 64) {
    const int count = int(min(int64_t(8), w.in - i));
    float y[8], x[8];
    load8<vectors>(a.weight.storage, a.weight.data, output * w.in + i, count, y);
#pragma unroll
    for (int t = 0; t < N; t++) {
      if (first + t >= a.n) break;
      load8<vectors>(Storage::f32, a.x, ((first + t) * a.heads + head) * a.x_width + i, count, x);
#pragma unroll
      for (int j = 0; j < 8; j++) sums[t] += x[j] * y[j];
    }
  }
#pragma unroll
  for (int t = 0; t < N; t++) {
    for (int step = 1; step < 8; step *= 2) sums[t] += __shfl_xor_sync(0xffffffffu, sums[t], step);
    if (valid && lane == t % 8 && first + t < a.n)
      a.out[((first + t) * a.heads + head) * a.out_width + output - head * w.out] = sums[t];
  }
}

// A slice of the weights on its way: 64 outputs by 64 inputs.
struct WeightSlice {
  static constexpr int pieces = output_tile * 8 / threads;
  uint4 v[pieces][2];

  template <class At> __device__ __forceinline__ void load(Storage storage, const void* data, At at) {
#pragma unroll
    for (int i = 0; i < pieces; i++) {
      const int piece = int(threadIdx.x) + i * threads;
      const int64_t element = at(piece / 8, piece % 8 * 8);  // -1: nothing
      v[i][0] = v[i][1] = make_uint4(0, 0, 0, 0);
      if (element < 0) continue;
      const uint4* from =
          reinterpret_cast<const uint4*>(static_cast<const char*>(data) + element * (storage == Storage::f32 ? 4 : 2));
      v[i][0] = from[0];
      if (storage == Storage::f32) v[i][1] = from[1];
    }
  }
  template <bool lows> __device__ __forceinline__ void store(Storage storage, unsigned char* tile) const {
#pragma unroll
    for (int i = 0; i < pieces; i++) {
      const int piece = int(threadIdx.x) + i * threads, row = piece / 8, unit = piece % 8;
      const uint4 &a = v[i][0], &b = v[i][1];
      if constexpr (!lows) {
        *reinterpret_cast<uint4*>(tile_unit(tile, row, unit)) = a;
        continue;
      }
      float f[8] = {__uint_as_float(a.x), __uint_as_float(a.y), __uint_as_float(a.z), __uint_as_float(a.w),
                    __uint_as_float(b.x), __uint_as_float(b.y), __uint_as_float(b.z), __uint_as_float(b.w)};
      if (storage != Storage::f32) to_floats(storage, a, f);
      const Split8 s = split8(make_float4(f[0], f[1], f[2], f[3]), make_float4(f[4], f[5], f[6], f[7]));
      *reinterpret_cast<uint4*>(tile_unit(tile, row, unit)) = s.high;
      *reinterpret_cast<uint4*>(tile_unit(tile, row, unit + 8)) = s.low;
    }
  }
};

// Products of one slice: a warp has 16 tokens and all 64 outputs.
template <bool lows> __device__ __forceinline__ void multiply(float (&sums)[8][4], unsigned char* x, unsigned char* y, int warp) {
#pragma unroll
  for (int step = 0; step < 4; step++) {
    uint32_t a_high[4], a_low[4], b_high[4], b_low[4];
    load_a(a_high, x, warp * 16, step, 0);
    load_a(a_low, x, warp * 16, step, 8);
#pragma unroll
    for (int n = 0; n < 4; n++) {
      load_b(b_high, y, n * 16, step, 0);
      if constexpr (lows) {
        load_b(b_low, y, n * 16, step, 8);
        mma_split(sums[2 * n], sums[2 * n + 1], a_high, a_low, b_high, b_low);
      } else {
        const uint32_t b0[2] = {b_high[0], b_high[1]}, b1[2] = {b_high[2], b_high[3]};
        mma_bf16(sums[2 * n], a_low, b0);
        mma_bf16(sums[2 * n + 1], a_low, b1);
        mma_bf16(sums[2 * n], a_high, b0);
        mma_bf16(sums[2 * n + 1], a_high, b1);
      }
    }
  }
}

// Blocks: token tiles, (output tile, head).
template <bool lows> __global__ __launch_bounds__(threads) void tile_kernel(Work w) {
  wait_for_earlier();
  const HeadLinear& a = w.a;
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const int64_t token = int64_t(blockIdx.x) * token_tile, tiles = (w.out + output_tile - 1) / output_tile;
  const int64_t head = blockIdx.y / tiles, output = blockIdx.y % tiles * output_tile;
  unsigned char *x_tiles = dynamic_shared<unsigned char>(), *y_tiles = x_tiles + 2 * x_bytes;
  Staged<token_tile, threads> x;
  WeightSlice y;
  const auto load = [&](int64_t slice) {
    x.load([&](int t, int column) {
      const int64_t i = slice + column;
      return token + t < a.n && i < w.in ? a.x + ((token + t) * a.heads + head) * a.x_width + i : nullptr;
    });
    y.load(a.weight.storage, a.weight.data, [&](int o, int column) {
      const int64_t i = slice + column;
      return output + o < w.out && i < w.in ? (head * w.out + output + o) * w.in + i : int64_t(-1);
    });
  };
  const auto store = [&](int buffer) {
    x.store(x_tiles + buffer * x_bytes);
    y.store<lows>(a.weight.storage, y_tiles + buffer * y_bytes);
    __syncthreads();
  };
  float sums[8][4] = {};
  load(0);
  store(0);
  int buffer = 0;
  for (int64_t slice = 0; slice < w.in; slice += tile_columns) {
    const bool more = slice + tile_columns < w.in;
    if (more) load(slice + tile_columns);
    multiply<lows>(sums, x_tiles + buffer * x_bytes, y_tiles + buffer * y_bytes, warp);
    buffer ^= 1;
    if (more) store(buffer);
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int64_t t = token + warp * 16 + lane / 4 + 8 * i;
    if (t >= a.n) continue;
    float* out = a.out + (t * a.heads + head) * a.out_width;
#pragma unroll
    for (int n = 0; n < 8; n++)
      for (int j = 0; j < 2; j++) {
        const int64_t o = output + n * 8 + 2 * (lane % 4) + j;
        if (o < w.out) out[o] = sums[n][2 * i + j];
      }
  }
}

template <int N> void run_few(Context& c, const Work& w, bool vectors) {
  Grid grid = per_element(w.a.heads * w.out * 8);
  grid.blocks.y = unsigned(ceil_div<int64_t>(w.a.n, N));
  vectors ? launch<few_kernel<N, true>>(c, grid, w) : launch<few_kernel<N, false>>(c, grid, w);
}

}  // namespace

void head_linear(Context& c, const HeadLinear& a) {
  require(a.weight.storage != Storage::quantized, "a product head by head takes dense weights");
  require(a.heads > 0 && a.weight.rows % a.heads == 0, "the weights do not divide into so many heads");
  const Work w{a, a.weight.cols, a.weight.rows / a.heads};
  require(w.in <= a.x_width && w.out <= a.out_width, "the weights are wider than a head");
  require(a.n <= few * 65535, "too many tokens for a product head by head");
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool vectors = w.in % 8 == 0 && a.x_width % 4 == 0 && aligned(a.x) && aligned(a.weight.data);
  const int64_t output_tiles = ceil_div(w.out, int64_t(output_tile)) * a.heads;
  if (a.n == 1) return run_few<1>(c, w, vectors);
  if (a.n <= few || !vectors || output_tiles > 65535) return run_few<few>(c, w, vectors);
  const Grid grid{dim3(unsigned(ceil_div<int64_t>(a.n, token_tile)), unsigned(output_tiles)), dim3(threads),
                  2 * size_t(x_bytes + y_bytes)};
  a.weight.storage == Storage::bf16 ? launch<tile_kernel<false>>(c, grid, w) : launch<tile_kernel<true>>(c, grid, w);
}

}  // namespace eac::cuda
