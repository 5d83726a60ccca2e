#include "kernels/bench/limits.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "core/error.h"
#include "core/thread_pool.h"
#include "kernels/cpu/isa.h"

namespace eac {
namespace {

constexpr double task_seconds = 50e-6;  // of arithmetic
constexpr int64_t tasks_per_thread = 100;
constexpr size_t chunk = size_t(4) << 20;       // bytes read in one task
constexpr size_t pass_bytes = size_t(1) << 28;  // read in one pass

template <class F> double seconds_of(F body) {
  const auto begun = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
}

// The rate of `tasks` tasks of `work` units each on the pool.
template <class F> double rate(int64_t tasks, double work, F body) {
  return double(tasks) * work / seconds_of([&] { parallel_for(tasks, body); });
}

// That of an arithmetic loop, in operations a second.
template <class T> double peak(void (*loop)(int64_t, T*), int64_t operations) {
  const auto task = [loop](int64_t steps) {
    T sink[2] = {};
    loop(steps, sink);
  };
  int64_t steps = 64;
  while (seconds_of([&] { task(steps); }) < task_seconds) steps *= 2;
  return rate(tasks_per_thread * thread_count(), double(steps * operations), [&](int64_t) { task(steps); });
}

}  // namespace

Tensor limit_buffer(size_t bytes) {
  if (bytes == 0) bytes = std::min(size_t(1) << 30, size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE)) / 4);
  const int64_t chunks = int64_t(std::max<size_t>(1, bytes / chunk));
  Tensor buffer = Tensor::zeros(DType::u8, {chunks * int64_t(chunk)});
  // Pages that nothing was written to are all the same page of zeros.
  parallel_for(chunks, [&](int64_t i) { std::memset(buffer.as<uint8_t>() + i * int64_t(chunk), int(i % 251) + 1, chunk); });
  return buffer;
}

MachineRates limit_pass(const Tensor& buffer, int64_t pass) {
  const LimitLoops& loops = isa().limits;
  const int64_t chunks = int64_t(buffer.bytes() / chunk), read = std::min<int64_t>(chunks, int64_t(pass_bytes / chunk));
  require(chunks > 0, "the buffer must have at least 4 MiB");
  return {
      .read_bandwidth = rate(read, double(chunk),
                             [&](int64_t i) {
                               int32_t sink[2] = {};
                               loops.read(buffer.as<uint8_t>() + (pass * read + i) % chunks * int64_t(chunk), int64_t(chunk),
                                          sink);
                             }),
      .fma_peak = peak(loops.fma, loops.fma_operations),
      .int8_peak = peak(loops.int8, loops.int8_operations),
  };
}

}  // namespace eac
