// Attention in blocks of keys, with the running maximum and sum of an online softmax.
//
// LAYOUT      Keys and values of kv_block tokens lie together, head by head, as the matrix tiles of kernels/cpu/gemm.inl read them:
//               keys    [block][head][panel of 32 tokens][channel][token]
//               values  [block][head][token][channel]
// METHOD      A span is some query rows of one kv head: all its query heads of a few consecutive tokens. Key block by key block:
//             scores, softmax_block, the running result times `shrink`, plus P V. Every `chunk` of keys the running result starts anew
//             and is merged into the total, so that few spans with many keys can be spread over threads by chunks.
// REGULARITY  Blocks and chunks lie at fixed positions, sums run over rising channels and keys, and what a row may not see is an exact
//             zero. So a token's result is the same bit for bit alone or among others, on any number of threads.
// Sources     Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018); FlashAttention-2 (Dao, 2023); the split by
//             chunks: Flash-Decoding (Dao et al., 2023).
#include "kernels/nn/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/thread_pool.h"
#include "kernels/cpu/isa.h"
#include "kernels/matmul/scratch.h"

namespace eac {
namespace {

constexpr int64_t key_panel = 32;
constexpr int64_t chunk = 4 * kv_block;
constexpr int64_t row_tiles = 8;  // register tiles of query rows in a span: what a block of keys is read for once

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Keys and values of one sequence in blocks.
struct Context {
  float *keys, *values;
};

struct Span {
  const Sequence* sequence;
  Context context;
  int64_t kv_head, token, count;  // query tokens [token, token + count) of the sequence
};

// What a row's softmax has come to: result = acc / sum after scores up to max.
struct State {
  float *max, *sum, *acc;  // (rows), (rows), (rows, value_dim)

  static int64_t floats(int64_t rows, int64_t value_dim) { return rows * (value_dim + 2); }
  State(float* memory, int64_t rows) : max(memory), sum(memory + rows), acc(memory + 2 * rows) {}
  void clear(int64_t rows, int64_t value_dim) const {
    std::fill_n(max, rows, -std::numeric_limits<float>::infinity());
    std::fill_n(sum, rows * (value_dim + 1), 0.0f);
  }
};

struct Kernel {
  const Attention& a;
  const float* q;
  float* out;
  const Isa& kern = isa();
  int64_t group = a.heads / a.kv_heads, key_width = a.kv_heads * a.head_dim, value_width = a.kv_heads * a.value_channels();

  int64_t tokens_per_span() const { return std::max<int64_t>(1, row_tiles * kern.gemm_f32.mr / group); }
  int64_t rows(const Span& s) const { return s.count * group; }
  // Floats of the panels of n query rows: every panel may be as high as the tallest.
  int64_t panel_floats(int64_t n) const { return ceil_div(n, kern.gemm_f32.mr) * kern.gemm_f32.mr * a.head_dim; }
  // Row r of a span: a query head of one of its tokens, which sees the positions [first, end).
  int64_t end(const Span& s, int64_t r) const { return s.sequence->position + s.token + r / group + 1; }
  int64_t first(const Span& s, int64_t r) const { return a.window > 0 ? std::max<int64_t>(0, end(s, r) - a.window) : 0; }
  // Counted in heads: where a row's query and result lie.
  int64_t row(const Span& s, int64_t r) const {
    return (s.sequence->begin + s.token + r / group) * a.heads + s.kv_head * group + r % group;
  }
  int64_t first_chunk(const Span& s) const { return first(s, 0) / chunk; }
  int64_t chunks(const Span& s) const { return ceil_div(end(s, rows(s) - 1), chunk) - first_chunk(s); }
  int64_t tile_rows(const Span& s, int64_t r) const { return std::min<int64_t>(kern.gemm_f32.mr, rows(s) - r); }

  // The span's queries times `scale`, as panels of A; a panel of `tile_rows` rows r starts at r * head_dim.
  void pack_queries(const Span& s, float* panels) const {
    thread_local Scratch scratch;
    float* scaled = scratch.get<float>(kern.gemm_f32.mr * a.head_dim);
    for (int64_t r = 0; r < rows(s); r += kern.gemm_f32.mr) {
      const int64_t n = tile_rows(s, r);
      for (int64_t i = 0; i < n; i++)
        for (int64_t d = 0; d < a.head_dim; d++) scaled[i * a.head_dim + d] = q[row(s, r + i) * a.head_dim + d] * a.scale;
      kern.gemm_f32.pack({scaled, DType::f32, a.head_dim, 1}, kern.gemm_f32.height(n), n, a.head_dim, nullptr,
                         panels + r * a.head_dim);
    }
  }

  // Rows [r, r + n) of a span against the block of keys from position b on. scores: (mr, kv_block), weights: (kv_block, mr).
  void attend_tile(const Span& s, int64_t r, int64_t n, const float* queries, int64_t b, const State& state, float* scores,
                   float* weights) const {
    const auto& gemm = kern.gemm_f32;
    const int64_t d = a.head_dim, dv = a.value_channels(), from = std::max<int64_t>(0, first(s, r) - b),
                  to = std::min(kv_block, end(s, r + n - 1) - b);
    if (from >= to) return;
    const float *keys = s.context.keys + b * key_width + s.kv_head * d * kv_block, *next_keys = keys + key_width * kv_block,
                *values = s.context.values + b * value_width + s.kv_head * dv * kv_block;
    for (int64_t j = from / key_panel * key_panel; j < to; j += key_panel)
      for (int64_t c = 0; c < key_panel; c += gemm.nr)
        gemm.tile(d, 1, queries + r * d, keys + j * d + c, key_panel, values + (j + c) * dv, false, scores + j + c, kv_block, n,
                  std::min<int64_t>(gemm.nr, key_panel - c));
    for (int64_t i = 0; i < n; i++) {
      float shrink;
      const float sum = kern.softmax_block(scores + i * kv_block, kv_block, first(s, r + i) - b, std::min(to, end(s, r + i) - b),
                                           &state.max[r + i], &shrink);
      if (shrink != 1) kern.scale_f32(shrink, state.acc + (r + i) * dv, dv);
      state.sum[r + i] = state.sum[r + i] * shrink + sum;
    }
    gemm.pack({scores + from, DType::f32, kv_block, 1}, gemm.height(n), n, to - from, nullptr, weights);
    for (int64_t c = 0; c < dv; c += gemm.nr)
      gemm.tile(to - from, 1, weights, values + from * dv + c, dv, next_keys + c * kv_block, true, state.acc + r * dv + c, dv, n,
                std::min<int64_t>(gemm.nr, dv - c));
  }

  // The span's rows against one chunk of keys, from nothing.
  void attend_chunk(const Span& s, const float* queries, int64_t c, const State& state) const {
    thread_local Scratch scratch;
    const int64_t mr = kern.gemm_f32.mr, last = std::min((c + 1) * chunk, end(s, rows(s) - 1));
    float *scores = scratch.get<float>(2 * mr * kv_block), *weights = scores + mr * kv_block;
    state.clear(rows(s), a.value_channels());
    for (int64_t b = std::max(c * chunk, first(s, 0) / kv_block * kv_block); b < last; b += kv_block)
      for (int64_t r = 0; r < rows(s); r += mr) attend_tile(s, r, tile_rows(s, r), queries, b, state, scores, weights);
  }

  void merge(const State& total, const State& part, int64_t rows) const {
    for (int64_t r = 0; r < rows; r++) {
      const float max = std::max(total.max[r], part.max[r]), shift = std::isinf(max) ? 0.0f : max;
      const float keep = total.max[r] == max ? 1.0f : std::exp(total.max[r] - shift),
                  add = part.max[r] == max ? 1.0f : std::exp(part.max[r] - shift);
      total.max[r] = max;
      total.sum[r] = total.sum[r] * keep + part.sum[r] * add;
      kern.blend_f32(keep, total.acc + r * a.value_channels(), add, part.acc + r * a.value_channels(), a.value_channels());
    }
  }

  void finish(const Span& s, const State& total) const {
    for (int64_t r = 0; r < rows(s); r++) {
      const float* acc = total.acc + r * a.value_channels();
      float scale = 1 / total.sum[r];
      if (!a.sinks.empty()) {  // the sink takes its share of the weight and gives no value
        const float sink = a.sinks[size_t(s.kv_head * group + r % group)], max = std::max(total.max[r], sink);
        const float keep = std::exp(total.max[r] - max);
        scale = keep / (total.sum[r] * keep + std::exp(sink - max));
      }
      float* o = out + row(s, r) * a.value_channels();
      for (int64_t d = 0; d < a.value_channels(); d++) o[d] = acc[d] * scale;
    }
  }

  void attend(const Span& s) const {
    thread_local Scratch scratch;
    const int64_t n = rows(s), floats = State::floats(n, a.value_channels());
    float* memory = scratch.get<float>(2 * floats + panel_floats(n));
    float* queries = memory + 2 * floats;
    pack_queries(s, queries);
    const State total(memory, n), part(memory + floats, n);
    total.clear(n, a.value_channels());
    for (int64_t c = 0; c < chunks(s); c++) {
      attend_chunk(s, queries, first_chunk(s) + c, part);
      merge(total, part, n);
    }
    finish(s, total);
  }

  // The same, chunk by chunk on all threads.
  void attend_split(const std::vector<Span>& spans) const {
    thread_local Scratch scratch;
    thread_local std::vector<int64_t> offsets;  // in pieces: span i has the pieces offsets[i] .. offsets[i + 1]
    offsets.assign(1, 0);
    int64_t most = 0;
    for (const Span& s : spans) {
      offsets.push_back(offsets.back() + chunks(s));
      most = std::max(most, rows(s));
    }
    const int64_t floats = State::floats(most, a.value_channels()), *begin = offsets.data();
    float* memory = scratch.get<float>((offsets.back() + int64_t(spans.size())) * floats);
    parallel_for(offsets.back(), [&](int64_t piece) {
      thread_local Scratch own;
      const size_t i = size_t(std::upper_bound(begin, begin + spans.size() + 1, piece) - begin - 1);
      float* queries = own.get<float>(panel_floats(most));
      pack_queries(spans[i], queries);
      attend_chunk(spans[i], queries, first_chunk(spans[i]) + piece - begin[i], State(memory + piece * floats, rows(spans[i])));
    });
    parallel_for(int64_t(spans.size()), [&](int64_t i) {
      const Span& s = spans[size_t(i)];
      const State total(memory + (begin[spans.size()] + i) * floats, rows(s));
      total.clear(rows(s), a.value_channels());
      for (int64_t piece = begin[i]; piece < begin[i + 1]; piece++)
        merge(total, State(memory + piece * floats, rows(s)), rows(s));
      finish(s, total);
    });
  }

  // Tokens [t, t + n) of a sequence, all in one panel of keys, copied into its context.
  void append(const Sequence& s, const Context& context, const float* k, const float* v, int64_t t, int64_t n) const {
    const int64_t d = a.head_dim, dv = a.value_channels(), position = s.position + t, in_block = position % kv_block;
    for (int64_t h = 0; h < a.kv_heads; h++) {
      const float *key = k + (s.begin + t) * key_width + h * d, *value = v + (s.begin + t) * value_width + h * dv;
      float* keys = context.keys + (position - in_block) * key_width + h * d * kv_block + in_block / key_panel * key_panel * d +
                    in_block % key_panel;
      float* values = context.values + (position - in_block) * value_width + h * dv * kv_block + in_block * dv;
      if (n == key_panel)
        kern.gemm_f32.pack({key, DType::f32, key_width, 1}, key_panel, n, d, nullptr, keys);
      else
        for (int64_t i = 0; i < n; i++)
          for (int64_t c = 0; c < d; c++) keys[c * key_panel + i] = key[i * key_width + c];
      for (int64_t i = 0; i < n; i++) std::copy_n(value + i * value_width, dv, values + i * dv);
    }
  }
};

}  // namespace

void attention(const float* q, const float* k, const float* v, const std::vector<Sequence>& sequences, const Attention& a,
               float* out) {
  const Kernel kernel{a, q, out};
  struct Piece {
    const Sequence* sequence;
    Context context;
    int64_t token, count;
  };
  thread_local Scratch own_context;
  thread_local std::vector<Span> spans;
  thread_local std::vector<Piece> pieces;
  spans.clear();
  pieces.clear();
  int64_t blocks = 0;  // of the sequences without a cache
  for (const Sequence& s : sequences) blocks += s.cache ? 0 : ceil_div(s.length, kv_block);
  const int64_t own_tokens = blocks * kv_block + key_panel;
  float* own_keys = own_context.get<float>(own_tokens * (kernel.key_width + kernel.value_width));
  float* own_values = own_keys + own_tokens * kernel.key_width;
  int64_t most_chunks = 1;
  for (const Sequence& s : sequences) {
    Context context{own_keys, own_values};
    if (s.cache)
      context = {s.cache->keys(size_t(a.layer)), s.cache->values(size_t(a.layer))};
    else {
      const int64_t tokens = ceil_div(s.length, kv_block) * kv_block;
      own_keys += tokens * kernel.key_width, own_values += tokens * kernel.value_width;
    }
    for (int64_t t = 0; t < s.length;) {
      const int64_t count = std::min(s.length - t, key_panel - (s.position + t) % key_panel);
      pieces.push_back({&s, context, t, count});
      t += count;
    }
    const int64_t step = kernel.tokens_per_span();
    for (int64_t h = 0; h < a.kv_heads; h++)
      for (int64_t t = 0; t < s.length; t += step) {
        spans.push_back({&s, context, h, t, std::min(step, s.length - t)});
        most_chunks = std::max(most_chunks, kernel.chunks(spans.back()));
      }
  }
  const Piece* piece = pieces.data();
  parallel_for(int64_t(pieces.size()), [&, k, v](int64_t i) {
    kernel.append(*piece[i].sequence, piece[i].context, k, v, piece[i].token, piece[i].count);
  });
  if (most_chunks > 1 && int64_t(spans.size()) < 2 * thread_count()) return kernel.attend_split(spans);
  const Span* span = spans.data();
  parallel_for(int64_t(spans.size()), [&](int64_t i) { kernel.attend(span[i]); });
}

}  // namespace eac
