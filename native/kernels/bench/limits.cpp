#include "kernels/bench/limits.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "core/tensor.h"
#include "core/thread_pool.h"
#include "kernels/cpu/isa.h"

namespace eac {
namespace {

// Passes take some ten milliseconds: of many short ones, some are not disturbed by what else runs.
constexpr int passes = 40;
constexpr double task_seconds = 50e-6;  // of arithmetic
constexpr int64_t tasks_per_thread = 100;
constexpr size_t chunk = size_t(4) << 20;       // bytes read in one task
constexpr size_t pass_bytes = size_t(1) << 28;  // read in one pass; the next one reads the bytes that follow

struct ThreadScope {
  int before = thread_count();
  explicit ThreadScope(int n) { set_thread_count(n); }
  ~ThreadScope() { set_thread_count(before); }
};

template <class F> double seconds_of(F body) {
  const auto begun = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
}

// The best rate of several passes over `tasks` tasks of `work` units each: body(pass, task). The first pass is warm-up and does not count.
template <class F> double best_rate(int64_t tasks, double work, F body) {
  double best = 0;
  for (int pass = 0; pass <= passes; pass++) {
    const double seconds = seconds_of([&] { parallel_for(tasks, [&](int64_t i) { body(pass, i); }); });
    if (pass > 0) best = std::max(best, double(tasks) * work / seconds);
  }
  return best;
}

// The peak of an arithmetic loop, in operations a second.
template <class T> double peak(void (*loop)(int64_t, T*), int64_t operations) {
  const auto task = [loop](int64_t steps) {
    T sink[2] = {};
    loop(steps, sink);
  };
  int64_t steps = 64;
  while (seconds_of([&] { task(steps); }) < task_seconds) steps *= 2;
  return best_rate(tasks_per_thread * thread_count(), double(steps * operations), [&](int, int64_t) { task(steps); });
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
  const int64_t pass_chunks = std::min<int64_t>(chunks, int64_t(pass_bytes / chunk));
  limits.read_bandwidth = best_rate(pass_chunks, double(chunk), [&](int pass, int64_t i) {
    int32_t sink[2] = {};
    loops.read(buffer.as<uint8_t>() + (pass * pass_chunks + i) % chunks * int64_t(chunk), int64_t(chunk), sink);
  });
  limits.fma_peak = peak(loops.fma, loops.fma_operations);
  limits.int8_peak = peak(loops.int8, loops.int8_operations);
  return limits;
}

size_t default_limit_buffer() {
  const size_t memory = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE));
  return std::min(size_t(1) << 30, memory / 4);
}

}  // namespace eac
