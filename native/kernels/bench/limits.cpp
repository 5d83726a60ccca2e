#include "kernels/bench/limits.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "core/tensor.h"
#include "core/thread_pool.h"
#include "kernels/cpu/isa.h"

namespace eac {
namespace {

constexpr int passes = 7;
constexpr int64_t steps = 1 << 13;         // of an arithmetic loop in one task: some 20 to 50 microseconds
constexpr int64_t tasks_per_thread = 400;  // short tasks, so that a thread that starts late does not lengthen a pass
constexpr size_t chunk = size_t(4) << 20;  // bytes read in one task

struct ThreadScope {
  int before = thread_count();
  explicit ThreadScope(int n) { set_thread_count(n); }
  ~ThreadScope() { set_thread_count(before); }
};

// The best rate of several passes over `tasks` tasks of `work` units each. The first pass is warm-up and does not count.
template <class F> double best_rate(int64_t tasks, double work, F body) {
  using Clock = std::chrono::steady_clock;
  double best = 0;
  for (int pass = 0; pass <= passes; pass++) {
    const auto begun = Clock::now();
    parallel_for(tasks, body);
    const double seconds = std::chrono::duration<double>(Clock::now() - begun).count();
    if (pass > 0) best = std::max(best, double(tasks) * work / seconds);
  }
  return best;
}

}  // namespace

MachineLimits measure_limits(int threads, size_t buffer_bytes) {
  const ThreadScope scope(threads);
  const Isa& level = isa();
  const LimitLoops& loops = level.limits;

  const int64_t chunks = int64_t(std::max<size_t>(1, buffer_bytes / chunk));
  const Tensor buffer = Tensor::zeros(DType::u8, {chunks * int64_t(chunk)});
  // Pages that nothing was written to are all the same page of zeros.
  parallel_for(chunks, [&](int64_t i) { std::memset(buffer.as<uint8_t>() + i * int64_t(chunk), int(i % 251) + 1, chunk); });

  MachineLimits limits{
      .read_bandwidth = 0, .fma_peak = 0, .int8_peak = 0, .buffer_bytes = buffer.bytes(), .threads = threads, .isa = level.name};
  limits.read_bandwidth = best_rate(chunks, double(chunk), [&](int64_t i) {
    int32_t sink[2] = {};
    loops.read(buffer.as<uint8_t>() + i * int64_t(chunk), int64_t(chunk), sink);
  });
  limits.fma_peak = best_rate(tasks_per_thread * threads, double(steps * loops.fma_operations), [&](int64_t) {
    float sink[2] = {};
    loops.fma(steps, sink);
  });
  limits.int8_peak = best_rate(tasks_per_thread * threads, double(steps * loops.int8_operations), [&](int64_t) {
    int32_t sink[2] = {};
    loops.int8(steps, sink);
  });
  return limits;
}

size_t default_limit_buffer() {
  const size_t memory = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE));
  return std::min(size_t(1) << 30, memory / 4);
}

}  // namespace eac
