// The thread pool: every iteration once, results visible to the caller, loops inside loops and from many callers at a time.
#include "core/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <numeric>
#include <thread>

#include "harness.h"

using namespace eac;
using namespace eac::test;

namespace {

void every_iteration_once() {
  for (const int threads : {1, 2, 5}) {
    set_thread_count(threads);
    for (const int64_t n : {0, 1, 2, 3, 64, 1000})
      for (int round = 0; round < 50; round++) {
        std::vector<int> hits(size_t(n), 0);  // plain memory: only the loop orders these writes before the sum
        parallel_for(n, [&](int64_t i) { hits[size_t(i)]++; });
        check(std::accumulate(hits.begin(), hits.end(), int64_t(0)) == n && std::count(hits.begin(), hits.end(), 1) == n,
              std::to_string(n) + " iterations on " + std::to_string(threads) + " threads");
      }
  }
}

// Sleeping helpers must be woken, busy ones waited for.
void after_a_rest() {
  set_thread_count(4);
  for (const int rest_us : {0, 50, 300, 2000})
    for (int round = 0; round < 10; round++) {
      std::this_thread::sleep_for(std::chrono::microseconds(rest_us));
      std::vector<int> hits(8, 0);
      parallel_for(8, [&](int64_t i) {
        if (i % 2) std::this_thread::sleep_for(std::chrono::microseconds(200));  // longer than anyone looks around
        hits[size_t(i)] = 1;
      });
      check(std::count(hits.begin(), hits.end(), 1) == 8, "after a rest of " + std::to_string(rest_us) + " us");
    }
}

void helpers_take_part() {
  set_thread_count(2);
  std::atomic<int> inside{0};
  // Each iteration waits until both are running: without a helper this would never end.
  for (int round = 0; round < 20; round++) {
    inside = 0;
    parallel_for(2, [&](int64_t) {
      inside++;
      while (inside < 2) std::this_thread::yield();
    });
    std::this_thread::sleep_for(std::chrono::microseconds(round % 4 * 100));
  }
}

int64_t nested_sum(int depth) {
  std::vector<int64_t> parts(4, 1);
  if (depth > 0) parallel_for(4, [&](int64_t i) { parts[size_t(i)] = nested_sum(depth - 1); });
  return std::accumulate(parts.begin(), parts.end(), int64_t(0));
}

void loops_inside_loops() {
  for (const int threads : {2, 6}) {
    set_thread_count(threads);
    check(nested_sum(4) == 1024, "nested loops");
  }
}

// More callers than the pool keeps loops for; the thread count changes meanwhile.
void many_callers() {
  set_thread_count(3);
  constexpr int callers = 80;
  std::vector<int64_t> sums(callers, 0);
  std::vector<std::thread> threads;
  for (int c = 0; c < callers; c++)
    threads.emplace_back([&, c] {
      for (int round = 0; round < 20; round++) {
        std::vector<int64_t> parts(10, 0);
        parallel_for(10, [&](int64_t i) { parts[size_t(i)] = i; });
        sums[size_t(c)] += std::accumulate(parts.begin(), parts.end(), int64_t(0));
      }
    });
  for (const int n : {1, 4, 2, 5, 3}) {
    set_thread_count(n);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  for (std::thread& t : threads) t.join();
  check(std::count(sums.begin(), sums.end(), 20 * 45) == callers, "many callers");
}

void errors_reach_the_caller() {
  for (const int threads : {1, 4}) {
    set_thread_count(threads);
    for (const int64_t bad : {0, 17, 99})
      check(error_code([&] {
              parallel_for(100, [&](int64_t i) {
                if (i == bad) throw Error("BROKEN", "iteration " + std::to_string(i));
              });
            }) == "BROKEN",
            "an exception of iteration " + std::to_string(bad));
    std::atomic<int32_t> flag{0};
    std::atomic<int> done{0};
    const CancelScope scope(&flag);
    check(error_code([&] {
            parallel_for(1000, [&](int64_t i) {
              if (i == 5) flag = 1;
              parallel_for(2, [&](int64_t) { done++; });  // a nested loop inherits the flag
            });
          }) == "ABORTED" &&
              done < 2000,
          "cancelled");
  }
}

}  // namespace

int main() {
  run("every iteration once", every_iteration_once);
  run("after a rest", after_a_rest);
  run("helpers take part", helpers_take_part);
  run("loops inside loops", loops_inside_loops);
  run("many callers at a time", many_callers);
  run("errors and cancellation reach the caller", errors_reach_the_caller);
  return failures ? 1 : 0;
}
