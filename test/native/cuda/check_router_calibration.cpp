// Router calibration against calibrate_router_reference, which forms and solves every row's system.
#include <algorithm>
#include <limits>

#include "cuda/timing.h"
#include "kernels/router/calibrate.h"

namespace eac::cuda::check {
namespace {

using std::vector;

size_t z(int64_t n) { return static_cast<size_t>(n); }

// Inputs with a shared component and channels of uneven energy; the quantized stream is the full one, disturbed.
struct Streams {
  int64_t tokens, width, experts;
  vector<float> w, x, targets;
};
Streams streams(int64_t tokens, int64_t width, int64_t experts, unsigned seed) {
  Streams s{tokens, width, experts, normal(z(experts * width), seed, 0.2f), {}, vector<float>(z(tokens * experts))};
  const vector<float> shared = normal(z(width), seed + 1, 0.4f), own = normal(z(tokens * width), seed + 2, 0.5f),
                      noise = normal(z(tokens * width), seed + 3, 0.15f);
  for (int64_t t = 0; t < tokens; t++) {
    vector<float> full(z(width));
    for (int64_t j = 0; j < width; j++) {
      const float energy = 0.2f + 2.0f * float((j * 13) % 11) / 11.0f;
      full[z(j)] = (shared[z(j)] + own[z(t * width + j)]) * energy;
      s.x.push_back(full[z(j)] * 0.97f + noise[z(t * width + j)] * energy);
    }
    for (int64_t e = 0; e < experts; e++)
      for (int64_t j = 0; j < width; j++) s.targets[z(t * experts + e)] += full[z(j)] * s.w[z(e * width + j)];
  }
  return s;
}

struct Result {
  Status status;
  vector<float> out;
  int32_t iterations;
  double loss[2];
};
Result run(const Streams& s, int64_t k, double ridge, int32_t max_iterations = 100) {
  const Buffer<float> w(s.w), x(s.x), targets(s.targets), out(s.w.size());
  Result r{};
  const CalibrateRouter args{w,     x,    targets,        s.experts, s.width,       s.tokens, k,
                             ridge, 1e-5, max_iterations, out,       &r.iterations, r.loss};
  r.status = device().table.calibrate_router(device().context, &args);
  r.out = out.read();
  return r;
}

Tensor tensor(const vector<float>& v, int64_t rows, int64_t cols) {
  Tensor t = Tensor::zeros(DType::f32, {rows, cols});
  std::copy(v.begin(), v.end(), t.f32());
  return t;
}

// The difference relative to the correction, worst row.
void compare(const std::string& name, const Streams& s, int64_t k, double ridge) {
  const Result got = run(s, k, ridge);
  device()(got.status);
  RouterCalibrationOptions o;
  o.k = k, o.ridge = ridge;
  const RouterCalibration want = calibrate_router_reference(tensor(s.w, s.experts, s.width), tensor(s.x, s.tokens, s.width),
                                                            tensor(s.targets, s.tokens, s.experts), o);
  double worst = 0;
  for (int64_t e = 0; e < s.experts; e++) {
    double off = 0, size = 0;
    for (size_t i = z(e * s.width); i < z((e + 1) * s.width); i++) {
      off += std::pow(double(got.out[i]) - want.weight.f32()[i], 2);
      size += std::pow(double(want.weight.f32()[i]) - s.w[i], 2);
    }
    const double relative = size > 0 ? std::sqrt(off / size) : off;
    worst = relative <= worst ? worst : std::isnan(relative) ? INFINITY : relative;
  }
  char text[200];
  std::snprintf(text, sizeof text, "off by %.1e of the correction, %d iterations, loss %.4e to %.4e (%.4e to %.4e)", worst,
                got.iterations, got.loss[0], got.loss[1], want.loss_before, want.loss_after);
  report("router calibration, " + name,
         worst <= 4e-3 && std::fabs(got.loss[0] - want.loss_before) <= 1e-4 * want.loss_before &&
             std::fabs(got.loss[1] - want.loss_after) <= 1e-3 * want.loss_after + 1e-6 * want.loss_before &&
             got.loss[1] <= got.loss[0],
         text);
}

void check_router_calibration() {
  compare("top 4 of 8", streams(200, 24, 8, 1), 4, 1e-2);
  compare("all of 5", streams(140, 33, 5, 3), 5, 1e-3);
  compare("fewer tokens in a window than channels", streams(60, 40, 6, 4), 2, 1e-1);
  compare("one channel, one expert", streams(50, 1, 1, 5), 1, 1e-3);
  if (!device().slow()) {
    compare("top 8 of 60", streams(6000, 256, 60, 6), 8, 1e-3);
    compare("top 2 of 9, 130 channels", streams(40000, 130, 9, 2), 2, 1e-4);
  }

  Streams none = streams(40, 16, 4, 7);
  for (int64_t t = 0; t < none.tokens; t++) none.targets[z(t * 4 + 2)] = -100;  // expert 2 is in no window
  const Result kept = run(none, 2, 1e-3);
  device()(kept.status);
  equal("router calibration: a row in no window stays", vector<float>(kept.out.begin() + 32, kept.out.begin() + 48),
        vector<float>(none.w.begin() + 32, none.w.begin() + 48));

  const Streams empty = streams(0, 16, 4, 8);
  const Result same = run(empty, 2, 1e-3);
  device()(same.status);
  equal("router calibration: no tokens", same.out, empty.w);

  Streams bad = streams(20, 16, 4, 9);
  bad.x[100] = std::numeric_limits<float>::quiet_NaN();
  report("router calibration, NaN in the inputs: refused", run(bad, 2, 1e-3).status == Status::non_finite,
         device().table.error(device().context));
  bad = streams(20, 16, 4, 9);
  bad.targets[3] = std::numeric_limits<float>::infinity();
  const Status status = run(bad, 2, 1e-3).status;
  report("router calibration, infinite targets: refused", status == Status::non_finite, device().table.error(device().context));
}

void time_router_calibration() {
  for (const auto& [experts, channels, k] : {std::tuple<int64_t, int64_t, int64_t>{8, 4096, 4}, {60, 2048, 16}}) {
    const int64_t n = scaled(65536), width = scaled(channels);
    const Buffer<float> w(normal(z(experts * width), 1, 0.02f)), x(repeated_normal(n * width, 2)),
        targets(repeated_normal(n * experts, 3));
    const Buffer<float> out(z(experts * width));
    int32_t iterations = 0;
    double loss[2] = {};
    const CalibrateRouter args{w, x, targets, experts, width, n, k, 1e-3, 1e-5, 10, out, &iterations, loss};
    timed("router calibration, " + std::to_string(n) + " tokens, " + std::to_string(experts) + " x " + std::to_string(width) +
              ", 10 iterations",
          {.bytes = 12 * 24.0 * double(n * width)}, [&] { device()(device().table.calibrate_router(device().context, &args)); });
  }
}

const Group group("router_calibration", check_router_calibration, time_router_calibration);

}  // namespace
}  // namespace eac::cuda::check
