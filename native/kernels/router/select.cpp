#include "kernels/router/select.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/thread_pool.h"

namespace eac {
namespace {

constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
constexpr int64_t rows_per_task = 32;

// Scores in `scores`, what experts are chosen by in `choice`; an expert that cannot be chosen has minus infinity there.
void score(const float* logits, const uint8_t* keep, const RouterSpec& r, float* scores, float* choice) {
  if (r.scoring == Scoring::softmax) {  // over all experts, kept or not
    float max = minus_infinity, sum = 0;
    for (int64_t e = 0; e < r.experts; e++) max = std::max(max, logits[e]);
    for (int64_t e = 0; e < r.experts; e++) sum += scores[e] = std::exp(logits[e] - max);
    for (int64_t e = 0; e < r.experts; e++) scores[e] /= sum;
  } else {
    for (int64_t e = 0; e < r.experts; e++) scores[e] = 1 / (1 + std::exp(-logits[e]));
  }
  for (int64_t e = 0; e < r.experts; e++) {
    const float by = scores[e] + (r.correction.empty() ? 0.f : r.correction[size_t(e)]);
    choice[e] = (!keep || keep[e]) && by == by ? by : minus_infinity;
  }
}

// Takes the experts of all but the best groups out of the choice.
void limit_groups(const RouterSpec& r, float* choice) {
  const int64_t size = r.experts / r.groups;
  const auto worth = [&](int64_t g) {
    float best = minus_infinity, second = minus_infinity;
    for (int64_t e = g * size; e < (g + 1) * size; e++)
      if (choice[e] > best)
        second = best, best = choice[e];
      else
        second = std::max(second, choice[e]);
    return r.group_best == 2 && second != minus_infinity ? best + second : best;
  };
  static thread_local std::vector<std::pair<float, int64_t>> order;
  order.clear();
  for (int64_t g = 0; g < r.groups; g++) order.push_back({-worth(g), g});
  std::sort(order.begin(), order.end());
  for (int64_t i = r.top_groups; i < r.groups; i++) {
    const int64_t g = order[size_t(i)].second;
    std::fill(choice + g * size, choice + (g + 1) * size, minus_infinity);
  }
}

void top_k(const float* logits, const uint8_t* keep, const RouterSpec& r, float* scores, float* weights, int32_t* indices) {
  float *choice = scores + r.experts, chosen = 0;
  score(logits, keep, r, scores, choice);
  if (r.top_groups < r.groups) limit_groups(r, choice);
  for (int64_t k = 0; k < r.top_k; k++) {
    int32_t best = -1;
    for (int64_t e = 0; e < r.experts; e++)
      if (choice[e] != minus_infinity && (best < 0 || choice[e] > choice[best])) best = int32_t(e);
    indices[k] = best;
    weights[k] = best < 0 ? 0.f : scores[best];
    chosen += weights[k];
    if (best >= 0) choice[best] = minus_infinity;
  }
  const float factor = r.scale / (r.renormalize && chosen > 0 ? chosen : 1.f);
  for (int64_t k = 0; k < r.top_k; k++) weights[k] *= factor;
}

// Each choice in turn is the best remaining expert, weighted by its softmax among the remaining experts close enough to it.
void sparse_mixer(const float* logits, const uint8_t* keep, const RouterSpec& r, float* scores, float* weights,
                  int32_t* indices) {
  for (int64_t e = 0; e < r.experts; e++) scores[e] = !keep || keep[e] ? logits[e] : minus_infinity;
  for (int64_t k = 0; k < r.top_k; k++) {
    int32_t best = -1;
    for (int64_t e = 0; e < r.experts; e++)
      if (scores[e] != minus_infinity && (best < 0 || scores[e] > scores[best])) best = int32_t(e);
    indices[k] = best;
    weights[k] = 0;
    if (best < 0) continue;
    const float max = scores[best];
    float sum = 0;
    for (int64_t e = 0; e < r.experts; e++) {
      if (scores[e] == minus_infinity) continue;
      const float factor = std::max(std::fabs(logits[e]), max);
      if (!((max - logits[e]) / factor > 2 * r.jitter)) sum += std::exp(scores[e] - max);
    }
    weights[k] = r.scale / sum;
    scores[best] = minus_infinity;
  }
}

void select_row(const float* logits, const uint8_t* keep, const RouterSpec& r, float* scores, float* weights, int32_t* indices) {
  if (r.scoring == Scoring::sparse_mixer)
    sparse_mixer(logits, keep, r, scores, weights, indices);
  else
    top_k(logits, keep, r, scores, weights, indices);
}

void mask_row(const uint8_t* keep, PruneMode mode, const RouterSpec& r, float* weights, int32_t* indices) {
  float before = 0, after = 0;
  for (int64_t k = 0; k < r.top_k; k++) {
    before += weights[k];
    if (indices[k] >= 0 && !keep[indices[k]]) weights[k] = 0, indices[k] = -1;
    after += weights[k];
  }
  if (mode == PruneMode::renormalize && after > 0)
    for (int64_t k = 0; k < r.top_k; k++) weights[k] *= before / after;
}

}  // namespace

void select_experts(const float* logits, int64_t n, const RouterSpec& r, float* weights, int32_t* indices) {
  parallel_for((n + rows_per_task - 1) / rows_per_task, [&](int64_t task) {
    static thread_local std::vector<float> scores;
    scores.resize(size_t(2 * r.experts));
    for (int64_t t = task * rows_per_task; t < std::min(n, (task + 1) * rows_per_task); t++)
      select_row(logits + t * r.experts, nullptr, r, scores.data(), weights + t * r.top_k, indices + t * r.top_k);
  });
}

void count_selections(const int32_t* indices, const std::vector<Sequence>& sequences, const RouterSpec& r, int32_t* counts) {
  std::fill(counts, counts + int64_t(sequences.size()) * r.experts, 0);
  for (size_t s = 0; s < sequences.size(); s++)
    for (int64_t i = sequences[s].begin * r.top_k; i < (sequences[s].begin + sequences[s].length) * r.top_k; i++)
      if (indices[i] >= 0) counts[int64_t(s) * r.experts + indices[i]]++;
}

bool pesf_mask(const int32_t* counts, const std::vector<Sequence>& sequences, const RouterSpec& r, double alpha,
               int64_t min_tokens, uint8_t* keep) {
  const double threshold = pesf_threshold(r, alpha);
  bool pruned = false;
  for (size_t s = 0; s < sequences.size(); s++) {
    const int64_t tokens = sequences[s].length;
    for (int64_t i = int64_t(s) * r.experts; i < int64_t(s + 1) * r.experts; i++) {
      keep[i] = tokens == 1 || tokens < min_tokens || double(counts[i]) * double(r.experts) >= threshold * double(tokens);
      pruned |= !keep[i];
    }
  }
  return pruned;
}

void apply_expert_mask(const float* logits, const uint8_t* mask, PruneMode mode, const std::vector<Sequence>& sequences,
                       const RouterSpec& r, float* weights, int32_t* indices) {
  std::vector<float> scores(static_cast<size_t>(2 * r.experts));
  for (size_t s = 0; s < sequences.size(); s++) {
    const uint8_t* keep = mask + int64_t(s) * r.experts;
    for (int64_t t = sequences[s].begin; t < sequences[s].begin + sequences[s].length; t++) {
      if (mode == PruneMode::reselect)
        select_row(logits + t * r.experts, keep, r, scores.data(), weights + t * r.top_k, indices + t * r.top_k);
      else
        mask_row(keep, mode, r, weights + t * r.top_k, indices + t * r.top_k);
    }
  }
}

}  // namespace eac
