#include "kernels/nn/output.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/thread_pool.h"

namespace eac {
namespace {

int32_t argmax(const float* x, int64_t n) { return int32_t(std::max_element(x, x + n) - x); }

// log(sum(exp(x))) with the maximum taken out.
double log_sum_exp(const float* x, int64_t n) {
  const double max = *std::max_element(x, x + n);
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += double(std::exp(x[i] - float(max)));
  return max + std::log(sum);
}

int32_t sample_row(const float* logits, int64_t n, const Sampling& s, double u) {
  if (s.temperature <= 0) return argmax(logits, n);
  const auto before = [&](int32_t a, int32_t b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); };
  const double max = *std::max_element(logits, logits + n);
  const auto weight = [&](int32_t i) { return std::exp((logits[i] - max) / double(s.temperature)); };
  std::vector<int32_t> ids(static_cast<size_t>(n));
  std::iota(ids.begin(), ids.end(), 0);

  // Only the largest are ever needed in order: sort a prefix, and a longer one while it does not hold enough probability.
  int64_t kept = s.top_k > 0 ? std::min(s.top_k, n) : n;
  double total = 0;
  if (s.top_k > 0) {
    std::nth_element(ids.begin(), ids.begin() + (kept - 1), ids.end(), before);
    std::sort(ids.begin(), ids.begin() + kept, before);
    for (int64_t i = 0; i < kept; i++) total += weight(ids[size_t(i)]);
  } else {
    for (int32_t i = 0; i < n; i++) total += weight(i);
  }
  int64_t sorted = s.top_k > 0 ? kept : 0;
  const auto id_at = [&](int64_t i) {
    while (i >= sorted) {
      const int64_t more = std::min<int64_t>(n, std::max<int64_t>(256, 8 * sorted));
      std::partial_sort(ids.begin() + sorted, ids.begin() + more, ids.end(), before);
      sorted = more;
    }
    return ids[size_t(i)];
  };
  if (s.top_p < 1) {
    double mass = 0;
    int64_t i = 0;
    while (i < kept && mass < s.top_p * total) mass += weight(id_at(i++));
    kept = std::max<int64_t>(1, i);
    total = mass;
  }
  double left = u * total;
  for (int64_t i = 0; i < kept; i++) {
    left -= weight(id_at(i));
    if (left < 0) return id_at(i);
  }
  return id_at(kept - 1);
}

}  // namespace

void sample(const float* logits, int64_t n, int64_t vocabulary, const Sampling& s, int32_t* ids) {
  parallel_for(n, [&](int64_t i) {
    ids[i] = sample_row(logits + i * vocabulary, vocabulary, s, size_t(i) < s.uniform.size() ? s.uniform[size_t(i)] : 0.0);
  });
}

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
    for (int64_t j = 0; j < vocabulary; j++) {
      const double log_p = pi[j] - lp, pj = double(std::exp(float(log_p)));
      if (pj > 0) sum += pj * (log_p - (qi[j] - lq));  // a logit of -inf has no probability and adds nothing
    }
    kl[i] = sum;
  });
}

}  // namespace eac
