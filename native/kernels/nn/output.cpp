#include "kernels/nn/output.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "core/thread_pool.h"
#include "kernels/cpu/isa.h"
#include "kernels/matmul/scratch.h"

namespace eac {
namespace {

// Rows of logits are worked on in pieces at fixed places: results do not depend on threads.
constexpr int64_t chunk = 16384, piece = 1024;

template <class F> void for_pieces(int64_t begin, int64_t end, int64_t size, F&& body) {
  for (int64_t i = begin; i < end; i += size) body(i, std::min(size, end - i));
}

template <class F> void for_chunks(int64_t n, F&& body) {
  parallel_for((n + chunk - 1) / chunk, [&](int64_t c) { body(c, c * chunk, std::min(n, (c + 1) * chunk)); });
}

// The first of the largest; 0 if all are NaN.
int32_t argmax(const float* x, int64_t n) {
  std::vector<float> largest(size_t((n + chunk - 1) / chunk));
  for_chunks(n, [&](int64_t c, int64_t begin, int64_t end) { largest[size_t(c)] = isa().max_f32(x + begin, end - begin); });
  const auto best = std::max_element(largest.begin(), largest.end());
  const float* begin = x + (best - largest.begin()) * chunk;
  const float* end = std::min(begin + chunk, x + n);
  const float* at = std::find(begin, end, *best);
  return at == end ? 0 : int32_t(at - x);
}

// Smaller for a larger logit; the largest for NaN.
uint32_t falling(float logit) {
  if (std::isnan(logit)) return ~0u;
  const uint32_t bits = std::bit_cast<uint32_t>(logit + 0.0f);  // one zero
  return bits >> 31 ? bits : 0x7fffffffu - bits;
}

// The probabilities of one row in buckets of falling order (SamplingWeights), of which only those that hold a boundary are ever sorted.
class Ranking {
  struct Bucket {
    double mass;
    int64_t count;
  };
  struct Candidate {
    int32_t id;
    float weight;
  };

 public:
  struct Prefix {
    double mass = 0;
    int64_t count = 0;
    int32_t last = 0;  // id
  };

  Ranking(const float* logits, int64_t n, float max, float temperature)
      : logits_(logits), n_(n), max_(max), inverse_(std::min(1 / temperature, std::numeric_limits<float>::max())) {
    thread_local Scratch bucket_scratch, part_scratch;
    const int64_t chunks = (n + chunk - 1) / chunk;
    bucket_of_ = bucket_scratch.get<uint16_t>(n);
    Bucket* parts = part_scratch.get<Bucket>(chunks * width);
    for_chunks(n, [&](int64_t c, int64_t begin, int64_t end) { count(begin, end, parts + c * width); });
    for (int64_t c = 0; c < chunks; c++)
      for (int64_t b = 0; b < width; b++) {
        buckets_[b].mass += parts[c * width + b].mass;
        buckets_[b].count += parts[c * width + b].count;
      }
  }

  Prefix all() const {
    Prefix p;
    for (const Bucket& b : buckets_) p.mass += b.mass, p.count += b.count;
    return p;
  }

  // The shortest prefix, in falling order of probability, whose mass and count are enough; enough(mass, count) holds for the whole row.
  template <class Enough> Prefix shortest(Enough&& enough) {
    Prefix p;
    for (int64_t b = 0; b < width; b++) {
      if (!enough(p.mass + buckets_[b].mass, p.count + buckets_[b].count)) {
        p.mass += buckets_[b].mass, p.count += buckets_[b].count;
        continue;
      }
      for (const Candidate& c : sorted(b)) {
        p.mass += double(c.weight), p.count++, p.last = c.id;
        if (enough(p.mass, p.count)) return p;
      }
    }
    return p;
  }

 private:
  static constexpr int64_t width = SamplingWeights::buckets;

  void count(int64_t begin, int64_t end, Bucket* part) const {
    std::fill_n(part, width, Bucket{});
    float weight[piece];
    int32_t bucket[piece];
    for_pieces(begin, end, piece, [&](int64_t at, int64_t n) {
      isa().sampling_weights({logits_ + at, max_, inverse_, weight, bucket}, n);
      for (int64_t i = 0; i < n; i++) {
        Bucket& b = part[bucket[i]];
        b.mass += double(weight[i]), b.count++;
        bucket_of_[at + i] = uint16_t(bucket[i]);
      }
    });
  }

  std::vector<Candidate> sorted(int64_t bucket) const {
    std::vector<uint64_t> order;
    order.reserve(size_t(buckets_[bucket].count));
    const uint16_t wanted = uint16_t(bucket);
    for_pieces(0, n_, 64, [&](int64_t at, int64_t n) {
      const uint16_t* p = bucket_of_ + at;
      uint16_t hit = 0;
      for (int64_t i = 0; i < n; i++) hit = uint16_t(hit | (p[i] == wanted));
      for (int64_t i = 0; hit && i < n; i++)
        if (p[i] == wanted) order.push_back(uint64_t(falling(logits_[at + i])) << 32 | uint64_t(at + i));
    });
    std::sort(order.begin(), order.end());
    const int64_t n = int64_t(order.size());
    std::vector<float> logit(order.size()), weight(order.size());
    std::vector<int32_t> same(order.size());
    for (size_t i = 0; i < order.size(); i++) logit[i] = logits_[uint32_t(order[i])];
    isa().sampling_weights({logit.data(), max_, inverse_, weight.data(), same.data()}, n);
    std::vector<Candidate> found;
    found.reserve(order.size());
    for (size_t i = 0; i < order.size(); i++) found.push_back({int32_t(order[i]), weight[i]});
    return found;
  }

  const float* logits_;
  int64_t n_;
  float max_, inverse_;
  uint16_t* bucket_of_;
  Bucket buckets_[width] = {};
};

int32_t sample_row(const float* logits, int64_t n, const Sampling& s, double u) {
  const int32_t best = argmax(logits, n);
  if (s.temperature <= 0 || !std::isfinite(logits[best])) return best;
  Ranking ranking(logits, n, logits[best], s.temperature);
  Ranking::Prefix kept = ranking.all();
  const auto cut = [&](double mass, int64_t most) {
    return ranking.shortest([&](double m, int64_t count) { return m >= mass || count >= most; });
  };
  constexpr double everything = std::numeric_limits<double>::infinity();
  if (s.top_k > 0) kept = cut(everything, std::min(s.top_k, n));
  if (s.top_p < 1) kept = cut(s.top_p * kept.mass, kept.count);
  return ranking.shortest([&](double m, int64_t count) { return m > u * kept.mass || count >= kept.count; }).last;
}

}  // namespace

void sample(const float* logits, int64_t n, int64_t vocabulary, const Sampling& s, int32_t* ids) {
  for (int64_t i = 0; i < n; i++)
    ids[i] = sample_row(logits + i * vocabulary, vocabulary, s, size_t(i) < s.uniform.size() ? s.uniform[size_t(i)] : 0.0);
}

namespace {

// log(sum(exp(x))) with the maximum taken out.
double log_sum_exp(const float* x, int64_t n) {
  const float max = isa().max_f32(x, n);
  return double(max) + std::log(isa().sum_exp(x, n, max));
}

}  // namespace

void token_nll(const float* logits, int64_t n, int64_t vocabulary, const int32_t* targets, double* nll) {
  parallel_for(n, [&](int64_t i) {
    const float* row = logits + i * vocabulary;
    nll[i] = targets[i] < 0 ? 0 : log_sum_exp(row, vocabulary) - row[targets[i]];
  });
}

void kl_divergence(const float* p, const float* q, int64_t n, int64_t vocabulary, double* kl) {
  parallel_for(n, [&](int64_t i) {
    const float *pi = p + i * vocabulary, *qi = q + i * vocabulary;
    const double lp = log_sum_exp(pi, vocabulary), lq = log_sum_exp(qi, vocabulary);
    double sum = 0;
    float log_p[piece], share[piece];
    for_pieces(0, vocabulary, piece, [&](int64_t at, int64_t m) {
      for (int64_t j = 0; j < m; j++) log_p[j] = float(double(pi[at + j]) - lp);
      isa().exp_f32(log_p, m, share);
      for (int64_t j = 0; j < m; j++)  // a logit of -inf has no probability and adds nothing
        if (share[j] > 0) sum += double(share[j]) * ((pi[at + j] - lp) - (qi[at + j] - lq));
    });
    kl[i] = sum;
  });
}

}  // namespace eac
