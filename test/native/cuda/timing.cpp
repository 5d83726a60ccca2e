#include "cuda/timing.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <numeric>
#include <sstream>

#include "cuda/weights.h"

namespace eac::cuda::check {
namespace {

constexpr double nan = std::numeric_limits<double>::quiet_NaN();
constexpr double sample_seconds = 0.02;
// Several times the L2 of an H200 (50 MB), twice that of a B200.
constexpr double far_apart = 256e6;
// Enough that the start of a graph does not count.
constexpr int64_t calls_of_a_graph = 32;

double copy_bandwidth = nan;

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Seconds of `n` queued calls, until the last one is done.
double run(const std::function<void()>& call, int64_t n) {
  const double begin = seconds();
  for (int64_t i = 0; i < n; i++) call();
  device().synchronize();
  return seconds() - begin;
}

// How many calls a sample takes.
int64_t calls_of_a_sample(const std::function<void()>& call) {
  if (device().emulated()) return 1;
  run(call, 1);
  for (int64_t n = 1;;) {
    const double t = run(call, n);
    if (t >= sample_seconds) return n;
    n = int64_t(std::ceil(double(n) * std::clamp(1.1 * sample_seconds / t, 1.5, 50.0)));
  }
}

// Operands 0, 1, ... in turn, each at least once, as one graph.
class Recorded {
 public:
  Recorded(int64_t operands, const std::function<void(int64_t)>& call) : calls_(operands) {
    if (!device().emulated()) calls_ = (calls_of_a_graph + operands - 1) / operands * operands;
    for (int64_t i = 0; i < operands; i++) call(i);  // scratch memory grows
    device().synchronize();
    const Table& t = device().table;
    device()(t.begin_capture(device().context));
    try {
      for (int64_t i = 0; i < calls_; i++) call(i % operands);
    } catch (...) {
      if (t.end_capture(device().context, &graph_) == Status::ok) t.free_graph(graph_);
      throw;
    }
    device()(t.end_capture(device().context, &graph_));
  }
  Recorded(const Recorded&) = delete;
  ~Recorded() { device().table.free_graph(graph_); }
  void launch() const { device()(device().table.launch(device().context, graph_)); }
  int64_t calls() const { return calls_; }

 private:
  int64_t calls_;
  Graph* graph_ = nullptr;
};

Timing print(const std::string& name, const Cost& cost, double t) {
  const double rate = pytorch("rate");
  std::printf("%-80s %10.1f us", name.c_str(), t * 1e6);
  if (cost.bytes > 0) std::printf("  %7.0f GB/s (%3.0f %% of copy)", cost.bytes / t / 1e9, 100 * cost.bytes / t / copy_bandwidth);
  if (cost.operations > 0) {
    std::printf("  %7.1f TFLOP/s", cost.operations / t / 1e12);
    if (rate > 0) std::printf(" (%3.0f %% of bf16)", 100 * cost.operations / t / rate);
  }
  std::printf("\n");
  return {t, cost.bytes > 0 ? cost.bytes / t / copy_bandwidth : cost.operations / t / rate};
}

struct Line {
  std::string name, values, limits;
  bool missing = false, missed = false;
};
std::vector<Line>& summary() {
  static std::vector<Line> all;
  return all;
}

std::string text(double value) {
  char s[32];
  std::snprintf(s, sizeof s, std::fabs(value) < 100 ? "%.3g" : "%.0f", value);
  return std::isnan(value) ? "?" : s;
}
void append(std::string& list, const std::string& value) { list += (list.empty() ? "" : ", ") + value; }
const char* verdict(bool missing, bool missed) { return missed ? "MISSED" : missing ? "not measured" : "met"; }

}  // namespace

int64_t scaled(int64_t n) { return device().emulated() ? std::min(n, (n + 2047) / 2048 * 32) : n; }

int64_t operands_of(double bytes) {
  const int64_t enough = 1 + int64_t(std::ceil(far_apart / bytes));
  return device().emulated() ? std::min<int64_t>(enough, 2) : enough;
}

std::vector<double> time_in_turn(const std::vector<std::function<void()>>& calls) {
  std::vector<int64_t> counts;
  for (const auto& call : calls) counts.push_back(calls_of_a_sample(call));
  std::vector<std::vector<double>> samples(calls.size());
  double spent = 0;
  const size_t count = device().emulated() ? 1 : 7;
  // Three are enough where one takes a second.
  for (size_t s = 0; s < count && (s < 3 || spent < 3.0 * double(calls.size())); s++)
    for (size_t i = 0; i < calls.size(); i++) {
      const double t = run(calls[i], counts[i]);
      samples[i].push_back(t / double(counts[i])), spent += t;
    }
  std::vector<double> medians;
  for (auto& of : samples) std::sort(of.begin(), of.end()), medians.push_back(of[of.size() / 2]);
  return medians;
}

Timing timed(const std::string& name, const Cost& cost, const std::function<void()>& call) {
  return print(name, cost, time_in_turn({call})[0]);
}

Timing timed_recorded(const std::string& name, const Cost& cost, int64_t operands, const std::function<void(int64_t)>& call) {
  const Recorded graph(operands, call);
  return print(name, cost, time_in_turn({[&] { graph.launch(); }})[0] / double(graph.calls()));
}

void judge(const std::string& line, double value, const Goal& goal) {
  const bool missing = std::isnan(value) || device().emulated();
  const bool missed = !missing && (goal.kind == Goal::below ? value >= goal.limit : value < goal.limit);
  const std::string limit = (goal.kind == Goal::below ? "< " : ">= ") + text(goal.limit);
  std::printf("    %s: %s, asked %s: %s\n", line.c_str(), text(value).c_str(), limit.c_str(), verdict(missing, missed));
  auto at = std::find_if(summary().begin(), summary().end(), [&](const Line& l) { return l.name == line; });
  if (at == summary().end()) at = summary().insert(at, {line, "", "", false, false});
  append(at->values, text(value));
  if (!at->limits.ends_with(limit)) append(at->limits, limit);
  at->missing |= missing, at->missed |= missed;
}

void print_summary() {
  if (summary().empty()) return;
  std::printf("\n%-72s %-20s %-16s\n", "Must show", "measured", "asked");
  for (const Line& l : summary())
    std::printf("%-72s %-20s %-16s %s\n", l.name.c_str(), l.values.c_str(), l.limits.c_str(), verdict(l.missing, l.missed));
}

std::vector<int32_t> uniform_choices(int64_t tokens, int64_t experts, int64_t top_k, unsigned seed) {
  std::mt19937 gen(seed);
  std::vector<int32_t> deck(static_cast<size_t>(experts)), chosen;
  std::iota(deck.begin(), deck.end(), 0);
  for (int64_t t = 0; t < tokens; t++) {
    std::shuffle(deck.begin(), deck.end(), gen);
    chosen.insert(chosen.end(), deck.begin(), deck.begin() + top_k);
  }
  return chosen;
}

void print_loads() {
  for (const int64_t tokens : {512, 4096}) {
    std::vector<int> counts(8);
    for (const int32_t e : uniform_choices(tokens, 8, 2, 0)) counts[size_t(e)]++;
    std::printf("%d", int(tokens));
    for (const int count : counts) std::printf(" %d", count);
    std::printf("\n");
  }
}

void measure_limits() {
  const size_t n = size_t(scaled(int64_t(1) << 30));
  const std::vector<float> some = repeated_normal(int64_t(n / sizeof(float)), 1);
  const Buffer<float> from(some), to(some.size());
  const double t = time_in_turn({[&] { device()(device().table.copy(device().context, to, from, n)); }})[0];
  copy_bandwidth = 2.0 * double(n) / t;
  std::printf(
      "\nTimes: medians of seven samples of 20 ms. What decoding does is recorded as graphs, weights and caches come from "
      "memory.\n");
  std::printf("copy bandwidth %.0f GB/s (%.0f MB read and as much written), bf16 matrix rate %s TFLOP/s (PyTorch)\n",
              copy_bandwidth / 1e9, double(n) / 1e6, text(pytorch("rate") / 1e12).c_str());
}

double pytorch(const std::string& name) {
  const char* found = std::getenv("EAC_MOE_PYTORCH");
  std::istringstream in(found ? found : "");
  double value = nan;
  for (std::string key; in >> key >> value;)
    if (key == name) return value;
  return nan;
}

}  // namespace eac::cuda::check
