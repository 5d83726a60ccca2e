// Norms, rotary embedding, attention, sampling and losses against plain loops in f64.
#include <algorithm>
#include <cstring>
#include <limits>
#include <thread>

#include "core/thread_pool.h"
#include "harness.h"
#include "kernels/nn/attention.h"
#include "kernels/nn/norm.h"
#include "kernels/nn/output.h"

using namespace eac;
using namespace eac::test;

namespace {

std::vector<float> values(const Tensor& t) { return {t.f32(), t.f32() + t.size()}; }

void norms() {
  for (const auto& [n, d] : {std::pair<int64_t, int64_t>{1, 1}, {3, 100}, {40, 257}}) {
    const Tensor x = random_matrix(n, d, 1, 5), w = random_matrix(1, d, 2), b = random_matrix(1, d, 3);
    std::vector<float> rms(size_t(n * d)), layer(size_t(n * d));
    rms_norm(x.f32(), n, d, w, 1e-6f, rms.data());
    layer_norm(x.f32(), n, d, w, b, 1e-5f, layer.data());
    std::vector<double> want_rms, want_layer;
    for (int64_t i = 0; i < n; i++) {
      double squares = 0, mean = 0, var = 0;
      for (int64_t j = 0; j < d; j++)
        squares += std::pow(x.f32()[i * d + j], 2) / double(d), mean += x.f32()[i * d + j] / double(d);
      for (int64_t j = 0; j < d; j++) var += std::pow(x.f32()[i * d + j] - mean, 2) / double(d);
      for (int64_t j = 0; j < d; j++) {
        want_rms.push_back(x.f32()[i * d + j] / std::sqrt(squares + 1e-6) * w.f32()[j]);
        want_layer.push_back((x.f32()[i * d + j] - mean) / std::sqrt(var + 1e-5) * w.f32()[j] + b.f32()[j]);
      }
    }
    check_close(rms, want_rms, 1e-4, "rms norm");
    check_close(layer, want_layer, 1e-3, "layer norm");
  }
}

std::vector<Sequence> one(int64_t length, int64_t position = 0, std::shared_ptr<KvCache> cache = nullptr) {
  Sequence s;
  s.length = length, s.position = position, s.cache = std::move(cache);
  return {s};
}

void rotary() {
  const int64_t head = 8, width = 16;
  for (const bool interleaved : {false, true})
    for (const int64_t position : {0, 5, 30}) {  // 30 + 4 tokens lie beyond long_from
      const int64_t offset = position == 5 ? 2 : 0;
      Rope r{head, {1.0f, 0.5f, 0.1f}, {0.7f, 0.2f, 0.01f}, 1.0f, 1.25f, interleaved, 32, offset};
      Tensor x = random_matrix(4, width, 9);
      const std::vector<float> before = values(x);
      rope(x.f32(), width, one(4, position), r);
      const bool use_long = position + 4 > 32;
      std::vector<double> want(before.begin(), before.end());
      for (int64_t t = 0; t < 4; t++)
        for (int64_t h = 0; h < 2; h++)
          for (int64_t i = 0; i < 3; i++) {
            const double angle = double(position + t) * double((use_long ? r.long_frequencies : r.frequencies)[size_t(i)]),
                         s = use_long ? 1.25 : 1;
            const size_t at = size_t(t * width + h * head + offset), a = at + size_t(interleaved ? 2 * i : i),
                         b = at + size_t(interleaved ? 2 * i + 1 : i + 3);
            want[a] = s * (before[a] * std::cos(angle) - before[b] * std::sin(angle));
            want[b] = s * (before[a] * std::sin(angle) + before[b] * std::cos(angle));
          }
      check_close(values(x), want, 1e-5, "rotary embedding");
    }
}

struct Qkv {
  Tensor q, k, v;
};

std::vector<double> attention_oracle(const Qkv& x, const Attention& a, int64_t n) {
  std::vector<double> out;
  const int64_t d = a.head_dim, group = a.heads / a.kv_heads;
  for (int64_t t = 0; t < n; t++)
    for (int64_t h = 0; h < a.heads; h++) {
      const int64_t from = a.window > 0 ? std::max<int64_t>(0, t - a.window + 1) : 0;
      std::vector<double> p;
      double sum = a.sinks.empty() ? 0 : std::exp(double(a.sinks[size_t(h)]));
      for (int64_t s = from; s <= t; s++) {
        double dot = 0;
        for (int64_t i = 0; i < d; i++)
          dot += double(x.q.f32()[(t * a.heads + h) * d + i]) * x.k.f32()[(s * a.kv_heads + h / group) * d + i];
        p.push_back(std::exp(dot * double(a.scale)));
        sum += p.back();
      }
      for (int64_t i = 0; i < a.value_channels(); i++) {
        double o = 0;
        for (int64_t s = from; s <= t; s++)
          o += p[size_t(s - from)] / sum * x.v.f32()[(s * a.kv_heads + h / group) * a.value_channels() + i];
        out.push_back(o);
      }
    }
  return out;
}

// Feeds x to a cache in pieces of so many tokens.
std::vector<float> in_pieces(const Qkv& x, const Attention& a, int64_t n, int64_t piece) {
  const int64_t width = a.heads * a.head_dim, out_width = a.heads * a.value_channels(), k_width = a.kv_heads * a.head_dim,
                v_width = a.kv_heads * a.value_channels();
  auto cache = std::make_shared<KvCache>(std::vector<KvCache::Widths>{{k_width, v_width}});
  std::vector<float> out(size_t(n * out_width));
  for (int64_t t = 0; t < n; t += piece) {
    const int64_t m = std::min(piece, n - t);
    cache->reserve(t + m);
    attention(x.q.f32() + t * width, x.k.f32() + t * k_width, x.v.f32() + t * v_width, one(m, t, cache), a,
              out.data() + t * out_width);
    cache->length = t + m;
  }
  return out;
}

// In one batch without a cache, and through a cache in pieces: near the oracle, and equal to each other bit for bit.
void attention_case(const Attention& a, int64_t n, const std::vector<int64_t>& piece_sizes) {
  const int64_t d = a.head_dim;
  const Qkv x{random_matrix(n, a.heads * d, 1), random_matrix(n, a.kv_heads * d, 2),
              random_matrix(n, a.kv_heads * a.value_channels(), 3)};
  std::vector<float> whole(size_t(n * a.heads * a.value_channels()));
  attention(x.q.f32(), x.k.f32(), x.v.f32(), one(n), a, whole.data());
  const std::string name = "attention " + std::to_string(a.heads) + "/" + std::to_string(a.kv_heads) + " x " + std::to_string(d) +
                           ", window " + std::to_string(a.window) + ", " + std::to_string(n) + " tokens";
  check_close(whole, attention_oracle(x, a, n), 1e-4, name);
  for (const int64_t piece : piece_sizes)
    check(std::memcmp(in_pieces(x, a, n, piece).data(), whole.data(), whole.size() * sizeof(float)) == 0,
          name + ": pieces of " + std::to_string(piece) + " differ in bits");
}

void attention_matches_oracle() {
  for (const auto& [heads, kv_heads] : {std::pair<int64_t, int64_t>{1, 1}, {4, 2}, {6, 1}, {4, 4}})
    for (const int64_t window : {0, 1, 7, 100})
      for (const int64_t n : {1, 2, 70, 150}) attention_case({0, heads, kv_heads, 16, window, 0.25f}, n, {1, 13, 64});
  // As many query rows as leave a low last tile of every height.
  for (int64_t n = 3; n < 34; n++) attention_case({0, 1, 1, 16, 0, 0.25f}, n, {n});
  // Head widths that no vector divides; chunks of keys (512) merged, few heads on several threads; a window across chunks.
  for (const int64_t d : {3, 40, 80}) attention_case({0, 3, 1, d, 0, 0.2f}, 140, {1, 50});
  attention_case({0, 2, 1, 32, 0, 0.2f}, 1100, {1, 300});
  attention_case({0, 1, 1, 24, 530, 0.2f}, 1200, {1, 700});
  // Values narrower or wider than keys (multi-head latent attention).
  for (const int64_t values : {5, 16, 64}) attention_case({0, 4, 1, 24, 0, 0.2f, {}, values}, 150, {1, 50});
  attention_case({0, 4, 1, 24, 0, 0.2f, {}, 20}, 1100, {1, 300});
}

// Working memory is as large as every number of query rows needs: new threads have none, so that an overrun leaves it.
void attention_memory() {
  for (int64_t n = 1; n <= 120; n++)
    std::thread([n] {
      const Tensor x = random_matrix(n, 64, 1);
      std::vector<float> out(size_t(n * 64));
      attention(x.f32(), x.f32(), x.f32(), one(n), {0, 1, 1, 64, 0, 0.5f}, out.data());
    }).join();
}

// A sink takes its share of the weight: a large one leaves nothing, one of -inf changes nothing.
void attention_sinks() {
  const float inf = std::numeric_limits<float>::infinity();
  for (const int64_t n : {1, 140, 600}) attention_case({0, 4, 2, 16, 0, 0.25f, {0.5f, -3.0f, 4.0f, 1.0f}}, n, {1, 64});
  const int64_t n = 5;
  const Qkv x{random_matrix(n, 32, 1), random_matrix(n, 16, 2), random_matrix(n, 16, 3)};
  std::vector<float> plain(size_t(n * 32)), none(plain), all(plain);
  attention(x.q.f32(), x.k.f32(), x.v.f32(), one(n), {0, 2, 1, 16, 0, 0.25f}, plain.data());
  attention(x.q.f32(), x.k.f32(), x.v.f32(), one(n), {0, 2, 1, 16, 0, 0.25f, {-inf, -inf}}, none.data());
  attention(x.q.f32(), x.k.f32(), x.v.f32(), one(n), {0, 2, 1, 16, 0, 0.25f, {1e4f, 1e4f}}, all.data());
  check_close(none, {plain.begin(), plain.end()}, 1e-6, "sinks of -inf");
  check_close(all, std::vector<double>(all.size(), 0.0), 0, "sinks that take everything");
}

// Several sequences of different lengths in a batch, at different positions: each as if alone.
void attention_of_a_batch() {
  const Attention a{0, 4, 2, 16, 0, 0.25f};
  const int64_t lengths[] = {200, 1, 1, 33}, d = 64, kv_d = 32, n = 235;
  const Qkv x{random_matrix(n, d, 1), random_matrix(n, kv_d, 2), random_matrix(n, kv_d, 3)};
  std::vector<float> batch(size_t(n * d)), alone(batch);
  std::vector<Sequence> sequences;
  int64_t begin = 0;
  for (const int64_t length : lengths) {
    Sequence s;
    s.begin = begin, s.length = length;
    sequences.push_back(s);
    attention(x.q.f32(), x.k.f32(), x.v.f32(), {s}, a, alone.data());
    begin += length;
  }
  attention(x.q.f32(), x.k.f32(), x.v.f32(), sequences, a, batch.data());
  check(std::memcmp(batch.data(), alone.data(), batch.size() * sizeof(float)) == 0, "attention of a batch differs in bits");
}

void sampling() {
  const float logits[] = {0, 2, 1, 2, -1};
  const auto draw = [&](Sampling s) {
    int32_t id;
    sample(logits, 1, 5, s, &id);
    return id;
  };
  check(draw({0, 0, 1, {0.9}}) == 1, "greedy takes the first of the largest");
  check(draw({1, 1, 1, {0.99}}) == 1, "top-1 is greedy");
  check(draw({1, 2, 1, {0.49}}) == 1 && draw({1, 2, 1, {0.51}}) == 3, "top-2: half each");
  check(draw({1, 0, 1e-9, {0.999}}) == 1, "a tiny top-p leaves one");
  // The share of each id over a fine grid of uniform numbers is its probability.
  std::vector<double> share(5, 0), want;
  double sum = 0;
  for (int i = 0; i < 10000; i++) share[size_t(draw({0.7f, 0, 1, {(i + 0.5) / 10000}}))] += 1e-4;
  for (float l : logits) want.push_back(std::exp(double(l) / 0.7)), sum += want.back();
  for (double& w : want) w /= sum;
  check_close({share.begin(), share.end()}, want, 2e-4, "sampled shares");
  // Long vocabularies are sorted piece by piece.
  const Tensor wide = random_matrix(1, 5000, 4, 2);
  int32_t id;
  sample(wide.f32(), 1, 5000, {1, 0, 1, {1 - 1e-12}}, &id);
  check(id == std::min_element(wide.f32(), wide.f32() + 5000) - wide.f32(), "the last draw is the least likely id");
}

void losses() {
  const Tensor p = random_matrix(3, 50, 1, 4), q = random_matrix(3, 50, 2, 4);
  const int32_t targets[] = {7, -1, 49};
  double nll[3], kl[3], zero[3];
  token_nll(p.f32(), 3, 50, targets, nll);
  kl_divergence(p.f32(), q.f32(), 3, 50, kl);
  kl_divergence(p.f32(), p.f32(), 3, 50, zero);
  for (int64_t r = 0; r < 3; r++) {
    double sp = 0, sq = 0, want = 0;
    for (int64_t j = 0; j < 50; j++) sp += std::exp(double(p.f32()[r * 50 + j])), sq += std::exp(double(q.f32()[r * 50 + j]));
    for (int64_t j = 0; j < 50; j++) {
      const double lp = p.f32()[r * 50 + j] - std::log(sp), lq = q.f32()[r * 50 + j] - std::log(sq);
      want += std::exp(lp) * (lp - lq);
    }
    check(std::fabs(kl[r] - want) < 1e-4 * (1 + want), "KL divergence");
    check(std::fabs(zero[r]) < 1e-7, "KL of a distribution with itself");
    check(std::fabs(nll[r] - (targets[r] < 0 ? 0 : std::log(sp) - p.f32()[r * 50 + targets[r]])) < 1e-5,
          "negative log-likelihood");
  }
}

}  // namespace

int main() {
  for (int threads : {1, 3}) {
    if (small && threads == 1) continue;
    set_thread_count(threads);
    run_on_isas("norms", norms);
    run_on_isas("rotary embedding", rotary);
    run_on_isas("attention, whole and in pieces", attention_matches_oracle);
    run_on_isas("attention's memory", attention_memory);
    run_on_isas("attention sinks", attention_sinks);
    run_on_isas("attention of a batch", attention_of_a_batch);
    run("sampling", sampling);
    run_on_isas("losses", losses);
  }
  return failures ? 1 : 0;
}
