// What the kernels of attention share. A group is the rows of one kv head in one sequence: row r is query head r % heads_per_kv of the
// sequence's token r / heads_per_kv. Where a group's keys are split over blocks, each leaves a partial result, and merge() puts them together
// in the order of the keys. Exponents are to the base 2: the queries are scaled by log2(e).
#pragma once
#include <algorithm>

#include "kernels/cuda/context.cuh"

namespace eac::cuda {

struct Partials {
  int splits, chunk;  // split i takes `chunk` keys from the (i * chunk)-th on that its block's rows see
  float *max, *sum;   // (splits, rows, heads)
  float* values;      // (splits, rows, heads, value_dim), not yet divided by the sum
};

// exp2(v - max), where a maximum over nothing is minus infinity.
__device__ __forceinline__ float exp2_below(float v, float max) { return exp2f(v - (max == -INFINITY ? 0.f : max)); }
inline constexpr float log2_e = 1.44269504f;

// 1 / the softmax's denominator. A sink takes its share of the weight and gives no value.
__device__ __forceinline__ float attention_scale(const Attention& a, int64_t head, float max, float sum) {
  if (!a.sinks) return 1 / sum;
  const float sink = a.sinks[head] * log2_e, top = fmaxf(max, sink), keep = exp2f(max - top);
  return keep / (sum * keep + exp2f(sink - top));
}

struct Attend {
  Attention a;
  int heads_per_kv, window;
  Partials part;  // splits 1: written to a.out instead

  // Where the results of a split go, (rows, heads, value_dim).
  __device__ float* results(int split) const {
    return part.splits > 1 ? part.values + split * a.batch.rows * a.heads * a.value_dim : a.out;
  }
  // What a head's sums are multiplied by there. Of a partial result `keeper`, one lane a head, leaves the maximum and the sum.
  __device__ float finish(int split, int64_t head, float max, float sum, bool keeper) const {
    if (part.splits == 1) return attention_scale(a, head % a.heads, max, sum);
    const int64_t at = split * a.batch.rows * a.heads + head;
    if (keeper) part.max[at] = max, part.sum[at] = sum;
    return 1;
  }
};

// The sequence and kv head of a block.
struct Group {
  const float *keys, *values;  // of the kv head; token t of the context at t * stride
  int64_t key_stride, value_stride, kv_head;
  int64_t begin;                 // row of the batch
  int tokens, position, origin;  // rows; position of the first row and of the first key

  __device__ Group(const Attend& p, int64_t sequence, int64_t kv_head) : kv_head(kv_head) {
    const Attention& a = p.a;
    begin = a.batch.begin[sequence], tokens = a.batch.length[sequence], position = a.batch.position[begin];
    key_stride = a.kv_heads * a.head_dim, value_stride = a.kv_heads * a.value_dim;
    const float* cached = a.keys ? a.keys[sequence] : nullptr;
    origin = cached ? 0 : position;
    keys = (cached ? cached : a.k + begin * key_stride) + kv_head * a.head_dim;
    values = (cached ? a.values[sequence] : a.v + begin * value_stride) + kv_head * a.value_dim;
  }
  // Counted in heads: where a row's query and result lie.
  __device__ int64_t head_of(const Attend& p, int r) const {
    return (begin + r / p.heads_per_kv) * p.a.heads + kv_head * p.heads_per_kv + r % p.heads_per_kv;
  }
  // Token t of the sequence sees the positions [first, end).
  __device__ int end(int t) const { return position + t + 1; }
  __device__ int first(int t, int window) const { return window > 0 ? max(origin, end(t) - window) : origin; }
  __device__ const float* key(int p) const { return keys + (p - origin) * key_stride; }
  __device__ const float* value(int p) const { return values + (p - origin) * value_stride; }
};

// The most keys that the rows of `tokens` tokens see.
inline int64_t attention_span(const Attention& a, int64_t tokens) {
  return a.window > 0 && a.window < a.batch.deepest ? std::min(a.batch.deepest, a.window + tokens - 1) : a.batch.deepest;
}
// Room for the partial results, for about `blocks` blocks where there are `groups` of them without splitting; `span`: the most keys that the rows
// of a block see; `step`: what a chunk is a multiple of; `least`: keys that are worth a block.
Partials split_keys(Context& c, const Attention& a, int64_t groups, int64_t blocks, int64_t span, int64_t step, int64_t least);
// The same where a block takes a whole group and `blocks` of them run at a time: all at once if that is enough, else in several rounds, so that the
// last one is short.
Partials split_for_decoding(Context& c, const Attention& a, int64_t blocks, int64_t span, int64_t step);

// The partial results in order, if there are any.
void merge_splits(Context& c, const Attend& p);

void attend_few(Context& c, Attend p);    // attention_decode.cu: up to 8 rows a group, heads up to 256 wide
void attend_rows(Context& c, Attend p);   // attention_rows.cu: up to 16 rows a group, keys up to 640 wide, values up to 512
void attend_tiles(Context& c, Attend p);  // attention_tiles.cu

}  // namespace eac::cuda
