// Attention of many rows, on the tensor cores: a block takes 128 rows of a group, a warp 16 of them, and goes through the keys in tiles of 64 or 32.
// Bound: matrix products, 3 of bf16 for one of f32 (split_tile.cuh): 6 (head_dim + value_dim) operations a row and key it sees.
// METHOD  Queries are scaled and split beforehand and copied asynchronously. Keys and values pass in slices of 64 channels, slice after slice:
//         while the products of one run, the next is loaded into registers, to be split into the other half of the buffer. Scores and results
//         stay in registers; scores turn into the operand of the second product without leaving them (FlashAttention-2, Dao, 2023).
//         Values wider than 256 are shared by several blocks, each of which computes the scores.
#include "kernels/cuda/nn/attention.cuh"
#include "kernels/cuda/matmul/split_tile.cuh"

#include <algorithm>
#include <cmath>

namespace eac::cuda {
namespace {

constexpr int threads = 256, row_tile = 128;
constexpr int query_bytes = row_tile * tile_row_bytes;
// Keys a tile, for V slices of values: the results of 256 channels leave few registers.
constexpr int key_tile(int V) { return V > 2 ? 32 : 64; }
// Of the queries and of what passes, two slices each: up to 96 KB.
constexpr size_t shared_bytes(int V) { return 2 * query_bytes + 2 * size_t(key_tile(V)) * tile_row_bytes; }

struct TileWork {
  Attend p;
  int query_slices, parts;     // slices of 64 channels of a head; blocks that share the values
  const unsigned char* query;  // (rows, heads, query_slices) rows of tiles, not swizzled
};

// 8 channels a thread.
__global__ void split_queries_kernel(Attention a, int slices, unsigned char* out) {
  wait_for_earlier();
  const int64_t i = global_thread(), piece = i % (slices * 8), head = i / (slices * 8), column = piece * 8;
  if (head >= a.batch.rows * a.heads) return;
  float4 x = make_float4(0, 0, 0, 0), y = x;
  if (column < a.head_dim) {
    const float4* q = reinterpret_cast<const float4*>(a.q + head * a.head_dim + column);
    const float s = a.scale * log2_e;
    x = make_float4(q[0].x * s, q[0].y * s, q[0].z * s, q[0].w * s);
    y = make_float4(q[1].x * s, q[1].y * s, q[1].z * s, q[1].w * s);
  }
  const Split8 both = split8(x, y);
  uint4* row = reinterpret_cast<uint4*>(out + (head * slices + piece / 8) * tile_row_bytes);
  row[piece % 8] = both.high, row[8 + piece % 8] = both.low;
}

// V: slices of 64 value channels.
template <int V> struct Tile {
  static constexpr int keys = key_tile(V), buffer_bytes = keys * tile_row_bytes;
  const TileWork& w;
  const Attend& p;
  const Group group;
  const int split, row, rows;  // first row, and how many the group has
  const int first_value;       // channel
  const int thread, lane, warp;
  unsigned char *queries, *buffers;
  int buffer = 0, query_slot = 0;
  Staged<keys, threads> staged;
  float result[V][8][4] = {}, scores[keys / 8][4];
  uint32_t high[keys / 8][2], low[keys / 8][2];  // the weights, split: of rows lane / 4 and lane / 4 + 8
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  int first[2], end[2];  // what these rows see

  __device__ Tile(const TileWork& w, int64_t sequence, int64_t kv_head, int split, int tile, int part)
      : w(w),
        p(w.p),
        group(w.p, sequence, kv_head),
        split(split),
        row(tile * row_tile),
        rows(group.tokens * w.p.heads_per_kv),
        first_value(part * V * tile_columns),
        thread(int(threadIdx.x)),
        lane(thread % 32),
        warp(thread / 32),
        queries(dynamic_shared<unsigned char>()),
        buffers(queries + 2 * query_bytes) {
    for (int i = 0; i < 2; i++) {
      const int r = row + warp * 16 + lane / 4 + 8 * i, token = r / p.heads_per_kv;
      first[i] = r < rows ? group.first(token, p.window) : 0;
      end[i] = r < rows ? group.end(token) : 0;
    }
  }
  __device__ unsigned char* current() const { return buffers + buffer * buffer_bytes; }
  __device__ bool queries_stay() const { return w.query_slices <= 2; }

  __device__ void fetch_queries(int slice, int slot) {
    unsigned char* tile = queries + slot * query_bytes;
    for (int i = thread; i < row_tile * 16; i += threads) {
      const int r = i / 16, unit = i % 16;
      const bool valid = row + r < rows;
      const int64_t head = valid ? group.head_of(p, row + r) : 0;
      copy_async(tile_unit(tile, r, unit), w.query + (head * w.query_slices + slice) * tile_row_bytes + unit * 16, valid);
    }
    copy_commit();
  }
  __device__ void load_keys(int from, int to, int slice) {
    staged.load([&](int key, int column) {
      const int at = from + key, channel = slice * tile_columns + column;
      return at < to && channel < p.a.head_dim ? group.key(at) + channel : nullptr;
    });
  }
  __device__ void load_values(int from, int to, int slice) {
    staged.load([&](int key, int column) {
      const int at = from + key, channel = first_value + slice * tile_columns + column;
      return at < to && channel < p.a.value_dim ? group.value(at) + channel : nullptr;
    });
  }
  // What was loaded becomes the current slice.
  __device__ void turn() {
    buffer ^= 1;
    staged.store(current());
    copy_wait<0>();
    __syncthreads();
  }

  __device__ void add_scores(int slice) {
    unsigned char* tile = queries + (queries_stay() ? slice : query_slot) * query_bytes;
    const int steps = (min(tile_columns, int(p.a.head_dim) - slice * tile_columns) + 15) / 16;
#pragma unroll
    for (int step = 0; step < 4; step++) {
      if (step >= steps) break;
      uint32_t a_high[4], a_low[4], b_high[4], b_low[4];
      load_a(a_high, tile, warp * 16, step, 0);
      load_a(a_low, tile, warp * 16, step, 8);
#pragma unroll
      for (int n = 0; n < keys / 16; n++) {
        load_b(b_high, current(), n * 16, step, 0);
        load_b(b_low, current(), n * 16, step, 8);
        mma_split(scores[2 * n], scores[2 * n + 1], a_high, a_low, b_high, b_low);
      }
    }
  }
  __device__ void add_values(float (&r)[8][4]) {
#pragma unroll
    for (int step = 0; step < keys / 16; step++) {
      const uint32_t a_high[4] = {high[2 * step][0], high[2 * step][1], high[2 * step + 1][0], high[2 * step + 1][1]};
      const uint32_t a_low[4] = {low[2 * step][0], low[2 * step][1], low[2 * step + 1][0], low[2 * step + 1][1]};
      uint32_t b_high[4], b_low[4];
#pragma unroll
      for (int n = 0; n < 4; n++) {
        load_b_rows(b_high, current(), step * 16, n, 0);
        load_b_rows(b_low, current(), step * 16, n, 8);
        mma_split(r[2 * n], r[2 * n + 1], a_high, a_low, b_high, b_low);
      }
    }
  }
  // Scores of the keys from `from` on become weights, and the result so far shrinks to the new maximum.
  __device__ void weigh(int from) {
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float top = -INFINITY;
      const bool all = first[i] <= from && from + keys <= end[i];
#pragma unroll
      for (int n = 0; n < keys / 8; n++)
        for (int j = 0; j < 2; j++) {
          const int at = from + n * 8 + 2 * (lane % 4) + j;
          float& s = scores[n][2 * i + j];
          if (!all && (at < first[i] || at >= end[i])) s = -INFINITY;
          top = fmaxf(top, s);
        }
      for (int step = 1; step < 4; step *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
      top = fmaxf(top, maximum[i]);
      shrink[i] = exp2_below(maximum[i], top);
      maximum[i] = top;
      sum[i] *= shrink[i];
#pragma unroll
      for (int n = 0; n < keys / 8; n++) {
        const float a = exp2_below(scores[n][2 * i], top), b = exp2_below(scores[n][2 * i + 1], top);
        sum[i] += a + b;
        split_pair(a, b, high[n][i], low[n][i]);
      }
    }
#pragma unroll
    for (int v = 0; v < V; v++)
#pragma unroll
      for (int n = 0; n < 8; n++)
        for (int j = 0; j < 4; j++) result[v][n][j] *= shrink[j / 2];
  }

  __device__ void run() {
    const int last_row = min(rows, row + row_tile) - 1, last = group.end(last_row / p.heads_per_kv);
    const int start = group.first(row / p.heads_per_kv, p.window) + split * p.part.chunk;
    const int to = p.part.splits == 1 ? last : min(last, start + p.part.chunk);
    if (start < to) {
      fetch_queries(0, 0);
      if (queries_stay() && w.query_slices == 2) fetch_queries(1, 1);
      load_keys(start, to, 0);
      turn();
    }
    for (int from = start; from < to; from += keys) tile(from, to);
    write();
  }
  __device__ void tile(int from, int to) {
    // Whether any row of the warp sees any of these keys.
    const bool seen =
        __any_sync(0xffffffffu, (end[0] > from && first[0] < from + keys) || (end[1] > from && first[1] < from + keys));
#pragma unroll
    for (int n = 0; n < keys / 8; n++)
      for (int j = 0; j < 4; j++) scores[n][j] = 0;
    for (int slice = 0; slice < w.query_slices; slice++) {
      const bool more = slice + 1 < w.query_slices;
      if (more) {
        load_keys(from, to, slice + 1);
        if (!queries_stay()) fetch_queries(slice + 1, query_slot ^ 1);
      } else {
        load_values(from, to, 0);
        if (!queries_stay() && from + keys < to) fetch_queries(0, query_slot ^ 1);
      }
      if (seen) add_scores(slice);
      query_slot ^= 1;
      turn();
    }
    if (seen) weigh(from);
#pragma unroll
    for (int v = 0; v < V; v++) {
      const bool more = v + 1 < V && first_value + (v + 1) * tile_columns < p.a.value_dim;
      if (more)
        load_values(from, to, v + 1);
      else
        load_keys(from + keys, to, 0);  // zeros behind the last tile
      if (seen) add_values(result[v]);
      turn();
      if (!more) break;
    }
  }
  __device__ void write() {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      for (int step = 1; step < 4; step *= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], step);
      const int r = row + warp * 16 + lane / 4 + 8 * i;
      if (r >= rows) continue;
      const int64_t head = group.head_of(p, r);
      const float scale = p.finish(split, head, maximum[i], sum[i], lane % 4 == 0 && first_value == 0);
      float* out = p.results(split) + head * p.a.value_dim;
#pragma unroll
      for (int v = 0; v < V; v++)
#pragma unroll
        for (int n = 0; n < 8; n++) {
          const int channel = first_value + v * tile_columns + n * 8 + 2 * (lane % 4);
          if (channel < p.a.value_dim)
            *reinterpret_cast<float2*>(out + channel) = make_float2(result[v][n][2 * i] * scale, result[v][n][2 * i + 1] * scale);
        }
    }
  }
};

// Blocks: (row tiles, those with the most keys first), (kv head, part of the values, split), sequence.
template <int V> __global__ __launch_bounds__(threads, 1) void attend_tiles_kernel(TileWork w) {
  wait_for_earlier();
  const int tile = int(gridDim.x - 1 - blockIdx.x), kv_heads = int(w.p.a.kv_heads), rest = int(blockIdx.y) / kv_heads;
  if (int64_t(tile) * row_tile >= int64_t(w.p.a.batch.length[blockIdx.z]) * w.p.heads_per_kv) return;
  Tile<V> t(w, blockIdx.z, int(blockIdx.y) % kv_heads, rest / w.parts, tile, rest % w.parts);
  t.run();
}

}  // namespace

void attend_tiles(Context& c, Attend p) {
  const Attention& a = p.a;
  const int slices = a.value_dim <= 64 ? 1 : a.value_dim <= 128 ? 2 : 4;
  TileWork w{p, int(ceil_div<int64_t>(a.head_dim, tile_columns)), int(ceil_div<int64_t>(a.value_dim, slices * tile_columns)),
             nullptr};
  const int64_t tiles = ceil_div(a.batch.longest * p.heads_per_kv, int64_t(row_tile));
  const int64_t tokens = std::min<int64_t>(a.batch.longest, row_tile / p.heads_per_kv + 2);  // that a tile's rows belong to
  const int64_t blocks = tiles * a.batch.sequences * a.kv_heads * w.parts;
  w.p.part = split_keys(c, a, blocks, 2 * c.multiprocessors, attention_span(a, tokens), key_tile(slices), 256);
  unsigned char* query = c.scratch[1].get<unsigned char>(a.batch.rows * a.heads * w.query_slices * tile_row_bytes);
  w.query = query;
  launch<split_queries_kernel>(c, per_element(a.batch.rows * a.heads * w.query_slices * 8), a, w.query_slices, query);
  const Grid grid{dim3(unsigned(tiles), unsigned(a.kv_heads * w.parts * w.p.part.splits), unsigned(a.batch.sequences)),
                  dim3(threads), shared_bytes(slices)};
  switch (slices) {
    case 1: launch<attend_tiles_kernel<1>>(c, grid, w); break;
    case 2: launch<attend_tiles_kernel<2>>(c, grid, w); break;
    default: launch<attend_tiles_kernel<4>>(c, grid, w);
  }
  merge_splits(c, w.p);
}

}  // namespace eac::cuda
