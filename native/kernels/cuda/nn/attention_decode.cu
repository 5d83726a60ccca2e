// Attention of few rows, as in decoding: one block a kv head, sequence and split of its keys (flash-decoding).
// Bound: memory, keys and values read once for all the query heads that share them. Tiles of keys and values come through shared memory by
// asynchronous copies, one tile ahead; several blocks share a multiprocessor.
// Source: Flash-Decoding (Dao et al., 2023).
#include "kernels/cuda/nn/attention.cuh"

#include <algorithm>
#include <cmath>

namespace eac::cuda {
namespace {

constexpr int threads = 128, stages = 2;

// Float4 a row of keys: for the 128 / T lanes that share a key, those of 8 lanes fall into different banks.
template <int T> __host__ __device__ constexpr int key_units(int64_t head_dim) {
  int units = int(head_dim / 4);
  if (T == 32)
    while (units % 8 != 4) units += 2;
  return units;
}
template <int R, int T> size_t shared_floats(int64_t head_dim, int64_t value_dim) {
  const size_t tiles = stages * T * (size_t(key_units<T>(head_dim)) * 4 + size_t(value_dim));
  const size_t reduction = size_t(threads) * R * 4;
  return std::max(tiles, reduction) + size_t(R) * size_t(head_dim) + R * T + R;
}

// A thread's way through rows of `units` float4, `threads` of them further each time.
struct Walk {
  int units, row, unit, rows_on, units_on;
  __device__ Walk(int units, int thread)
      : units(units), row(thread / units), unit(thread % units), rows_on(threads / units), units_on(threads % units) {}
};

// R: rows, T: keys a tile.
template <int R, int T> struct Block {
  static constexpr int lanes = threads / T;  // a key
  const Attend& p;
  const Group group;
  const int split;
  const int rows, key_size, value_size;  // float4 a row of a tile
  const int head_units, thread;          // float4 a head
  const Walk key_walk, value_walk;
  const int each;                                      // keys whose values a thread adds up
  float4 *tiles, *queries, sums[R];                    // queries (R, head_units)
  float *scores, *shrink;                              // (R, T), (R)
  float maximum[ceil_div(R, 4)], sum[ceil_div(R, 4)];  // of rows warp, warp + 4

  __device__ Block(const Attend& p, int64_t sequence, int64_t kv_head, int split)
      : p(p),
        group(p, sequence, kv_head),
        split(split),
        rows(group.tokens * p.heads_per_kv),
        key_size(key_units<T>(p.a.head_dim)),
        value_size(int(p.a.value_dim / 4)),
        head_units(int(p.a.head_dim / 4)),
        thread(int(threadIdx.x)),
        key_walk(head_units, thread),
        value_walk(value_size, thread),
        each(ceil_div(ceil_div(T, value_groups()), 4) * 4) {
    tiles = dynamic_shared<float4>();
    const int tile_units = stages * T * (key_size + value_size);
    queries = tiles + max(tile_units, threads * R);
    scores = reinterpret_cast<float*>(queries + R * head_units);
    shrink = scores + R * T;
    for (int i = 0; i < ceil_div(R, 4); i++) maximum[i] = -INFINITY, sum[i] = 0;
    for (int r = 0; r < R; r++) sums[r] = make_float4(0, 0, 0, 0);
  }
  __device__ float4* keys(int stage) const { return tiles + stage * T * (key_size + value_size); }
  __device__ float4* values(int stage) const { return keys(stage) + T * key_size; }

  __device__ void load_queries() {
    for (int i = thread; i < R * head_units; i += threads) {
      const int r = i / head_units;
      float4 q = make_float4(0, 0, 0, 0);
      if (r < rows) q = reinterpret_cast<const float4*>(p.a.q + group.head_of(p, r) * p.a.head_dim)[i % head_units];
      const float scale = p.a.scale * log2_e;
      queries[i] = make_float4(q.x * scale, q.y * scale, q.z * scale, q.w * scale);
    }
  }
  // T rows, `size` float4 apart in the tile and `stride` floats in memory, from the first on; zeros from row `valid` on.
  __device__ void copy_rows(Walk w, float4* tile, int size, const float* from, int64_t stride, int valid) {
    float4* to = tile + w.row * size + w.unit;
    const float* at = from + w.row * stride + w.unit * 4;
    while (w.row < T) {
      const bool there = w.row < valid;
      copy_async(to, there ? at : from, there);
      w.row += w.rows_on, w.unit += w.units_on;
      to += w.rows_on * size + w.units_on, at += w.rows_on * stride + w.units_on * 4;
      if (w.unit >= w.units) w.unit -= w.units, w.row++, to += size - w.units, at += stride - w.units * 4;
    }
  }
  // Keys and values of positions [from, end) on their way into a stage.
  __device__ void fetch(int stage, int from, int end) {
    copy_rows(key_walk, keys(stage), key_size, group.key(from), group.key_stride, end - from);
    copy_rows(value_walk, values(stage), value_size, group.value(from), group.value_stride, end - from);
    copy_commit();
  }
  // Key thread / lanes of the tile against all rows.
  __device__ void score(int stage, int from, int end) {
    const int key = thread / lanes, lane = thread % lanes;
    const float4* k = keys(stage) + key * key_size;
    float s[R] = {};
#pragma unroll 2
    for (int u = lane; u < head_units; u += lanes) {
      const float4 x = k[u];
#pragma unroll
      for (int r = 0; r < R; r++) {
        const float4 q = queries[r * head_units + u];
        s[r] += x.x * q.x + x.y * q.y + x.z * q.z + x.w * q.w;
      }
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
      for (int step = 1; step < lanes; step *= 2) s[r] += __shfl_xor_sync(0xffffffffu, s[r], step);
      const int token = r / p.heads_per_kv, at = from + key;
      const bool seen = r < rows && at < end && at < group.end(token) && at >= group.first(token, p.window);
      if (lane == r % lanes) scores[r * T + key] = seen ? s[r] : -INFINITY;
    }
  }
  // Scores become weights; warp w has rows w, w + 4.
  __device__ void weigh() {
    const int lane = thread % 32;
#pragma unroll
    for (int i = 0; i < ceil_div(R, 4); i++) {
      const int r = thread / 32 + 4 * i;
      if (r >= R) break;
      const float s = lane < T ? scores[r * T + lane] : -INFINITY, before = maximum[i];
      maximum[i] = fmaxf(before, warp_max(s));
      const float w = exp2_below(s, maximum[i]), less = exp2_below(before, maximum[i]);
      sum[i] = sum[i] * less + warp_sum(w);
      if (lane < T) scores[r * T + lane] = w;
      if (lane == 0) shrink[r] = less;
    }
  }
  // A thread has 4 channels of the values of some keys, a multiple of 4.
  __device__ int value_groups() const { return value_walk.rows_on; }
  __device__ void add_values(int stage) {
    const int g = value_walk.row, unit = value_walk.unit;
    if (g >= value_groups()) return;
#pragma unroll
    for (int r = 0; r < R; r++) sums[r].x *= shrink[r], sums[r].y *= shrink[r], sums[r].z *= shrink[r], sums[r].w *= shrink[r];
#pragma unroll 1
    for (int key = g * each; key < T && key < (g + 1) * each; key += 4) {
      float4 v[4];
#pragma unroll
      for (int j = 0; j < 4; j++) v[j] = values(stage)[(key + j) * value_size + unit];
#pragma unroll
      for (int r = 0; r < R; r++) {
        const float4 w = *reinterpret_cast<const float4*>(scores + r * T + key);
        sums[r].x += w.x * v[0].x + w.y * v[1].x + w.z * v[2].x + w.w * v[3].x;
        sums[r].y += w.x * v[0].y + w.y * v[1].y + w.z * v[2].y + w.w * v[3].y;
        sums[r].z += w.x * v[0].z + w.y * v[1].z + w.z * v[2].z + w.w * v[3].z;
        sums[r].w += w.x * v[0].w + w.y * v[1].w + w.z * v[2].w + w.w * v[3].w;
      }
    }
  }
  __device__ void run() {
    load_queries();
    const int last = group.end(group.tokens - 1), start = group.first(0, p.window) + split * p.part.chunk;
    const int end = p.part.splits == 1 ? last : min(last, start + p.part.chunk);
    if (start < end) fetch(0, start, end);
    int stage = 0;
    for (int from = start; from < end; from += T, stage ^= 1) {
      copy_wait<0>();
      __syncthreads();  // the tile is there, and the one before has been used up
      if (from + T < end) fetch(stage ^ 1, from + T, end);
      score(stage, from, end);
      __syncthreads();
      weigh();
      __syncthreads();
      add_values(stage);
    }
    __syncthreads();
    write();
  }
  // The groups' sums in order, then out; memory of the tiles is free now.
  __device__ void write() {
#pragma unroll
    for (int r = 0; r < R; r++) tiles[r * threads + thread] = sums[r];
    for (int i = 0; i < ceil_div(R, 4); i++) {
      const int r = thread / 32 + 4 * i;
      if (r >= rows || thread % 32 > 0) continue;
      shrink[r] = p.finish(split, group.head_of(p, r), maximum[i], sum[i], true);
    }
    __syncthreads();
    float* out = p.results(split);
    for (int i = thread; i < rows * value_size; i += threads) {
      const int r = i / value_size, unit = i % value_size;
      float4 v = make_float4(0, 0, 0, 0);
      for (int g = 0; g < value_groups(); g++) {
        const float4 s = tiles[r * threads + g * value_size + unit];
        v.x += s.x, v.y += s.y, v.z += s.z, v.w += s.w;
      }
      const float scale = shrink[r];
      reinterpret_cast<float4*>(out + group.head_of(p, r) * p.a.value_dim)[unit] =
          make_float4(v.x * scale, v.y * scale, v.z * scale, v.w * scale);
    }
  }
};

template <int R, int T> __global__ __launch_bounds__(threads) void attend_few_kernel(Attend p) {
  wait_for_earlier();
  Block<R, T> block(p, blockIdx.x / p.a.kv_heads, blockIdx.x % p.a.kv_heads, blockIdx.y);
  block.run();
}

template <int R, int T> void run(Context& c, const Attend& p) {
  const Grid grid{dim3(unsigned(p.a.batch.sequences * p.a.kv_heads), unsigned(p.part.splits)), dim3(threads),
                  shared_floats<R, T>(p.a.head_dim, p.a.value_dim) * sizeof(float)};
  launch<attend_few_kernel<R, T>>(c, grid, p);
}
template <int R> void run(Context& c, const Attend& p) {
  p.a.head_dim <= 128 && p.a.value_dim <= 128 ? run<R, 32>(c, p) : run<R, 16>(c, p);
}

}  // namespace

void attend_few(Context& c, Attend p) {
  const Attention& a = p.a;
  const int64_t rows = a.batch.longest * p.heads_per_kv, span = attention_span(a, a.batch.longest);
  // Three blocks a multiprocessor have about 100 KB under way.
  p.part = split_for_decoding(c, a, 3 * c.multiprocessors, span, 32);
  rows <= 1 ? run<1>(c, p) : rows <= 2 ? run<2>(c, p) : rows <= 4 ? run<4>(c, p) : run<8>(c, p);
  merge_splits(c, p);
}

}  // namespace eac::cuda
