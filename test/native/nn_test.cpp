// Norms, rotary embedding, attention, sampling and losses against plain loops in f64.
#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>

#include "core/thread_pool.h"
#include "harness.h"
#include "kernels/nn/activation.h"
#include "kernels/nn/attention.h"
#include "kernels/nn/norm.h"
#include "kernels/nn/output.h"

using namespace eac;
using namespace eac::test;

namespace {

std::vector<float> values(const Tensor& t) { return {t.f32(), t.f32() + t.size()}; }

Tensor stored_as(DType dtype, const Tensor& t) {
  Tensor out = Tensor::zeros(dtype, t.shape);
  for (int64_t i = 0; i < t.size(); i++) {
    if (dtype == DType::f32) out.f32()[i] = t.f32()[i];
    if (dtype == DType::f16) out.as<uint16_t>()[i] = f32_to_f16(t.f32()[i]);
    if (dtype == DType::bf16) out.as<uint16_t>()[i] = f32_to_bf16(t.f32()[i]);
  }
  return out;
}

void norm_case(int64_t n, int64_t d, DType dtype, float offset) {
  const Tensor w = stored_as(dtype, random_matrix(1, d, 2)), b = stored_as(dtype, random_matrix(1, d, 3));
  Tensor x = random_matrix(n, d, 1, 5);
  for (int64_t i = 0; i < n * d; i++) x.f32()[i] += offset;
  // One element more than the rows: it must not be touched.
  std::vector<float> rms(size_t(n * d) + 1, 7), layer(rms), in_place(x.f32(), x.f32() + n * d);
  rms_norm(x.f32(), n, d, w, 1e-6f, rms.data());
  layer_norm(x.f32(), n, d, w, b, 1e-5f, layer.data());
  rms_norm(in_place.data(), n, d, w, 1e-6f, in_place.data());
  std::vector<double> want_rms, want_layer;
  for (int64_t i = 0; i < n; i++) {
    double squares = 0, mean = 0, var = 0;
    for (int64_t j = 0; j < d; j++)
      squares += std::pow(x.f32()[i * d + j], 2) / double(d), mean += x.f32()[i * d + j] / double(d);
    for (int64_t j = 0; j < d; j++) var += std::pow(x.f32()[i * d + j] - mean, 2) / double(d);
    for (int64_t j = 0; j < d; j++) {
      want_rms.push_back(x.f32()[i * d + j] / std::sqrt(squares + 1e-6) * element(w, j));
      want_layer.push_back((x.f32()[i * d + j] - mean) / std::sqrt(var + 1e-5) * element(w, j) + element(b, j));
    }
  }
  want_rms.push_back(7), want_layer.push_back(7);
  const std::string name = std::to_string(n) + " x " + std::to_string(d) + " about " + std::to_string(offset);
  check_close(rms, want_rms, 1e-5, "rms norm " + name);
  check_close(layer, want_layer, d == 1 ? 1e-3 : 1e-5 * (1 + std::fabs(double(offset))), "layer norm " + name);
  check(std::memcmp(in_place.data(), rms.data(), in_place.size() * sizeof(float)) == 0, "rms norm in place " + name);
}

void norms() {
  for (int64_t d = 1; d <= 70; d++) norm_case(3, d, DType::f32, 0);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) norm_case(40, 257, dtype, 0);
  norm_case(2, 4096, DType::bf16, 0);
  norm_case(2, 300, DType::f32, 100);  // a mean far from 0
}

// gate = activation(gate) * up against f64, over the range of a float and at odd lengths; NaN stays NaN.
void activations() {
  const double sqrt2 = std::sqrt(2.0), pi = std::acos(-1.0);
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  const auto want = [&](Activation a, double g) {
    switch (a) {
      case Activation::silu: return g * sigmoid(g);
      case Activation::gelu: return g * std::erfc(-g / sqrt2) / 2;
      case Activation::gelu_tanh: return g * sigmoid(2 * std::sqrt(2 / pi) * (g + 0.044715 * g * g * g));
      case Activation::relu: return std::max(g, 0.0);
      case Activation::clamped_swiglu: return std::min(g, 7.0) * sigmoid(1.702 * std::min(g, 7.0));
    }
    return 0.0;
  };
  for (const Activation a :
       {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu, Activation::clamped_swiglu})
    for (const int64_t n : {1, 2, 3, 5, 8, 13, 16, 17, 33, 100, 4001}) {
      const Tensor gates = random_matrix(1, n, unsigned(n), n == 4001 ? 4.0f : 1.0f), up = random_matrix(1, n, 7);
      std::vector<float> gate = values(gates);
      gate.push_back(7);
      glu(a, gate.data(), up.f32(), n);
      const std::string name = "activation " + std::to_string(int(a)) + " of " + std::to_string(n);
      for (int64_t i = 0; i < n; i++) {
        const double g = gates.f32()[i], u = up.f32()[i] + (a == Activation::clamped_swiglu ? 1.0 : 0.0), exact = want(a, g) * u;
        // Relative, the left tail included: the exponent there is about g^2 (gelu) and rounded to f32.
        const double bound = (6e-7 + 1.2e-7 * g * g) * std::fabs(exact) + 1e-30;
        if (std::fabs(gate[size_t(i)] - exact) > bound)
          return check(false, name + " at " + std::to_string(g) + ": " + std::to_string(gate[size_t(i)]));
      }
      check(gate[size_t(n)] == 7, name + " writes beyond");
    }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const Activation a :
       {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu, Activation::clamped_swiglu}) {
    float gate[] = {nan, -300, 300, 1}, up[] = {1, 1, 1, nan};
    glu(a, gate, up, 4);
    const double high = want(a, 300) * (a == Activation::clamped_swiglu ? 2 : 1);
    check(std::isnan(gate[0]) && gate[1] == 0 && std::fabs(gate[2] - high) < 1e-4 && std::isnan(gate[3]),
          "limits of activation " + std::to_string(int(a)));
  }
}

std::vector<Sequence> one(int64_t length, int64_t position = 0, std::shared_ptr<KvCache> cache = nullptr) {
  Sequence s;
  s.length = length, s.position = position, s.cache = std::move(cache);
  return {s};
}

// Pairs of turning channels from `offset` on, in heads that may be wider: every number of pairs up to two vectors and more.
void rotary_case(int64_t pairs, bool interleaved, int64_t position, int64_t offset) {
  const int64_t head = 2 * pairs + offset + 3, heads = 3, width = heads * head, tokens = 4;
  Rope r{head, {}, {}, 1.0f, 1.25f, interleaved, 32, offset};  // 30 + 4 tokens lie beyond long_from
  for (int64_t i = 0; i < pairs; i++) {
    r.frequencies.push_back(float(std::pow(10000.0, -double(i) / double(pairs))));
    r.long_frequencies.push_back(r.frequencies.back() * 0.7f);
  }
  Tensor x = random_matrix(tokens, width, 9);
  const std::vector<float> before = values(x);
  rope(x.f32(), width, one(tokens, position), r);
  const bool use_long = position + tokens > 32;
  std::vector<double> want(before.begin(), before.end());
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t i = 0; i < pairs; i++) {
        const double angle = double(float(position + t) * (use_long ? r.long_frequencies : r.frequencies)[size_t(i)]),
                     s = use_long ? 1.25 : 1;
        const size_t at = size_t(t * width + h * head + offset), a = at + size_t(interleaved ? 2 * i : i),
                     b = at + size_t(interleaved ? 2 * i + 1 : i + pairs);
        want[a] = s * (before[a] * std::cos(angle) - before[b] * std::sin(angle));
        want[b] = s * (before[a] * std::sin(angle) + before[b] * std::cos(angle));
      }
  check_close(
      values(x), want, 2e-6,
      "rotary embedding of " + std::to_string(pairs) + (interleaved ? " pairs" : " halves") + " at " + std::to_string(position));
}

void rotary() {
  for (const bool interleaved : {false, true}) {
    for (int64_t pairs = 1; pairs <= 40; pairs++) rotary_case(pairs, interleaved, 5, pairs % 3);
    for (const int64_t position : {0, 30, 4000, 131072, 10000000}) rotary_case(64, interleaved, position, 0);
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
}

std::vector<int32_t> sorted_ids(const float* logits, int64_t n) {
  std::vector<int32_t> ids(static_cast<size_t>(n));
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  return ids;
}

// What Sampling says, given all ids in order.
int32_t sampling_oracle(const float* logits, const std::vector<int32_t>& ids, const Sampling& s, double u) {
  const int64_t n = int64_t(ids.size());
  std::vector<double> p;
  for (const int32_t id : ids) p.push_back(std::exp((double(logits[id]) - logits[ids[0]]) / double(s.temperature)));
  size_t kept = s.top_k > 0 ? size_t(std::min<int64_t>(s.top_k, n)) : p.size();
  double total = std::accumulate(p.begin(), p.begin() + int64_t(kept), 0.0), mass = 0;
  if (s.top_p < 1) {
    size_t i = 0;
    while (i < kept && (i == 0 || mass < s.top_p * total)) mass += p[i++];
    kept = i, total = mass;
  }
  mass = 0;
  for (size_t i = 0; i < kept; i++)
    if ((mass += p[i]) > u * total) return ids[i];
  return ids[kept - 1];
}

// Vocabularies of several pieces, and of several chunks; flat, steep and level logits, and many that are equal.
void sampling_of_many() {
  const auto rounded = [](Tensor t) {
    for (int64_t i = 0; i < t.size(); i++) t.f32()[i] = std::round(t.f32()[i]);
    return t;
  };
  for (const int64_t n : {1, 5, 1023, 1024, 5000, 40000}) {
    if (small && n > 5000) continue;
    for (const Tensor& logits :
         {random_matrix(1, n, 1), random_matrix(1, n, 2, 8), random_matrix(1, n, 3, 1e-3f), random_matrix(1, n, 5, 1000),
          rounded(random_matrix(1, n, 4, 3)), Tensor::zeros(DType::f32, {1, n})}) {
      const std::vector<int32_t> ids = sorted_ids(logits.f32(), n);
      for (const Sampling& s : {Sampling{1, 0, 1},
                                {0.8f, 0, 0.95},
                                {0.8f, 0, 0.3},
                                {1, 0, 0},
                                {1, 1, 1},
                                {0.7f, 7, 1},
                                {1, 2000, 1},
                                {1, 2000, 0.5},
                                {2, 7, 0.9}})
        for (const double u : {0.0, 0.123, 0.7, 0.999}) {
          int32_t id;
          sample(logits.f32(), 1, n, {s.temperature, s.top_k, s.top_p, {u}}, &id);
          check(id == sampling_oracle(logits.f32(), ids, s, u),
                "sample of " + std::to_string(n) + ", temperature " + std::to_string(s.temperature) + ", top-k " +
                    std::to_string(s.top_k) + ", top-p " + std::to_string(s.top_p) + ", " + std::to_string(u));
        }
    }
  }
  const Tensor wide = random_matrix(1, 5000, 4, 2);
  int32_t id;
  sample(wide.f32(), 1, 5000, {1, 0, 1, {1 - 1e-12}}, &id);
  check(id == std::min_element(wide.f32(), wide.f32() + 5000) - wide.f32(), "the last draw is the least likely id");
  sample(wide.f32(), 1, 5000, {}, &id);
  check(id == std::max_element(wide.f32(), wide.f32() + 5000) - wide.f32(), "greedy");
}

// Rows that no softmax has: an id of the vocabulary, the largest where there is one.
void sampling_without_numbers() {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  std::vector<float> row(3000, -inf);
  const auto draw = [&](float temperature, double u) {
    int32_t id;
    sample(row.data(), 1, int64_t(row.size()), {temperature, 0, 0.9, {u}}, &id);
    return id;
  };
  check(draw(0, 0) == 0 && draw(1, 0.5) == 0, "all -inf");
  row[2100] = 1;
  check(draw(0, 0) == 2100 && draw(1, 0.99) == 2100 && draw(1e-40f, 0.5) == 2100, "one that is finite");
  row[2000] = inf;
  check(draw(1, 0.5) == 2000, "one of +inf");
  row[2000] = nan, row[5] = nan;
  check(draw(0, 0) == 2100 && draw(1, 0.99) == 2100, "NaN has no probability");
  std::fill(row.begin(), row.end(), nan);
  check(draw(0, 0) == 0 && draw(1, 0.5) == 0, "all NaN");
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
    run_on_isas("activations", activations);
    run_on_isas("rotary embedding", rotary);
    run_on_isas("attention, whole and in pieces", attention_matches_oracle);
    run_on_isas("attention's memory", attention_memory);
    run_on_isas("attention sinks", attention_sinks);
    run_on_isas("attention of a batch", attention_of_a_batch);
    run_on_isas("sampling", sampling);
    run_on_isas("sampling of many", sampling_of_many);
    run_on_isas("sampling without numbers", sampling_without_numbers);
    run_on_isas("losses", losses);
  }
  return failures ? 1 : 0;
}
