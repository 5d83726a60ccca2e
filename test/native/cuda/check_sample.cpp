#include <algorithm>
#include <limits>
#include <numeric>

#include "cuda/timing.h"
#include "kernels/nn/output.h"

namespace eac::cuda::check {
namespace {

std::vector<int32_t> sampled(const std::vector<float>& logits, int64_t vocabulary, const Sampling& s) {
  const int64_t rows = int64_t(logits.size()) / vocabulary;
  const Buffer<float> on(logits);
  const Buffer<double> uniform(s.uniform);
  const Buffer<int32_t> ids{size_t(rows)};
  const Sample sample{on, rows, vocabulary, s.temperature, s.top_k, s.top_p, uniform, ids};
  device()(device().table.sample(device().context, &sample));
  return ids.read();
}

void check_case(const std::string& name, const std::vector<float>& logits, int64_t vocabulary, Sampling s) {
  const size_t rows = logits.size() / size_t(vocabulary);
  std::mt19937 gen(unsigned(vocabulary + s.top_k));
  for (size_t i = 0; i < rows; i++) s.uniform.push_back(std::uniform_real_distribution<double>(0, 1)(gen));
  if (rows > 2) s.uniform[0] = 0, s.uniform[1] = 1 - 1e-9;
  std::vector<int32_t> want(rows);
  eac::sample(logits.data(), int64_t(rows), vocabulary, s, want.data());
  equal("sample, " + name + ", " + std::to_string(vocabulary) + " logits, temperature " + std::to_string(s.temperature) +
            ", top_k " + std::to_string(s.top_k) + ", top_p " + std::to_string(s.top_p),
        sampled(logits, vocabulary, s), want);
}

// Many logits have the same value; both zeros are among them.
std::vector<float> coarse(size_t n) {
  std::vector<float> v = normal(n, 3, 2);
  for (float& x : v) x = std::round(x);
  return v;
}

void check_sample() {
  const std::vector<int64_t> vocabularies =
      device().emulated() ? std::vector<int64_t>{1, 7, 255, 5000} : std::vector<int64_t>{1, 7, 255, 5000, 50257, 151936, 200064};
  for (const int64_t v : vocabularies) {
    const size_t n = size_t(v) * 5;
    for (const auto& [name, logits] :
         {std::pair{std::string("normal"), normal(n, 1, 3)}, {"coarse", coarse(n)}, {"equal", std::vector<float>(n, -0.25f)}}) {
      check_case(name, logits, v, {});
      check_case(name, logits, v, {.temperature = 1, .uniform = {}});
      check_case(name, logits, v, {.temperature = 0.7f, .top_k = 40, .uniform = {}});
      check_case(name, logits, v, {.temperature = 1.3f, .top_k = 3, .top_p = 0.8, .uniform = {}});
      check_case(name, logits, v, {.temperature = 1, .top_p = 0.9, .uniform = {}});
      check_case(name, logits, v, {.temperature = 2, .top_k = 1000, .top_p = 0, .uniform = {}});
      check_case(name, logits, v, {.temperature = 1e-3f, .top_p = 0.999, .uniform = {}});
    }
  }
  // What cannot be chosen, and how often the others are.
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> logits = normal(size_t(300) * 4, 8);
  for (size_t i = 0; i < logits.size(); i += 3) logits[i] = -infinity;
  check_case("minus infinity", logits, 300, {.temperature = 1, .uniform = {}});
  check_case("minus infinity", logits, 300, {});
  for (const float odd : {std::numeric_limits<float>::quiet_NaN(), infinity}) {
    for (size_t i = 0; i < logits.size(); i += 7) logits[i] = odd;
    std::fill_n(logits.begin(), 300, std::isnan(odd) ? odd : -infinity);
    check_case("not finite", logits, 300, {});
    check_case("not finite", logits, 300, {.temperature = 1, .top_k = 5, .top_p = 0.9, .uniform = {}});
  }
  const double below_quarter = std::nextafter(0.25, 0), below_one = std::nextafter(1.0, 0);
  equal("sample, numbers between ids",
        sampled(std::vector<float>(24, 1), 4, {.temperature = 1, .uniform = {0, below_quarter, 0.25, 0.5, 0.75, below_one}}),
        {0, 0, 1, 2, 3, 3});
  if (!device().emulated())  // more blocks than a block has threads
    equal("sample, 700001 equal logits", sampled(std::vector<float>(700001, 1), 700001, {.temperature = 1, .uniform = {0.9}}),
          {630000});
  const size_t draws = 2000, v = 4;
  std::vector<float> same;
  Sampling s{.temperature = 1, .uniform = {}};
  for (size_t i = 0; i < draws; i++) {
    for (const double p : {0.1, 0.4, 0.3, 0.2}) same.push_back(float(std::log(p)));
    s.uniform.push_back((double(i) + 0.5) / double(draws));
  }
  std::vector<int> counts(v);
  for (const int32_t id : sampled(same, int64_t(v), s)) counts.at(size_t(id))++;
  equal("sample, frequencies of evenly spread numbers", counts, {200, 800, 600, 400});
}

void time_sample() {
  for (const int64_t rows : {1, 32})
    for (const auto& [name, s] : {std::pair<std::string, Sampling>{"greedy", {}},
                                  {"temperature", {.temperature = 1, .uniform = {}}},
                                  {"top_p 0.9", {.temperature = 1, .top_p = 0.9, .uniform = {}}},
                                  {"top_k 40, top_p 0.9", {.temperature = 1, .top_k = 40, .top_p = 0.9, .uniform = {}}}}) {
      const int64_t vocabulary = scaled(151936);
      const Buffer<float> logits(normal(size_t(rows * vocabulary), 1, 3));
      const Buffer<double> uniform(std::vector<double>(size_t(rows), 0.5));
      const Buffer<int32_t> ids{size_t(rows)};
      const Sample sample{logits, rows, vocabulary, s.temperature, s.top_k, s.top_p, uniform, ids};
      timed_recorded("sample, " + std::to_string(rows) + " x " + std::to_string(vocabulary) + ", " + name,
                     {.bytes = 4.0 * double(logits.size())}, 1,
                     [&](int64_t) { device()(device().table.sample(device().context, &sample)); });
    }
}

const Group group("sample", check_sample, time_sample);

}  // namespace
}  // namespace eac::cuda::check
