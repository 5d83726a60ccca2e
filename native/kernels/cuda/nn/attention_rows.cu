// Attention of up to 16 rows a group on the tensor cores: decoding where many query heads share keys and values, as in latent attention.
// Bound: memory, keys and values read once a split. Products are split (split_tile.cuh).
// METHOD  Keys and values pass in slices of 64 channels as in attention_tiles.cu, but all 8 warps share the 16 rows: a warp scores 8 of a tile's
//         64 keys against them, the weights meet in shared memory, and a warp adds up 8 of every 64 value channels.
#include "kernels/cuda/nn/attention.cuh"
#include "kernels/cuda/matmul/split_tile.cuh"

#include <algorithm>
#include <cmath>

namespace eac::cuda {
namespace {

constexpr int threads = 256, warps = threads / 32, tile_rows = 16, tile_keys = 64;
constexpr int query_bytes = tile_rows * tile_row_bytes, buffer_bytes = tile_keys * tile_row_bytes;

// One slice of queries after the other, two slices that pass, the weights, and a number of each warp and row.
__host__ __device__ constexpr size_t shared_bytes(int query_slices) {
  return size_t(query_slices + 1) * query_bytes + 2 * buffer_bytes + warps * tile_rows * sizeof(float);
}

// V: slices of 64 value channels.
template <int V> struct Block {
  const Attend& p;
  const Group group;
  const int split, rows, query_slices, thread, lane, warp;
  unsigned char *queries, *weights, *buffers;
  float* shared;  // (warps, tile_rows)
  int buffer = 0;
  Staged<tile_keys, threads> staged;
  float result[V][4] = {}, scores[3][4];
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  int first[2], end[2];  // what rows lane / 4 and lane / 4 + 8 see

  __device__ Block(const Attend& p, int64_t sequence, int64_t kv_head, int split)
      : p(p),
        group(p, sequence, kv_head),
        split(split),
        rows(group.tokens * p.heads_per_kv),
        query_slices(int(p.a.head_dim + tile_columns - 1) / tile_columns),
        thread(int(threadIdx.x)),
        lane(thread % 32),
        warp(thread / 32),
        queries(dynamic_shared<unsigned char>()),
        weights(queries + query_slices * query_bytes),
        buffers(weights + query_bytes),
        shared(reinterpret_cast<float*>(buffers + 2 * buffer_bytes)) {
    for (int i = 0; i < 2; i++) {
      const int r = lane / 4 + 8 * i, token = r / p.heads_per_kv;
      first[i] = r < rows ? group.first(token, p.window) : 0;
      end[i] = r < rows ? group.end(token) : 0;
    }
  }
  __device__ unsigned char* current() const { return buffers + buffer * buffer_bytes; }

  __device__ void load_queries() {
    const float s = p.a.scale * log2_e;
    for (int i = thread; i < query_slices * tile_rows * 8; i += threads) {
      const int slice = i / (tile_rows * 8), r = i / 8 % tile_rows, unit = i % 8, channel = slice * tile_columns + unit * 8;
      float4 x = make_float4(0, 0, 0, 0), y = x;
      if (r < rows && channel < p.a.head_dim) {
        const float4* q = reinterpret_cast<const float4*>(p.a.q + group.head_of(p, r) * p.a.head_dim + channel);
        x = make_float4(q[0].x * s, q[0].y * s, q[0].z * s, q[0].w * s);
        y = make_float4(q[1].x * s, q[1].y * s, q[1].z * s, q[1].w * s);
      }
      const Split8 both = split8(x, y);
      *reinterpret_cast<uint4*>(tile_unit(queries + slice * query_bytes, r, unit)) = both.high;
      *reinterpret_cast<uint4*>(tile_unit(queries + slice * query_bytes, r, unit + 8)) = both.low;
    }
  }
  // A slice of `width` channels of the rows from `from` on, `stride` floats apart; zeros from position `to` on.
  __device__ void load(const float* rows_at, int64_t stride, int count, int slice, int64_t width) {
    staged.load([&](int key, int column) {
      const int channel = slice * tile_columns + column;
      return key < count && channel < width ? rows_at + key * stride + channel : nullptr;
    });
  }
  __device__ void load_keys(int from, int to, int slice) {
    load(group.key(from), group.key_stride, to - from, slice, p.a.head_dim);
  }
  __device__ void load_values(int from, int to, int slice) {
    load(group.value(from), group.value_stride, to - from, slice, p.a.value_dim);
  }
  __device__ void turn() {
    buffer ^= 1;
    staged.store(current());
    __syncthreads();
  }

  // The three products of the split in sums of their own, which shortens the chains.
  __device__ static void multiply(float (&d)[3][4], const uint32_t (&a_high)[4], const uint32_t (&a_low)[4],
                                  const uint32_t (&b_high)[4], const uint32_t (&b_low)[4], int half) {
    const uint32_t high[2] = {b_high[2 * half], b_high[2 * half + 1]}, low[2] = {b_low[2 * half], b_low[2 * half + 1]};
    mma_bf16(d[0], a_high, high);
    mma_bf16(d[1], a_high, low);
    mma_bf16(d[2], a_low, high);
  }
  // Keys 8 warp .. 8 warp + 7 of the tile.
  __device__ void add_scores(int slice) {
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
      uint32_t b_high[4], b_low[4], a_high[4], a_low[4];  // of b: two steps of 16 channels
      load_matrices(b_high, tile_unit(current(), warp * 8 + lane % 8, pair * 4 + lane / 8));
      load_matrices(b_low, tile_unit(current(), warp * 8 + lane % 8, 8 + pair * 4 + lane / 8));
#pragma unroll
      for (int half = 0; half < 2; half++) {
        load_a(a_high, queries + slice * query_bytes, 0, 2 * pair + half, 0);
        load_a(a_low, queries + slice * query_bytes, 0, 2 * pair + half, 8);
        multiply(scores, a_high, a_low, b_high, b_low, half);
      }
    }
  }
  // Value channels 8 warp .. 8 warp + 7 of the slice.
  __device__ void add_values(float (&r)[4]) {
    float d[3][4] = {};
#pragma unroll 1  // registers
    for (int pair = 0; pair < 2; pair++) {
      uint32_t b_high[4], b_low[4], a_high[4], a_low[4];  // of b: two steps of 16 keys
      load_matrices_transposed(b_high, tile_unit(current(), pair * 32 + lane, warp));
      load_matrices_transposed(b_low, tile_unit(current(), pair * 32 + lane, 8 + warp));
#pragma unroll
      for (int half = 0; half < 2; half++) {
        load_a(a_high, weights, 0, 2 * pair + half, 0);
        load_a(a_low, weights, 0, 2 * pair + half, 8);
        multiply(d, a_high, a_low, b_high, b_low, half);
      }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) r[j] += d[0][j] + (d[1][j] + d[2][j]);
  }
  // The largest score of the warp's keys, a row.
  __device__ void offer_maxima(int from) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float top = -INFINITY;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int at = from + warp * 8 + 2 * (lane % 4) + j;
        float& s = scores[0][2 * i + j];
        s += scores[1][2 * i + j] + scores[2][2 * i + j];
        if (at < first[i] || at >= end[i]) s = -INFINITY;
        top = fmaxf(top, s);
      }
      for (int step = 1; step < 4; step *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
      if (lane % 4 == 0) shared[warp * tile_rows + lane / 4 + 8 * i] = top;
    }
  }
  // Scores become weights in shared memory, and the result so far shrinks to the new maximum.
  __device__ void weigh() {
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = lane / 4 + 8 * i;
      float top = maximum[i];
#pragma unroll
      for (int w = 0; w < warps; w++) top = fmaxf(top, shared[w * tile_rows + r]);
      shrink[i] = exp2_below(maximum[i], top);
      maximum[i] = top;
      const float a = exp2_below(scores[0][2 * i], top), b = exp2_below(scores[0][2 * i + 1], top);
      sum[i] = sum[i] * shrink[i] + a + b;
      uint32_t high, low;
      split_pair(a, b, high, low);
      reinterpret_cast<uint32_t*>(tile_unit(weights, r, warp))[lane % 4] = high;
      reinterpret_cast<uint32_t*>(tile_unit(weights, r, 8 + warp))[lane % 4] = low;
    }
#pragma unroll
    for (int v = 0; v < V; v++)
#pragma unroll
      for (int j = 0; j < 4; j++) result[v][j] *= shrink[j / 2];
    __syncthreads();
  }

  __device__ void run() {
    const int last = group.end(group.tokens - 1), start = group.first(0, p.window) + split * p.part.chunk;
    const int to = p.part.splits == 1 ? last : min(last, start + p.part.chunk);
    if (start < to) {
      load_keys(start, to, 0);
      load_queries();
      turn();
    }
    for (int from = start; from < to; from += tile_keys) tile(from, to);
    write();
  }
  __device__ void tile(int from, int to) {
#pragma unroll
    for (int i = 0; i < 3; i++)
      for (int j = 0; j < 4; j++) scores[i][j] = 0;
    for (int slice = 0; slice < query_slices; slice++) {
      const bool more = slice + 1 < query_slices;
      if (more)
        load_keys(from, to, slice + 1);
      else
        load_values(from, to, 0);
      add_scores(slice);
      if (!more) offer_maxima(from);
      turn();
    }
    weigh();
#pragma unroll
    for (int v = 0; v < V; v++) {
      const bool more = v + 1 < V && (v + 1) * tile_columns < p.a.value_dim;
      if (more)
        load_values(from, to, v + 1);
      else if (from + tile_keys < to)
        load_keys(from + tile_keys, to, 0);
      add_values(result[v]);
      turn();
      if (!more) break;
    }
  }
  __device__ void write() {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      for (int step = 1; step < 4; step *= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], step);
      if (lane % 4 == 0) shared[warp * tile_rows + lane / 4 + 8 * i] = sum[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = lane / 4 + 8 * i;
      if (r >= rows) continue;
      const int64_t head = group.head_of(p, r);
      float total = 0;
      for (int w = 0; w < warps; w++) total += shared[w * tile_rows + r];
      const float scale = p.finish(split, head, maximum[i], total, warp == 0 && lane % 4 == 0);
      float* out = p.results(split) + head * p.a.value_dim;
#pragma unroll
      for (int v = 0; v < V; v++) {
        const int channel = v * tile_columns + warp * 8 + 2 * (lane % 4);
        if (channel < p.a.value_dim)
          *reinterpret_cast<float2*>(out + channel) = make_float2(result[v][2 * i] * scale, result[v][2 * i + 1] * scale);
      }
    }
  }
};

template <int V> __global__ __launch_bounds__(threads, 2) void attend_rows_kernel(Attend p) {
  wait_for_earlier();
  Block<V> block(p, blockIdx.x / p.a.kv_heads, blockIdx.x % p.a.kv_heads, int(blockIdx.y));
  block.run();
}

}  // namespace

void attend_rows(Context& c, Attend p) {
  const Attention& a = p.a;
  p.part = split_for_decoding(c, a, 2 * c.multiprocessors, attention_span(a, a.batch.longest), tile_keys);
  const Grid grid{dim3(unsigned(a.batch.sequences * a.kv_heads), unsigned(p.part.splits)), dim3(threads),
                  shared_bytes(int(ceil_div<int64_t>(a.head_dim, tile_columns)))};
  a.value_dim <= 128 ? launch<attend_rows_kernel<2>>(c, grid, p) : launch<attend_rows_kernel<8>>(c, grid, p);
  merge_splits(c, p);
}

}  // namespace eac::cuda
