// Runs every operation of the CUDA library against the scalar references of the CPU kernels on random shapes, then (--time, --time-only) measures them.
// Exits non-zero on any mismatch. scripts/cuda/check builds and runs it; --loads: see timing.h.
#include "cuda/check.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cuda/timing.h"

namespace eac::cuda::check {
namespace {

int failures = 0, passed = 0;

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
  if (before_hopper_) table.close(before_hopper_);
}
void Device::each_path(const std::function<void(const std::string& path)>& f) {
  f("");
  if (info.major != 9) return;
  if (!before_hopper_) {
    const char* const features[] = {"EAC_MOE_CUDA_WGMMA", "EAC_MOE_CUDA_OVERLAP"};
    for (const char* f : features) setenv(f, "0", 1);
    (*this)(table.open(0, &before_hopper_));
    for (const char* f : features) unsetenv(f);
  }
  synchronize();  // the paths' streams do not wait for each other
  std::swap(context, before_hopper_);
  f(", before Hopper");
  synchronize();
  std::swap(context, before_hopper_);
}
void Device::operator()(Status status) const {
  if (status != Status::ok) throw std::runtime_error(context ? table.error(context) : "the device could not be opened");
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
  const std::vector<float> some = normal(size_t(std::min<int64_t>(n, 1000003)), seed);
  std::vector<float> v(static_cast<size_t>(n));
  for (size_t i = 0; i < v.size(); i += some.size())
    std::copy_n(some.begin(), std::min(some.size(), v.size() - i), v.begin() + long(i));
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

namespace {

// An exception is a failure of its group; the others go on.
void attempt(const std::string& name, void (*f)()) {
  try {
    f();
    device().synchronize();
  } catch (const std::exception& e) { report(name, false, e.what()); }
}

int main_of(int argc, char** argv) {
  bool checks = true, times = false;
  std::vector<std::string> only;
  for (int i = 1; i < argc; i++) {
    if (!std::strcmp(argv[i], "--time"))
      times = true;
    else if (!std::strcmp(argv[i], "--time-only"))
      times = true, checks = false;
    else if (!std::strcmp(argv[i], "--loads"))
      return print_loads(), 0;
    else
      only.push_back(argv[i]);
  }
  std::sort(groups().begin(), groups().end(), [](const Entry& a, const Entry& b) { return a.name < b.name; });
  const auto wanted = [&](const Entry& g) { return only.empty() || std::count(only.begin(), only.end(), g.name) > 0; };
  std::printf("%s, compute capability %d.%d, %d multiprocessors, %.1f GB\n", device().info.name, device().info.major,
              device().info.minor, device().info.multiprocessors, double(device().info.total_memory) / 1e9);
  for (const Entry& g : groups())
    if (checks && wanted(g)) attempt(g.name, g.check);
  if (checks) std::printf("%d passed, %d failed\n", passed, failures);
  if (failures == 0 && times) {
    measure_limits();
    for (const Entry& g : groups())
      if (wanted(g)) attempt(g.name + ", times", g.time);
    print_summary();
  }
  return failures == 0 && (passed > 0 || !checks) ? 0 : 1;
}

}  // namespace
}  // namespace eac::cuda::check

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what was printed stays where the run is ended
  try {
    return eac::cuda::check::main_of(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
