#include <algorithm>
#include <limits>
#include <memory>

#include "cuda/timing.h"
#include "kernels/nn/attention.h"

namespace eac::cuda::check {
namespace {

struct Case {
  std::string name;
  int64_t heads, kv_heads, head_dim, value_dim;
  std::vector<int32_t> lengths, starts;
  int64_t window = 0;
  bool cached = true, sinks = false;
  float scale = 0;          // 0: 1 / sqrt(head_dim)
  bool last_alone = false;  // the last sequence has no cache
};

// The caches of a batch on the device, with some room that must stay as it is.
struct Caches {
  static constexpr int64_t room = 3;
  std::vector<Buffer<float>> keys, values;
  std::vector<float*> key_list, value_list;

  void add(const std::vector<float>& k, const std::vector<float>& v, int64_t more, int64_t key_width, int64_t value_width) {
    const float poison = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> all_keys = k, all_values = v;
    all_keys.resize(k.size() + size_t((more + room) * key_width), poison);
    all_values.resize(v.size() + size_t((more + room) * value_width), poison);
    keys.emplace_back(all_keys), values.emplace_back(all_values);
    key_list.push_back(keys.back()), value_list.push_back(values.back());
  }
};

// What the cache of a sequence must hold: what it held, the rows of the batch, and nothing behind them.
bool appended(const Buffer<float>& cache, const std::vector<float>& before, const float* rows, int64_t count) {
  const std::vector<float> got = cache.read();
  bool ok = std::equal(before.begin(), before.end(), got.begin());
  ok = ok && std::equal(rows, rows + count, got.begin() + long(before.size()));
  for (size_t i = before.size() + size_t(count); i < got.size(); i++) ok = ok && std::isnan(got[i]);
  return ok;
}

void check_case(const Case& c) {
  const Sequences s(c.lengths, c.starts);
  const int64_t rows = s.batch.rows, key_width = c.kv_heads * c.head_dim, value_width = c.kv_heads * c.value_dim;
  const std::vector<float> q = normal(size_t(rows * c.heads * c.head_dim), 1), k = normal(size_t(rows * key_width), 2),
                           v = normal(size_t(rows * value_width), 3),
                           sinks = c.sinks ? normal(size_t(c.heads), 4) : std::vector<float>{};
  const eac::Attention a{.heads = c.heads,
                         .kv_heads = c.kv_heads,
                         .head_dim = c.head_dim,
                         .window = c.window,
                         .scale = c.scale > 0 ? c.scale : 1 / std::sqrt(float(c.head_dim)),
                         .sinks = sinks,
                         .value_dim = c.value_dim};
  std::vector<Sequence> sequences;
  std::vector<std::vector<float>> old_keys, old_values;
  Caches caches;
  for (size_t i = 0; i < c.lengths.size(); i++) {
    Sequence sequence{s.begin[i], c.lengths[i], c.starts[i], nullptr};
    if (c.cached && c.last_alone && i + 1 == c.lengths.size()) {
      caches.key_list.push_back(nullptr), caches.value_list.push_back(nullptr);
    } else if (c.cached) {
      const int64_t before = c.starts[i];
      old_keys.push_back(normal(size_t(before * key_width), unsigned(10 + i)));
      old_values.push_back(normal(size_t(before * value_width), unsigned(50 + i)));
      sequence.cache = std::make_shared<KvCache>(std::vector<KvCache::Widths>{{key_width, value_width}});
      sequence.cache->reserve(before + c.lengths[i]);
      if (before > 0) {
        const std::vector<float> none(size_t(before * c.heads * c.head_dim), 0.f);
        std::vector<float> unused(size_t(before * c.heads * c.value_dim));
        eac::attention(none.data(), old_keys[i].data(), old_values[i].data(), {{0, before, 0, sequence.cache}}, a, unused.data());
      }
      caches.add(old_keys[i], old_values[i], c.lengths[i], key_width, value_width);
    }
    sequences.push_back(sequence);
  }
  const Buffer<float> on_q(q), on_k(k), on_v(v), out(size_t(rows * c.heads * c.value_dim)), on_sinks(sinks);
  const Buffer<float*> keys(caches.key_list), values(caches.value_list);
  const Attention attention{on_q,
                            on_k,
                            on_v,
                            out,
                            s.batch,
                            c.cached ? keys.data() : nullptr,
                            c.cached ? values.data() : nullptr,
                            c.heads,
                            c.kv_heads,
                            c.head_dim,
                            c.value_dim,
                            c.window,
                            a.scale,
                            c.sinks ? on_sinks.data() : nullptr};
  device()(device().table.attention(device().context, &attention));
  std::vector<float> want(out.size());
  eac::attention(q.data(), k.data(), v.data(), sequences, a, want.data());
  const std::string name = "attention, " + c.name + ", heads " + std::to_string(c.heads) + "/" + std::to_string(c.kv_heads) +
                           " of " + std::to_string(c.head_dim) + "/" + std::to_string(c.value_dim);
  const std::vector<float> first = out.read();
  // The tensor cores multiply split bf16.
  const bool few = s.batch.longest * c.heads / c.kv_heads <= 8 && c.head_dim <= 256 && c.value_dim <= 256;
  close(name, first, {want.begin(), want.end()}, few ? 2e-6 : c.scale > 0 ? 5e-5 : 2e-5);
  device()(device().table.attention(device().context, &attention));
  equal(name + ": again", out.read(), first);
  bool ok = true;
  for (size_t i = 0; i < caches.keys.size(); i++) {
    ok = ok && appended(caches.keys[i], old_keys[i], k.data() + s.begin[i] * key_width, c.lengths[i] * key_width);
    ok = ok && appended(caches.values[i], old_values[i], v.data() + s.begin[i] * value_width, c.lengths[i] * value_width);
  }
  if (c.cached) report(name + ": cache", ok, ok ? "appended" : "holds something else");
}

void check_attention() {
  // Few rows: decoding.
  check_case({"decode", 8, 2, 128, 128, {1, 1, 1}, {0, 70, 300}});
  check_case({"decode", 5, 5, 64, 64, {1, 1}, {33, 129}});
  check_case({"decode, window, sinks", 4, 2, 64, 64, {1, 1, 1}, {0, 500, 31}, 40, true, true});
  check_case({"decode, few rows", 4, 2, 40, 24, {2, 1, 4}, {90, 64, 0}, 0, true, true});
  check_case({"decode, large scores", 2, 1, 80, 80, {1, 3}, {200, 7}, 0, true, false, 1.5f});
  check_case({"decode", 2, 2, 256, 192, {1}, {450}});
  check_case({"decode, window, split", 2, 1, 64, 128, {2}, {700}, 300, true, true});
  check_case({"decode, few rows, window", 1, 1, 8, 8, {7, 8}, {60, 3}, 5});
  check_case({"own rows, few", 4, 1, 16, 16, {2, 1, 2}, {0, 0, 0}, 0, false});
  check_case({"decode, several rounds", 12, 12, 8, 8, std::vector<int32_t>(2, 1), {1100, 600}});
  check_case({"decode, one sequence without a cache", 4, 2, 16, 16, {1, 2}, {40, 0}, 0, true, false, 0, true});
  // Up to 16 rows.
  check_case({"decode", 16, 1, 128, 128, {1, 1}, {90, 0}});
  check_case({"decode, 10 rows, split", 10, 1, 64, 104, {1}, {600}, 0, true, true, 0.5f});
  check_case({"decode, window, split", 24, 2, 40, 40, {1, 1}, {500, 130}, 200, true, true});
  check_case({"few rows, window", 5, 1, 80, 64, {3, 1, 2}, {70, 64, 0}, 20});
  check_case({"own rows, 15", 3, 1, 64, 16, {5, 2}, {0, 0}, 0, false, true});
  check_case({"latent decode", 16, 1, 576, 512, {1, 1}, {100, 3}});
  check_case({"latent decode, few heads", 2, 1, 576, 512, {1, 3}, {200, 3}});
  // Tiles.
  check_case({"prefill, one sequence without a cache", 4, 2, 16, 16, {3, 70}, {40, 0}, 0, true, false, 0, true});
  check_case({"prefill", 4, 2, 128, 128, {70, 3}, {0, 0}});
  check_case({"prefill after a cache", 2, 1, 64, 64, {65, 1, 20}, {40, 90, 0}});
  check_case({"prefill, window, sinks", 2, 2, 40, 48, {150, 1}, {30, 200}, 17, true, true});
  check_case({"own rows", 2, 1, 192, 128, {67}, {0}, 0, false});
  check_case({"own rows, window", 3, 3, 72, 8, {100, 9}, {0, 0}, 70, false, true});
  check_case({"many heads a kv head, split", 24, 1, 64, 200, {1}, {700}, 0, true, true, 0.5f});
  check_case({"latent", 20, 1, 576, 512, {1, 1}, {100, 3}});
  check_case({"values wider than the keys", 2, 1, 16, 320, {12}, {5}});
  if (device().emulated()) return;
  check_case({"long prefill", 32, 8, 128, 128, {1500, 700, 1}, {0, 1000, 3000}});
  check_case({"long decode", 32, 8, 128, 128, {1, 1, 1, 1}, {9000, 4095, 4096, 20}});
  check_case({"latent prefill", 16, 1, 576, 512, {300}, {500}});
  check_case({"latent decode, long", 128, 1, 576, 512, {1}, {5000}});
}

void time_case(const std::string& name, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t value_dim, int32_t tokens,
               int32_t before, int sequences) {
  const bool decode = tokens == 1;
  tokens = int32_t(scaled(tokens)), before = int32_t(scaled(before));
  const std::vector<int32_t> lengths(size_t(sequences), tokens), starts(size_t(sequences), before);
  const Sequences s(lengths, starts);
  const auto random = [](int64_t n) { return repeated_normal(n, 1); };
  const int64_t rows = s.batch.rows;
  const Buffer<float> q(random(rows * heads * head_dim)), k(random(rows * kv_heads * head_dim)),
      v(random(rows * kv_heads * value_dim)), out(size_t(rows * heads * value_dim));
  const double bytes = 4.0 * double(sequences) * (before + 1) * double(kv_heads * (head_dim + value_dim));
  const int64_t operands = decode ? operands_of(bytes) : 1;
  std::vector<Caches> caches(static_cast<size_t>(operands));
  std::vector<Buffer<float*>> keys, values;
  for (Caches& c : caches) {
    for (int i = 0; i < sequences; i++)
      c.add(random(before * kv_heads * head_dim), random(before * kv_heads * value_dim), tokens, kv_heads * head_dim,
            kv_heads * value_dim);
    keys.emplace_back(c.key_list), values.emplace_back(c.value_list);
  }
  const auto call = [&](int64_t i) {
    const Attention a{q,        k,        v,         out, s.batch, keys[size_t(i)], values[size_t(i)], heads,
                      kv_heads, head_dim, value_dim, 0,   0.1f,    nullptr};
    device()(device().table.attention(device().context, &a));
  };
  if (decode) {
    timed_recorded("attention, " + name, {.bytes = bytes}, operands, call);
    return;
  }
  const double seen = double(tokens) * (before + 0.5 * (tokens + 1)) * double(heads) * sequences;
  // Of bf16: three for one of f32.
  timed("attention, " + name, {.operations = 6 * seen * double(head_dim + value_dim)}, [&] { call(0); });
}

void time_attention() {
  time_case("decode at 4096, Mixtral", 32, 8, 128, 128, 1, 4095, 1);
  time_case("decode at 32768, Mixtral", 32, 8, 128, 128, 1, 32767, 1);
  time_case("decode at 4096, Mixtral, 16 sequences", 32, 8, 128, 128, 1, 4095, 16);
  time_case("decode at 4096, Qwen1.5-MoE", 16, 16, 128, 128, 1, 4095, 1);
  time_case("decode at 4096, DeepSeek-V2-Lite", 16, 1, 576, 512, 1, 4095, 1);
  time_case("decode at 4096, DeepSeek-V3", 128, 1, 576, 512, 1, 4095, 1);
  time_case("prefill 512, Mixtral", 32, 8, 128, 128, 512, 0, 1);
  time_case("prefill 4096, Mixtral", 32, 8, 128, 128, 4096, 0, 1);
  time_case("prefill 4096, Qwen1.5-MoE", 16, 16, 128, 128, 4096, 0, 1);
  time_case("prefill 2048, DeepSeek-V2-Lite", 16, 1, 576, 512, 2048, 0, 1);
}

const Group group("attention", check_attention, time_attention);

}  // namespace
}  // namespace eac::cuda::check
