// Router calibration against the direct solution.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/thread_pool.h"
#include "harness.h"
#include "kernels/router/calibrate.h"
#include "kernels/router/round.h"

using namespace eac;
using namespace eac::test;

namespace {

struct Streams {
  Tensor w, x, targets;
};

// Inputs with a shared component, clusters and channels of uneven energy; the quantized stream is the full one, disturbed.
// With strong clusters a window takes whole clusters or none of them: the worst case for a preconditioner made from all tokens.
Streams streams(int64_t tokens, int64_t d, int64_t experts, unsigned seed, float clustering = 1) {
  Streams s{random_matrix(experts, d, seed, 0.2f), Tensor::zeros(DType::f32, {tokens, d}),
            Tensor::zeros(DType::f32, {tokens, experts})};
  const int64_t clusters = 6;
  const Tensor centre = random_matrix(clusters, d, seed + 1, clustering), shared = random_matrix(1, d, seed + 2, 2 * clustering);
  const Tensor own = random_matrix(tokens, d, seed + 3, 0.5f), noise = random_matrix(tokens, d, seed + 4, 0.15f);
  for (int64_t t = 0; t < tokens; t++) {
    std::vector<float> full(d);
    for (int64_t j = 0; j < d; j++) {
      const float energy = 0.2f + 2.0f * float((j * 13) % 11) / 11.0f;
      full[j] = (shared.f32()[j] + centre.f32()[t % clusters * d + j] + own.f32()[t * d + j]) * energy;
      s.x.f32()[t * d + j] = full[j] * 0.97f + noise.f32()[t * d + j] * energy;
    }
    for (int64_t e = 0; e < experts; e++)
      for (int64_t j = 0; j < d; j++) s.targets.f32()[t * experts + e] += full[j] * s.w.f32()[e * d + j];
  }
  return s;
}

// |a - b| / |a - w|: the difference relative to the correction, worst row.
double worst_row(const Tensor& a, const Tensor& b, const Tensor& w) {
  const int64_t d = w.cols();
  double worst = 0;
  for (int64_t e = 0; e < w.rows(); e++) {
    double off = 0, size = 0;
    for (int64_t j = 0; j < d; j++) {
      off += std::pow(double(a.f32()[e * d + j]) - b.f32()[e * d + j], 2);
      size += std::pow(double(a.f32()[e * d + j]) - element(w, e * d + j), 2);
    }
    worst = std::max(worst, size > 0 ? std::sqrt(off / size) : off > 0 ? 1.0 : 0.0);
  }
  return worst;
}

void compare(const Streams& s, const RouterCalibrationOptions& o, const std::string& name) {
  const RouterCalibration fast = calibrate_router(s.w, s.x, s.targets, o),
                          slow = calibrate_router_reference(s.w, s.x, s.targets, o);
  const double off = worst_row(slow.weight, fast.weight, s.w);
  check(off < 1e-3, name + ": off by " + std::to_string(off) + " after " + std::to_string(fast.iterations) + " iterations");
  check(std::fabs(fast.loss_before - slow.loss_before) <= 1e-4 * slow.loss_before, name + ": loss before");
  check(std::fabs(fast.loss_after - slow.loss_after) <= 1e-3 * slow.loss_after + 1e-6 * slow.loss_before, name + ": loss after");
  check(fast.loss_after < fast.loss_before, name + ": the loss falls");
}

void solves_directly() {
  compare(streams(3000, 96, 16, 1), {.k = 8}, "top 8 of 16");
  compare(streams(3000, 96, 16, 2), {.k = 2}, "top 2 of 16");
  compare(streams(200, 128, 24, 6), {.k = 4}, "fewer tokens in a window than channels");
  compare(streams(9000, 40, 6, 4), {.k = 3, .ridge = 1e-4}, "more tokens than a chunk, small ridge");
  compare(streams(50, 1, 1, 7), {.k = 1}, "one channel, one expert");
}

void converges() {
  compare(streams(3000, 96, 16, 1, 0.2f), {.k = 8, .direct_below = 0}, "top 8 of 16");
  if (small) return;
  compare(streams(6000, 160, 16, 2, 0.2f), {.k = 8, .direct_below = 0}, "top 8 of 16, more channels");
  compare(streams(3000, 64, 8, 3), {.k = 8, .direct_below = 0}, "plain MSE");
  compare(streams(9000, 40, 6, 4, 0.3f), {.k = 3, .ridge = 1e-4, .direct_below = 0}, "more tokens than a chunk, small ridge");
  compare(streams(3000, 130, 32, 5, 0.1f), {.k = 20, .ridge = 1e-2, .direct_below = 0}, "stiff ridge");
  compare(streams(50, 1, 1, 7), {.k = 1, .direct_below = 0}, "one channel, one expert");
  // Some rows of each kind: those with more than 40 % of the tokens in their window iterate.
  const Streams s = streams(3000, 96, 16, 1, 0.2f);
  compare(s, {.k = 6, .direct_below = 0.1 * 96}, "mixed");
}

void plain_mse_needs_few_iterations() {
  const Streams s = streams(2000, 80, 12, 8);
  const RouterCalibration r = calibrate_router(s.w, s.x, s.targets, {.k = 12, .direct_below = 0});
  check(r.iterations > 0 && r.iterations <= 4,
        "with K = E the preconditioner is the system: " + std::to_string(r.iterations) + " iterations");
}

void empty_windows_keep_the_row() {
  Streams s = streams(400, 48, 8, 9);
  for (int64_t t = 0; t < 400; t++) s.targets.f32()[t * 8 + 5] = -1e3f;
  const RouterCalibration r = calibrate_router(s.w, s.x, s.targets, {.k = 3});
  check(std::memcmp(r.weight.f32() + 5 * 48, s.w.f32() + 5 * 48, 48 * sizeof(float)) == 0, "a row without tokens");
  check(worst_row(calibrate_router_reference(s.w, s.x, s.targets, {.k = 3}).weight, r.weight, s.w) < 1e-3, "the other rows");
  const RouterCalibration none = calibrate_router(s.w, s.x.row_range(0, 0), s.targets.row_range(0, 0), {.k = 3});
  check(std::memcmp(none.weight.data, s.w.data, s.w.bytes()) == 0 && none.iterations == 0, "no tokens at all");
}

void ties_go_to_the_smaller_expert() {
  Streams s = streams(300, 32, 6, 10);
  for (int64_t i = 0; i < s.targets.size(); i++) s.targets.f32()[i] = 1.0f;
  const RouterCalibration r = calibrate_router(s.w, s.x, s.targets, {.k = 2});
  for (int64_t e = 0; e < 6; e++) {
    const bool same = std::memcmp(r.weight.f32() + e * 32, s.w.f32() + e * 32, 32 * sizeof(float)) == 0;
    check(same == (e >= 2), "ties: expert " + std::to_string(e));
  }
}

void few_iterations_still_improve() {
  const Streams s = streams(1500, 96, 16, 11);
  double previous = std::numeric_limits<double>::infinity();
  for (int iterations : {0, 1, 3, 10}) {
    const RouterCalibration r = calibrate_router(s.w, s.x, s.targets, {.k = 4, .max_iterations = iterations, .direct_below = 0});
    check(r.loss_after <= r.loss_before && r.loss_after <= previous * 1.0001, "loss after " + std::to_string(iterations));
    previous = r.loss_after;
  }
}

void refuses() {
  Streams s = streams(20, 8, 4, 12);
  const auto code = [&](const RouterCalibrationOptions& o) -> std::string {
    try {
      calibrate_router(s.w, s.x, s.targets, o);
    } catch (const Error& e) { return e.code; }
    return "";
  };
  check(code({.k = 0}) == "INVALID_ARGUMENT" && code({.k = 5}) == "INVALID_ARGUMENT", "k out of range");
  check(code({.k = 2, .ridge = -1}) == "INVALID_ARGUMENT", "negative ridge");
  s.x.f32()[3] = std::numeric_limits<float>::quiet_NaN();
  check(code({.k = 2}) == "NON_FINITE", "NaN input");
}

void threads_change_nothing() {
  const Streams s = streams(9000, 64, 8, 13);
  for (double direct_below : {0.0, 32.0}) {
    std::vector<RouterCalibration> results;
    for (int threads : {1, 2, 5}) {
      if (small && threads == 2) continue;
      set_thread_count(threads);
      results.push_back(calibrate_router(s.w, s.x, s.targets, {.k = 3, .direct_below = direct_below}));
      const RouterCalibration &a = results[0], &b = results.back();
      check(std::memcmp(a.weight.data, b.weight.data, a.weight.bytes()) == 0 && a.iterations == b.iterations &&
                a.loss_after == b.loss_after,
            "result by thread count");
    }
  }
}

// The logits over correlated inputs change much less than under plain rounding, and every value is one of the dtype.
void rounding_against_inputs() {
  const int64_t d = 96, experts = 8, tokens = 2000;
  const Tensor mix = random_matrix(12, d, 1), common = random_matrix(tokens, 12, 2), own = random_matrix(tokens, d, 3, 0.1f);
  Tensor x = Tensor::zeros(DType::f32, {tokens, d}), h = Tensor::zeros(DType::f32, {d, d});
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t j = 0; j < d; j++) {
      float s = own.f32()[t * d + j];
      for (int64_t k = 0; k < 12; k++) s += common.f32()[t * 12 + k] * mix.f32()[k * d + j];
      x.f32()[t * d + j] = s;
    }
  accumulate_hessian(h, x, nullptr);
  const HessianFactor f = factor_hessian(h, 0.01, true);
  const Tensor w = random_matrix(experts, d, 4);
  for (const DType dtype : {DType::bf16, DType::f16}) {
    const Tensor rounded = round_against_inputs(w, f, dtype);
    double ours = 0, plain = 0;
    for (int64_t e = 0; e < experts; e++)
      for (int64_t t = 0; t < tokens; t++) {
        double a = 0, b = 0;
        for (int64_t j = 0; j < d; j++) {
          const float v = w.f32()[e * d + j];
          const double cast = dtype == DType::bf16 ? bf16_to_f32(f32_to_bf16(v)) : f16_to_f32(f32_to_f16(v));
          a += x.f32()[t * d + j] * (element(rounded, e * d + j) - v);
          b += x.f32()[t * d + j] * (cast - v);
        }
        ours += a * a, plain += b * b;
      }
    check(rounded.dtype == dtype && ours < 0.2 * plain,
          "rounded logits: " + std::to_string(ours) + " against " + std::to_string(plain));
  }
  check(round_against_inputs(w, f, DType::f32).data == w.data, "f32 stays as it is");
}

}  // namespace

int main() {
  run("rare rows are solved directly", solves_directly);
  run("conjugate gradients reach the direct solution", converges);
  run("plain MSE needs few iterations", plain_mse_needs_few_iterations);
  run("a row that no token has in its window stays", empty_windows_keep_the_row);
  run("ties go to the smaller expert", ties_go_to_the_smaller_expert);
  run("an unfinished iteration still improves", few_iterations_still_improve);
  run("bad arguments are refused", refuses);
  run("rounding to storage keeps the logits", rounding_against_inputs);
  run("the number of threads changes nothing", threads_change_nothing);
  return failures ? 1 : 0;
}
