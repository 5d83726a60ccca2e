// Choosing experts, pruning them, and the sparse-expert dispatch, against plain loops.
#include <algorithm>
#include <cstring>

#include "core/thread_pool.h"
#include "harness.h"
#include "kernels/matmul/gemm.h"
#include "kernels/moe/experts.h"
#include "kernels/quant/quantize.h"
#include "kernels/router/select.h"

using namespace eac;
using namespace eac::test;

namespace {

std::vector<Sequence> sequences_of(std::vector<int64_t> lengths) {
  std::vector<Sequence> s;
  int64_t begin = 0;
  for (int64_t n : lengths) {
    Sequence one;
    one.begin = begin, one.length = n;
    s.push_back(one);
    begin += n;
  }
  return s;
}

struct Selection {
  std::vector<float> weights;
  std::vector<int32_t> indices;
};
Selection select(const Tensor& logits, const RouterSpec& r) {
  Selection s{std::vector<float>(size_t(logits.rows() * r.top_k)), std::vector<int32_t>(size_t(logits.rows() * r.top_k))};
  select_experts(logits.f32(), logits.rows(), r, s.weights.data(), s.indices.data());
  return s;
}

void softmax_selection() {
  for (const bool renormalize : {false, true})
    for (const auto& [experts, top_k] : {std::pair<int64_t, int64_t>{1, 1}, {8, 2}, {60, 4}, {128, 8}, {16, 16}}) {
      const RouterSpec r{Scoring::softmax, experts, top_k, renormalize, 1.5f, 0};
      const Tensor logits = random_matrix(67, experts, unsigned(experts), 3);
      const Selection s = select(logits, r);
      for (int64_t t = 0; t < 67; t++) {
        const float* row = logits.f32() + t * experts;
        std::vector<int32_t> order(static_cast<size_t>(experts));
        for (int64_t e = 0; e < experts; e++) order[size_t(e)] = int32_t(e);
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row[a] > row[b]; });
        double all = 0, chosen = 0;
        for (int64_t e = 0; e < experts; e++) all += std::exp(double(row[e]));
        for (int64_t k = 0; k < top_k; k++) chosen += std::exp(double(row[order[size_t(k)]]));
        for (int64_t k = 0; k < top_k; k++) {
          const size_t i = size_t(t * top_k + k);
          const double want = 1.5 * std::exp(double(row[order[size_t(k)]])) / (renormalize ? chosen : all);
          check(s.indices[i] == order[size_t(k)], "chosen expert");
          check(std::fabs(s.weights[i] - want) < 1e-5, "weight of a chosen expert");
        }
      }
    }
}

// DeepSeek-V2, V3: the definitions, in plain loops over sorted lists.
void grouped_selection() {
  const int64_t experts = 16, k = 4;
  for (const Scoring scoring : {Scoring::softmax, Scoring::sigmoid})
    for (const bool corrected : {false, true})
      for (const auto& [groups, top, best] : {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1}, {4, 2, 1}, {4, 2, 2}, {8, 3, 2}}) {
        RouterSpec r{scoring, experts, k, true, 2.5f, 0};
        r.groups = groups, r.top_groups = top, r.group_best = best;
        const Tensor c = random_matrix(1, experts, 9, 0.3f), logits = random_matrix(67, experts, 7, 2);
        if (corrected) r.correction.assign(c.f32(), c.f32() + experts);
        const Selection s = select(logits, r);
        for (int64_t t = 0; t < 67; t++) {
          std::vector<double> scores, choice;
          double all = 0;
          for (int64_t e = 0; e < experts; e++) all += std::exp(double(logits.f32()[t * experts + e]));
          for (int64_t e = 0; e < experts; e++) {
            const double z = double(logits.f32()[t * experts + e]);
            scores.push_back(scoring == Scoring::softmax ? std::exp(z) / all : 1 / (1 + std::exp(-z)));
            choice.push_back(scores.back() + (corrected ? double(c.f32()[e]) : 0.0));
          }
          std::vector<std::pair<double, int64_t>> worth;
          const int64_t size = experts / groups;
          for (int64_t g = 0; g < groups; g++) {
            std::vector<double> of(choice.begin() + g * size, choice.begin() + (g + 1) * size);
            std::sort(of.rbegin(), of.rend());
            worth.push_back({best == 2 ? of[0] + of[1] : of[0], g});
          }
          std::sort(worth.rbegin(), worth.rend());
          std::vector<std::pair<double, int32_t>> open;
          for (int64_t i = 0; i < top; i++)
            for (int64_t e = worth[size_t(i)].second * size; e < (worth[size_t(i)].second + 1) * size; e++)
              open.push_back({choice[size_t(e)], int32_t(e)});
          std::sort(open.rbegin(), open.rend());
          double sum = 0;
          for (int64_t i = 0; i < k; i++) sum += scores[size_t(open[size_t(i)].second)];
          for (int64_t i = 0; i < k; i++) {
            check(s.indices[size_t(t * k + i)] == open[size_t(i)].second, "expert of the best groups");
            check(std::fabs(s.weights[size_t(t * k + i)] - 2.5 * scores[size_t(open[size_t(i)].second)] / sum) < 1e-5,
                  "its weight is the bare score");
          }
        }
      }
}

void ties_go_to_the_smaller_index() {
  const Tensor logits = Tensor::zeros(DType::f32, {1, 6});
  const Selection s = select(logits, {Scoring::softmax, 6, 3, false, 1, 0});
  check(s.indices == std::vector<int32_t>({0, 1, 2}), "ties");
}

void sparse_mixer_selection() {
  // Worked by hand from arXiv 2409.12136: jitter 0.1, so experts within 20 % of the larger of |s| and the maximum compete.
  Tensor logits = Tensor::zeros(DType::f32, {1, 4});
  const float row[] = {2.0f, 1.9f, 1.0f, -3.0f};
  std::memcpy(logits.data, row, sizeof row);
  const Selection s = select(logits, {Scoring::sparse_mixer, 4, 2, false, 1, 0.1f});
  check(s.indices == std::vector<int32_t>({0, 1}), "sparse mixer chooses the two largest");
  check(std::fabs(s.weights[0] - 1 / (1 + std::exp(-0.1))) < 1e-6, "first weight: softmax over 2.0 and 1.9");
  check(std::fabs(s.weights[1] - 1) < 1e-6, "second weight: 1.0 is more than 20 % below 1.9, nothing competes");
}

void counting_and_masks() {
  const RouterSpec r{Scoring::softmax, 12, 3, false, 1, 0};
  const Tensor logits = random_matrix(50, 12, 3, 2);
  const auto sequences = sequences_of({20, 30});
  const Selection s = select(logits, r);
  std::vector<int32_t> counts(24);
  count_selections(s.indices.data(), sequences, r, counts.data());
  for (int64_t q = 0; q < 2; q++) {
    int64_t sum = 0;
    for (int64_t e = 0; e < 12; e++) {
      const auto begin = s.indices.begin() + sequences[size_t(q)].begin * 3;
      check(counts[size_t(q * 12 + e)] == std::count(begin, begin + sequences[size_t(q)].length * 3, int32_t(e)), "count");
      sum += counts[size_t(q * 12 + e)];
    }
    check(sum == sequences[size_t(q)].length * 3, "counts add up");
  }

  std::vector<uint8_t> keep(24, 1);
  for (size_t e : {1u, 4u, 5u, 14u, 20u}) keep[e] = 0;
  for (PruneMode mode : {PruneMode::drop, PruneMode::renormalize, PruneMode::reselect}) {
    Selection m = s;
    apply_expert_mask(logits.f32(), keep.data(), mode, sequences, r, m.weights.data(), m.indices.data());
    for (int64_t t = 0; t < 50; t++) {
      const uint8_t* k = keep.data() + (t < 20 ? 0 : 12);
      float before = 0, after = 0;
      int survivors = 0;
      for (int64_t i = t * 3; i < t * 3 + 3; i++) {
        const size_t j = size_t(i);
        check(m.indices[j] < 0 ? m.weights[j] == 0 : k[m.indices[j]] == 1, "a pruned expert is gone");
        before += s.weights[j], after += m.weights[j], survivors += m.indices[j] >= 0;
        if (mode == PruneMode::drop)
          check(k[s.indices[j]] ? m.indices[j] == s.indices[j] && m.weights[j] == s.weights[j] : m.indices[j] == -1,
                "drop keeps the others as they are");
      }
      if (mode == PruneMode::reselect) check(survivors == 3, "reselect fills all slots");
      if (mode == PruneMode::renormalize && survivors > 0) check(std::fabs(after - before) < 1e-6f, "renormalize keeps the sum");
    }
  }
}

Experts random_experts(int64_t count, int64_t d, int64_t f, int bits, Activation activation, int64_t shared_width = 0,
                       bool biased = false) {
  const auto make = [&](int64_t rows, int64_t cols, unsigned seed) -> Matrix {
    Tensor w = random_matrix(rows, cols, seed, 0.1f);
    if (bits == 0) return w;
    return quantize_rtn(w, {bits, 64, false, false}, nullptr);
  };
  std::vector<Matrix> gate, up, down;
  for (int64_t i = 0; i < count; i++) {
    gate.push_back(make(f, d, unsigned(3 * i)));
    up.push_back(make(f, d, unsigned(3 * i + 1)));
    down.push_back(make(d, f, unsigned(3 * i + 2)));
  }
  std::optional<SharedExpert> shared;
  if (shared_width > 0)
    shared = SharedExpert{make(shared_width, d, 1001), make(shared_width, d, 1002), make(d, shared_width, 1003),
                          random_matrix(1, d, 1004, 0.1f)};
  std::optional<ExpertBiases> biases;
  if (biased) {
    biases.emplace();
    for (int64_t i = 0; i < count; i++) {
      biases->gate.push_back(random_matrix(1, f, unsigned(2000 + i)));
      biases->up.push_back(random_matrix(1, f, unsigned(3000 + i)));
      biases->down.push_back(random_matrix(1, d, unsigned(4000 + i)));
    }
  }
  return Experts(std::move(gate), std::move(up), std::move(down), activation, std::move(shared), std::move(biases));
}

// One hot expert and many cold ones, an expert that nobody chose, slots that were pruned.
std::vector<int32_t> uneven_choice(int64_t n, int64_t k) {
  std::vector<int32_t> indices(size_t(n * k));
  for (int64_t i = 0; i < n * k; i++) indices[size_t(i)] = i % k == 0 ? 2 : i % 11 == 0 ? -1 : int32_t(i % 6);
  return indices;
}

void dispatch_case(int bits, Activation activation, int64_t shared, const std::vector<int64_t>& batches, bool biased = false) {
  const int64_t d = 96, f = 160, k = 3, experts = 7;
  const Experts e = random_experts(experts, d, f, bits, activation, shared, biased);
  for (const Activations inputs : {Activations::f32, Activations::int8})
    for (const int64_t n : batches) {
      if (bits == 0 && inputs == Activations::int8) continue;
      const Tensor x = random_matrix(n, d, 5), w = random_matrix(n, k, 6);
      const std::vector<int32_t> indices = uneven_choice(n, k);
      std::vector<float> got(size_t(n * d), 1), want(size_t(n * d), 1);
      ExpertsScratch scratch;
      // A hidden value at the edge between two int8 steps may fall either way: then outputs differ by a step's worth.
      const double tolerance = inputs == Activations::int8 ? 2e-2 : 2e-4;
      for (const float beta : {0.f, 1.f}) {
        run_experts(x.f32(), n, d, w.f32(), indices.data(), k, e, beta, got.data(), scratch, inputs);
        run_experts_reference(x.f32(), n, d, w.f32(), indices.data(), k, e, beta, want.data(), inputs);
        check_close(got, {want.begin(), want.end()}, tolerance,
                    std::string(isa().name) + " experts, " + std::to_string(bits) + " bit, " + std::to_string(n) + " tokens");
      }
    }
}

void dispatch_matches_reference() {
  const std::vector<int64_t> batches = small ? std::vector<int64_t>{1, 3, 33} : std::vector<int64_t>{1, 3, 33, 130};
  for (const int bits : {0, 2, 3, 4})
    for (const int64_t shared : {0, 224}) dispatch_case(bits, Activation::silu, shared, batches);
  for (const Activation activation : {Activation::gelu, Activation::gelu_tanh, Activation::relu})
    dispatch_case(3, activation, 0, {3});
  for (const int bits : {0, 4}) dispatch_case(bits, Activation::clamped_swiglu, 0, {1, 3, 33}, true);
}

// Alone or among others, on one thread or five: the same bits.
void dispatch_is_regular() {
  const int64_t n = 130, d = 96, f = 160, k = 3;
  const Tensor x = random_matrix(n, d, 1), w = random_matrix(n, k, 2);
  const std::vector<int32_t> indices = uneven_choice(n, k);
  for (const int bits : {0, 3})
    for (const Activations inputs : {Activations::f32, Activations::int8}) {
      const Experts e = random_experts(7, d, f, bits, Activation::silu, 224);
      std::vector<float> first;
      ExpertsScratch scratch;
      for (int threads : {1, 2, 5}) {
        set_thread_count(threads);
        std::vector<float> out(size_t(n * d));
        run_experts(x.f32(), n, d, w.f32(), indices.data(), k, e, 0, out.data(), scratch, inputs);
        if (first.empty()) first = out;
        check(std::memcmp(first.data(), out.data(), out.size() * sizeof(float)) == 0, "bits by thread count");
      }
      for (int64_t t = 0; t < n; t++) {
        std::vector<float> alone(static_cast<size_t>(d));
        run_experts(x.f32() + t * d, 1, d, w.f32() + t * k, indices.data() + t * k, k, e, 0, alone.data(), scratch, inputs);
        check(std::memcmp(first.data() + t * d, alone.data(), alone.size() * sizeof(float)) == 0, "a token alone, bit for bit");
      }
    }
}

// Experts of one layer may differ in width, group size and symmetry; one that is not quantized makes the layer exact.
void mixed_experts() {
  const int64_t n = 9, d = 192, f = 128, k = 2;
  Experts e = random_experts(4, d, f, 4, Activation::silu);
  const auto requantize = [&](Matrix& m, int bits, int64_t group) {
    m = quantize_rtn(dequantize(std::get<QuantMatrix>(m)), {bits, group, false, false}, nullptr);
  };
  requantize(e.gate[1], 2, 32), requantize(e.up[2], 3, 192), requantize(e.down[3], 3, 128);
  e = Experts(e.gate, e.up, e.down, e.activation);
  const Tensor x = random_matrix(n, d, 1), w = random_matrix(n, k, 2);
  std::vector<int32_t> indices(size_t(n * k));
  for (size_t i = 0; i < indices.size(); i++) indices[i] = int32_t(i % 4);
  std::vector<float> int8(size_t(n * d)), exact(size_t(n * d)), dense(size_t(n * d));
  ExpertsScratch scratch;
  run_experts(x.f32(), n, d, w.f32(), indices.data(), k, e, 0, int8.data(), scratch, Activations::int8);
  run_experts(x.f32(), n, d, w.f32(), indices.data(), k, e, 0, exact.data(), scratch, Activations::f32);
  double difference = 0, energy = 0;
  for (size_t i = 0; i < exact.size(); i++)
    difference += std::pow(int8[i] - exact[i], 2), energy += std::pow(double(exact[i]), 2);
  check(difference < 9e-4 * energy, "mixed experts: relative error " + std::to_string(std::sqrt(difference / energy)));
  check(int8 != exact, "int8 is not the exact path");
  e.up[0] = dequantize(std::get<QuantMatrix>(e.up[0]));
  e = Experts(e.gate, e.up, e.down, e.activation);
  run_experts(x.f32(), n, d, w.f32(), indices.data(), k, e, 0, dense.data(), scratch, Activations::int8);
  check(dense == exact, "a dense matrix makes the layer exact");
}

void unknown_experts_are_refused() {
  const Experts e = random_experts(2, 32, 32, 0, Activation::silu);
  const Tensor x = random_matrix(1, 32, 1), w = random_matrix(1, 1, 2);
  const int32_t index = 2;
  std::vector<float> out(32);
  ExpertsScratch scratch;
  check(error_code([&] { run_experts(x.f32(), 1, 32, w.f32(), &index, 1, e, 0, out.data(), scratch, Activations::f32); }) ==
            "INVALID_ARGUMENT",
        "expert 2 of 2");
}

}  // namespace

int main() {
  run("softmax top-k matches a sort", softmax_selection);
  run("groups, corrections and sigmoid scores match sorted lists", grouped_selection);
  run("ties go to the smaller index", ties_go_to_the_smaller_index);
  run("the sparse mixer matches a worked example", sparse_mixer_selection);
  run("counts and masks, per sequence", counting_and_masks);
  run_on_isas("dispatch matches its oracle", dispatch_matches_reference);
  run_on_isas("neither threads nor the batch change anything", dispatch_is_regular);
  run_on_isas("experts of one layer may differ", mixed_experts);
  run("an expert that does not exist is refused", unknown_experts_are_refused);
  return failures ? 1 : 0;
}
