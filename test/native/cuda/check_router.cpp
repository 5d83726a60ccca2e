#include <algorithm>
#include <limits>

#include "cuda/timing.h"
#include "kernels/router/select.h"

namespace eac::cuda::check {
namespace {

constexpr float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();

Router on_device(const RouterSpec& r, const float* correction) {
  return {Scoring(int(r.scoring)),
          r.experts,
          r.top_k,
          r.renormalize,
          r.scale,
          r.jitter,
          r.correction.empty() ? nullptr : correction,
          r.groups,
          r.top_groups,
          r.group_best};
}

struct Case {
  std::string name;
  RouterSpec spec;
  bool odd = false;  // equal, infinite and undefined logits among the others
};

std::vector<float> logits_of(const Case& c, int64_t rows) {
  std::vector<float> x = normal(size_t(rows * c.spec.experts), 5, 2);
  if (!c.odd) return x;
  std::mt19937 gen(11);
  for (int64_t t = 0; t < rows; t++)
    for (int64_t e = 0; e < c.spec.experts; e++) {
      float& v = x[size_t(t * c.spec.experts + e)];
      v = std::round(v);  // ties
      if (v == 0) v = gen() % 2 ? 0.f : -0.f;
      if (t % 4 == 1 && gen() % 5 == 0) v = -infinity;
      if (t % 4 == 2 && gen() % 5 == 0) v = nan;
      if (t % 8 == 3 && gen() % 9 == 0) v = infinity;
      if (t % 8 == 6 && e == 0) v = nan;
    }
  return x;
}

// NaN as a number of its own, so that where it is expected is compared, too.
std::vector<float> marked(std::vector<float> v) {
  for (float& x : v)
    if (std::isnan(x)) x = -12345;
  return v;
}

void compare(const std::string& name, const Buffer<float>& weights, const Buffer<int32_t>& indices,
             const std::vector<float>& want, const std::vector<int32_t>& want_indices) {
  equal(name + ": experts", indices.read(), want_indices);
  const std::vector<float> w = marked(want);
  close(name + ": weights", marked(weights.read()), {w.begin(), w.end()}, 2e-6);
}

void check_case(const Case& c) {
  const std::vector<int32_t> lengths = {9, 1, 23};
  const Sequences s(lengths, {0, 4, 0});
  const int64_t rows = s.batch.rows, k = c.spec.top_k, experts = c.spec.experts;
  const std::vector<float> x = logits_of(c, rows);
  const Buffer<float> logits(x), weights(size_t(rows * k)), correction(c.spec.correction);
  const Buffer<int32_t> indices(size_t(rows * k)), counts(size_t(3 * experts));
  const Router router = on_device(c.spec, correction);
  const Route route{logits, router, s.batch, weights, indices, counts};
  device()(device().table.route(device().context, &route));
  std::vector<Sequence> sequences;
  for (size_t i = 0; i < lengths.size(); i++) sequences.push_back({s.begin[i], lengths[i], 0, nullptr});
  std::vector<float> want(size_t(rows * k));
  std::vector<int32_t> want_indices(want.size()), want_counts(size_t(3 * experts));
  select_experts(x.data(), rows, c.spec, want.data(), want_indices.data());
  count_selections(want_indices.data(), sequences, c.spec, want_counts.data());
  compare(c.name, weights, indices, want, want_indices);
  equal(c.name + ": counts", counts.read(), want_counts);

  std::mt19937 gen(3);
  std::vector<uint8_t> mask(size_t(3 * experts));
  for (uint8_t& m : mask) m = gen() % 3 > 0;
  std::fill_n(mask.begin() + long(experts), experts, uint8_t(0));  // a sequence that keeps none
  const Buffer<uint8_t> keep(mask);
  for (const auto mode : {eac::PruneMode::drop, eac::PruneMode::renormalize, eac::PruneMode::reselect}) {
    const Buffer<float> masked(want);
    const Buffer<int32_t> masked_indices(want_indices);
    const Prune prune{logits, router, s.batch, PruneMode(int(mode)), keep, masked, masked_indices};
    device()(device().table.prune(device().context, &prune));
    std::vector<float> expected = want;
    std::vector<int32_t> expected_indices = want_indices;
    apply_expert_mask(x.data(), mask.data(), mode, sequences, c.spec, expected.data(), expected_indices.data());
    compare(c.name + ", pruned, mode " + std::to_string(int(mode)), masked, masked_indices, expected, expected_indices);
  }
}

void check_pesf() {
  const Sequences s({10, 3, 40}, {0, 0, 0});
  const int64_t experts = 6;
  const std::vector<int32_t> counts = {0, 1, 2, 3, 5, 9, 0, 1, 2, 3, 0, 0, 0, 9, 10, 11, 40, 10};
  const Buffer<int32_t> on(counts);
  const Buffer<uint8_t> keep(counts.size());
  const double threshold = 0.75 * 2;
  const PesfMask mask{on, s.batch, experts, threshold, 4, keep};
  device()(device().table.pesf_mask(device().context, &mask));
  std::vector<uint8_t> want;
  for (size_t i = 0; i < counts.size(); i++) {
    const int32_t tokens = s.length[i / size_t(experts)];
    want.push_back(tokens < 4 || double(counts[i]) * double(experts) >= threshold * tokens);
  }
  equal("PESF mask", keep.read(), want);
}

void check_router() {
  using enum eac::Scoring;
  const RouterSpec few{.experts = 8, .top_k = 2}, qwen{.experts = 60, .top_k = 4, .renormalize = true};
  const RouterSpec deepseek{.scoring = sigmoid,
                            .experts = 256,
                            .top_k = 8,
                            .renormalize = true,
                            .scale = 2.5f,
                            .correction = normal(256, 9, 0.1f),
                            .groups = 8,
                            .top_groups = 4,
                            .group_best = 2};
  RouterSpec one_best = deepseek, mixer{.scoring = sparse_mixer, .experts = 16, .top_k = 2, .jitter = 0.01f}, small = deepseek;
  one_best.scoring = softmax, one_best.group_best = 1, one_best.correction.clear(), one_best.top_groups = 3;
  small.experts = 12, small.top_k = 5, small.groups = 4, small.top_groups = 1, small.correction = normal(12, 9);
  const RouterSpec wide{.experts = 512, .top_k = 32, .renormalize = true}, all{.experts = 3, .top_k = 3, .scale = 0.5f};
  for (const bool odd : {false, true}) {
    const std::string o = odd ? ", odd logits" : "";
    for (const auto& [name, spec] : {std::pair<std::string, RouterSpec>{"softmax", few},
                                     {"softmax, renormalized", qwen},
                                     {"softmax, groups", one_best},
                                     {"sigmoid, groups, correction", deepseek},
                                     {"sigmoid, one group of four", small},
                                     {"sparse mixer", mixer},
                                     {"512 experts, top 32", wide},
                                     {"all experts", all}})
      check_case({name + o, spec, odd});
  }
  check_pesf();
}

void time_router() {
  for (const auto& [experts, k] : {std::pair<int64_t, int64_t>{8, 2}, {60, 4}, {256, 8}})
    for (const int32_t rows : {1, int32_t(scaled(4096))}) {
      const Sequences s({rows}, {0});
      const Buffer<float> logits(normal(size_t(rows * experts), 1)), weights(size_t(rows * k));
      const Buffer<int32_t> indices(size_t(rows * k)), counts{size_t(experts)};
      const Route route{logits, on_device({.experts = experts, .top_k = k}, nullptr), s.batch, weights, indices, counts};
      timed_recorded("route, " + std::to_string(rows) + " tokens, top " + std::to_string(k) + " of " + std::to_string(experts),
                     {.bytes = 4.0 * double(logits.size())}, 1,
                     [&](int64_t) { device()(device().table.route(device().context, &route)); });
    }
}

const Group group("router", check_router, time_router);

}  // namespace
}  // namespace eac::cuda::check
