// Runs every operation of the CUDA library against the scalar references of the CPU kernels on random shapes, then (--time) measures them.
// Exits non-zero on any mismatch. scripts/cuda/check builds and runs it.
#include "cuda/check.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>

namespace eac::cuda::check {
namespace {

int failures = 0, passed = 0;
struct Limits {
  double copy_bandwidth = 0, matrix_rate = 0;
} limits;

struct Entry {
  std::string name;
  void (*check)();
  void (*time)();
};
// In the order of their names, whichever file was linked first.
std::vector<Entry>& groups() {
  static std::vector<Entry> all;
  return all;
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

Group::Group(const char* name, void (*check)(), void (*time)()) { groups().push_back({name, check, time}); }

Device::Device() : table(*eac_moe_cuda()) {
  char why[256] = "";
  if (table.probe(why, sizeof why) < 1) throw std::runtime_error(std::string("no GPU: ") + why);
  (*this)(table.open(0, &context));
  (*this)(table.describe(0, &info));
}
Device::~Device() {
  table.close(context);
  if (without_wgmma_) table.close(without_wgmma_);
}
void Device::each_path(const std::function<void(const std::string& path)>& f) {
  f("");
  if (info.major != 9) return;
  if (!without_wgmma_) {
    setenv("EAC_MOE_CUDA_WGMMA", "0", 1);
    (*this)(table.open(0, &without_wgmma_));
    unsetenv("EAC_MOE_CUDA_WGMMA");
  }
  synchronize();  // the paths' streams do not wait for each other
  std::swap(context, without_wgmma_);
  f(", mma.sync");
  synchronize();
  std::swap(context, without_wgmma_);
}
void Device::operator()(Status status) const {
  if (status != Status::ok) throw std::runtime_error(context ? table.error(context) : "the device could not be opened");
}
double Device::time(const std::function<void()>& f) const {
  f();
  synchronize();
  const double once = [&] {
    const double t = seconds();
    f();
    synchronize();
    return seconds() - t;
  }();
  const int calls = std::clamp(int(0.02 / std::max(once, 1e-6)), 1, 2000);
  std::vector<double> samples;
  for (int s = 0; s < 7; s++) {
    const double t = seconds();
    for (int i = 0; i < calls; i++) f();
    synchronize();
    samples.push_back((seconds() - t) / calls);
  }
  std::nth_element(samples.begin(), samples.begin() + 3, samples.end());
  return samples[3];
}
Device& device() {
  static Device d;
  return d;
}

Sequences::Sequences(const std::vector<int32_t>& lengths, const std::vector<int32_t>& starts) : length(lengths) {
  for (size_t s = 0; s < lengths.size(); s++) {
    begin.push_back(int32_t(row_sequence.size()));
    for (int32_t i = 0; i < lengths[s]; i++) row_sequence.push_back(int32_t(s)), row_position.push_back(starts[s] + i);
    batch.longest = std::max<int64_t>(batch.longest, lengths[s]);
    batch.deepest = std::max<int64_t>(batch.deepest, starts[s] + lengths[s]);
  }
  for (const auto* v : {&row_sequence, &row_position, &begin, &length}) memory_.emplace_back(*v);
  batch.rows = int64_t(row_sequence.size()), batch.sequences = int64_t(lengths.size());
  batch.sequence = memory_[0], batch.position = memory_[1], batch.begin = memory_[2], batch.length = memory_[3];
}

std::vector<float> normal(size_t n, unsigned seed, float scale) {
  std::mt19937 gen(seed);
  std::normal_distribution<float> d(0, scale);
  std::vector<float> v(n);
  for (float& x : v) x = d(gen);
  return v;
}

std::vector<float> repeated_normal(int64_t n, unsigned seed) {
  const std::vector<float> some = normal(1000003, seed);
  std::vector<float> v(static_cast<size_t>(n));
  for (size_t i = 0; i < v.size(); i++) v[i] = some[i % some.size()];
  return v;
}

void report(const std::string& name, bool ok, const std::string& what) {
  (ok ? passed : failures)++;
  std::printf("%-8s %-72s %s\n", ok ? "ok" : "MISMATCH", name.c_str(), what.c_str());
}

void close(const std::string& name, const std::vector<float>& got, const std::vector<double>& want, double tolerance) {
  double worst = 0;
  size_t at = 0;
  for (size_t i = 0; i < want.size(); i++) {
    const double error = std::fabs(double(got[i]) - want[i]) / (1 + std::fabs(want[i]));
    if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error, at = i;
  }
  char text[160];
  std::snprintf(text, sizeof text, "largest error %.2e (limit %.1e) at %zu: %g, expected %g", worst, tolerance, at,
                at < got.size() ? double(got[at]) : 0, at < want.size() ? want[at] : 0);
  report(name, got.size() == want.size() && worst <= tolerance, text);
}

void timed(const std::string& name, const Cost& cost, const std::function<void()>& f) {
  const double t = device().time(f);
  std::printf("%-80s %10.1f us", name.c_str(), t * 1e6);
  if (cost.bytes > 0)
    std::printf("  %7.0f GB/s (%3.0f %% of copy)", cost.bytes / t / 1e9, 100 * cost.bytes / t / limits.copy_bandwidth);
  if (cost.operations > 0) {
    std::printf("  %7.1f TFLOP/s", cost.operations / t / 1e12);
    if (limits.matrix_rate > 0) std::printf(" (%3.0f %% of bf16)", 100 * cost.operations / t / limits.matrix_rate);
  }
  std::printf("\n");
}

namespace {

void measure_limits() {
  const size_t n = size_t(1) << 30;
  const Buffer<char> from(n), to(n);
  const double t = device().time([&] { device()(device().table.copy(device().context, to, from, n)); });
  limits.copy_bandwidth = 2.0 * double(n) / t;
  // The matrix rate comes from scripts/cuda/check, which asks PyTorch where it is installed.
  if (const char* rate = std::getenv("EAC_MOE_MATRIX_RATE")) limits.matrix_rate = std::atof(rate);
  std::printf("copy bandwidth %.0f GB/s, bf16 matrix rate %.0f TFLOP/s\n", limits.copy_bandwidth / 1e9,
              limits.matrix_rate / 1e12);
}

int main_of(int argc, char** argv) {
  bool times = false;
  std::vector<std::string> only;
  for (int i = 1; i < argc; i++) {
    if (!std::strcmp(argv[i], "--time"))
      times = true;
    else
      only.push_back(argv[i]);
  }
  std::sort(groups().begin(), groups().end(), [](const Entry& a, const Entry& b) { return a.name < b.name; });
  const auto wanted = [&](const Entry& g) { return only.empty() || std::count(only.begin(), only.end(), g.name) > 0; };
  std::printf("%s, compute capability %d.%d, %d multiprocessors, %.1f GB\n", device().info.name, device().info.major,
              device().info.minor, device().info.multiprocessors, double(device().info.total_memory) / 1e9);
  for (const Entry& g : groups()) {
    if (!wanted(g)) continue;
    try {
      g.check();
      device().synchronize();
    } catch (const std::exception& e) { report(g.name, false, e.what()); }
  }
  std::printf("%d passed, %d failed\n", passed, failures);
  if (failures == 0 && times) {
    measure_limits();
    for (const Entry& g : groups())
      if (wanted(g)) g.time();
  }
  return failures == 0 && passed > 0 ? 0 : 1;
}

}  // namespace
}  // namespace eac::cuda::check

int main(int argc, char** argv) {
  try {
    return eac::cuda::check::main_of(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
