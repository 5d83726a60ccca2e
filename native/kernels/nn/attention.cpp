#include "kernels/nn/attention.h"

#include <cmath>

#include "core/thread_pool.h"
#include "kernels/cpu/isa.h"
#include "kernels/matmul/gemm.h"

namespace eac {

void rope(float* x, int64_t width, const std::vector<Sequence>& sequences, const Rope& r) {
  const int64_t heads = width / r.head_dim;
  for (const Sequence& s : sequences) {
    const bool use_long = r.long_from > 0 && s.position + s.length > r.long_from;
    const std::vector<float>& frequencies = use_long ? r.long_frequencies : r.frequencies;
    const float scale = use_long ? r.long_scale : r.scale;
    const int64_t half = int64_t(frequencies.size());
    const int64_t step = r.interleaved ? 2 : 1, other = r.interleaved ? 1 : half;
    parallel_for(s.length, [&](int64_t t) {
      float* row = x + (s.begin + t) * width;
      for (int64_t i = 0; i < half; i++) {
        const float angle = float(s.position + t) * frequencies[size_t(i)];
        const float c = std::cos(angle) * scale, sn = std::sin(angle) * scale;
        for (int64_t h = 0; h < heads; h++) {
          float* a = row + h * r.head_dim + i * step;
          const float lo = a[0], hi = a[other];
          a[0] = lo * c - hi * sn;
          a[other] = lo * sn + hi * c;
        }
      }
    });
  }
}

namespace {

struct Context {
  const float *keys, *values;  // (tokens × kv_heads*head_dim), from position 0
};

// Query rows [begin, begin + count) of a sequence for all heads that share one kv head.
void attend_block(const float* q, const Sequence& s, const Context& ctx, const Attention& a, int64_t kv_head, int64_t begin,
                  int64_t count, float* out) {
  const int64_t group = a.heads / a.kv_heads, rows = count * group, width = a.heads * a.head_dim,
                kv_width = a.kv_heads * a.head_dim;
  const int64_t first_position = s.position + begin, visible = first_position + count;
  const int64_t from = a.window > 0 ? std::max<int64_t>(0, first_position - a.window + 1) : 0;
  const int64_t span = visible - from;

  static thread_local std::vector<float> queries, scores, result;
  queries.resize(size_t(rows * a.head_dim));
  scores.resize(size_t(rows * span));
  result.resize(size_t(rows * a.head_dim));
  for (int64_t i = 0; i < count; i++)
    for (int64_t g = 0; g < group; g++) {
      const float* src = q + (s.begin + begin + i) * width + (kv_head * group + g) * a.head_dim;
      for (int64_t d = 0; d < a.head_dim; d++) queries[size_t((i * group + g) * a.head_dim + d)] = src[d] * a.scale;
    }

  const float* keys = ctx.keys + from * kv_width + kv_head * a.head_dim;
  const float* values = ctx.values + from * kv_width + kv_head * a.head_dim;
  gemm_f32_serial(rows, span, a.head_dim, 1, {queries.data(), DType::f32, a.head_dim, 1}, {keys, DType::f32, 1, kv_width}, 0,
                  scores.data(), span);
  for (int64_t i = 0; i < count; i++) {
    const int64_t end = first_position + i + 1 - from;
    const int64_t start = a.window > 0 ? std::max<int64_t>(0, end - a.window) : 0;
    for (int64_t g = 0; g < group; g++) {
      float* row = scores.data() + (i * group + g) * span;
      std::fill(row, row + start, 0.f);
      isa().softmax_row(row + start, end - start);
      std::fill(row + end, row + span, 0.f);
    }
  }
  gemm_f32_serial(rows, a.head_dim, span, 1, {scores.data(), DType::f32, span, 1}, {values, DType::f32, kv_width, 1}, 0,
                  result.data(), a.head_dim);
  for (int64_t i = 0; i < count; i++)
    for (int64_t g = 0; g < group; g++)
      std::memcpy(out + (s.begin + begin + i) * width + (kv_head * group + g) * a.head_dim,
                  result.data() + (i * group + g) * a.head_dim, size_t(a.head_dim) * sizeof(float));
}

}  // namespace

void attention(const float* q, const float* k, const float* v, const std::vector<Sequence>& sequences, const Attention& a,
               float* out) {
  const int64_t kv_width = a.kv_heads * a.head_dim;
  struct Task {
    const Sequence* sequence;
    Context context;
    int64_t kv_head, begin, count;
  };
  static thread_local std::vector<Task> tasks;
  tasks.clear();
  const int64_t block = std::max<int64_t>(1, 64 / (a.heads / a.kv_heads));
  for (const Sequence& s : sequences) {
    Context ctx{k + s.begin * kv_width, v + s.begin * kv_width};
    if (s.cache) {
      float *keys = s.cache->keys(size_t(a.layer)), *values = s.cache->values(size_t(a.layer));
      const size_t bytes = size_t(s.length * kv_width) * sizeof(float);
      std::memcpy(keys + s.position * kv_width, k + s.begin * kv_width, bytes);
      std::memcpy(values + s.position * kv_width, v + s.begin * kv_width, bytes);
      ctx = {keys, values};
    }
    for (int64_t h = 0; h < a.kv_heads; h++)
      for (int64_t b = 0; b < s.length; b += block) tasks.push_back({&s, ctx, h, b, std::min(block, s.length - b)});
  }
  const Task* list = tasks.data();
  parallel_for(int64_t(tasks.size()), [&](int64_t i) {
    const Task& t = list[i];
    attend_block(q, *t.sequence, t.context, a, t.kv_head, t.begin, t.count, out);
  });
}

}  // namespace eac
