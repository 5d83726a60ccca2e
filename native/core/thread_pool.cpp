#include "core/thread_pool.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#ifdef __linux__
#include <sched.h>
#endif

#include "core/error.h"

namespace eac {
namespace {

thread_local const std::atomic<int32_t>* cancel_flag = nullptr;

bool cancelled(const std::atomic<int32_t>* flag) { return flag && flag->load(std::memory_order_relaxed) != 0; }

struct Loop {
  FunctionRef<void(int64_t)> body;
  int64_t n;
  const std::atomic<int32_t>* cancel;
  std::atomic<bool> failed{false};
  std::exception_ptr error{};
  alignas(64) std::atomic<int64_t> next{0};

  void run() {
    const auto* outer = cancel_flag;
    cancel_flag = cancel;
    for (int64_t i; !failed.load(std::memory_order_relaxed) && (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) {
      try {
        if (cancelled(cancel)) throw Error("ABORTED", "the operation was aborted");
        body(i);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
    cancel_flag = outer;
  }
};

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Looks for `found` without sleeping: some microseconds at full attention, then, up to 100, letting whoever else wants the
// processor have it. False if it did not come.
template <class F> bool spin_until(F found) {
  using clock = std::chrono::steady_clock;
  constexpr auto attentive = std::chrono::microseconds(20), limit = std::chrono::microseconds(100);
  const auto start = clock::now();
  for (;;) {
    for (int i = 0; i < 8; i++) {
      if (found()) return true;
      pause();
    }
    const auto elapsed = clock::now() - start;
    if (elapsed > limit) return false;
    if (elapsed > attentive) std::this_thread::yield();
  }
}

int available_cpus() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n ? int(n) : 1;
}

int default_threads() {
  if (const char* s = std::getenv("EAC_MOE_THREADS"))
    if (int n = std::atoi(s); n > 0) return n;
  return available_cpus();
}

// Decoding posts a loop every few microseconds, so posting and joining one takes no lock: a loop lies in one of 64 slots, a bit of
// `open_` says that it may have iterations left, and threads that find nothing look for 100 microseconds before they sleep.
class Pool {
  // A helper counts itself in before it looks at `loop`; the owner takes `loop` away before it looks at `helpers`. Both in sequentially
  // consistent order: so either the helper finds nothing, or the owner waits for it. (A slot outlives its loops.)
  struct alignas(64) Slot {
    std::atomic<Loop*> loop{nullptr};
    std::atomic<int> helpers{0};
  };
  static constexpr int slot_count = 64;
  Slot slots_[slot_count];
  alignas(64) std::atomic<uint64_t> open_{0};
  alignas(64) std::atomic<uint64_t> taken_{0};
  std::atomic<int> count_{default_threads()}, started_{0}, sleepers_{0};
  const int cpus_ = available_cpus();
  std::mutex mutex_;
  std::condition_variable work_, enabled_;  // work_: for those below the thread count; enabled_: for the others

  void worker(int id) {
    for (;;) {
      if (id >= count_.load(std::memory_order_relaxed)) {
        std::unique_lock lock(mutex_);
        enabled_.wait(lock, [&] { return id < count_.load(); });
      } else if (const uint64_t open = open_.load()) {
        help(std::countr_zero(open));
      } else if (!spin([&] { return open_.load(std::memory_order_relaxed) != 0; })) {
        std::unique_lock lock(mutex_);
        sleepers_.fetch_add(1);  // before the last look at open_, as post() opens before it looks for sleepers
        work_.wait(lock, [&] { return open_.load() != 0 || id >= count_.load(); });
        sleepers_.fetch_sub(1);
      }
    }
  }

  // With more threads than processors, looking around would only keep others from working.
  template <class F> bool spin(F found) { return count_.load(std::memory_order_relaxed) <= cpus_ ? spin_until(found) : found(); }

  void help(int slot) {
    Slot& s = slots_[slot];
    s.helpers.fetch_add(1);
    if (Loop* loop = s.loop.load()) {
      loop->run();
      close(slot);
    }
    if (s.helpers.fetch_sub(1) == 1) s.helpers.notify_one();
  }

  void close(int slot) {
    const uint64_t bit = uint64_t(1) << slot;
    if (open_.load(std::memory_order_relaxed) & bit) open_.fetch_and(~bit);
  }

  // A free slot, or -1.
  int take_slot() {
    uint64_t taken = taken_.load(std::memory_order_relaxed);
    while (~taken) {
      const int slot = std::countr_one(taken);
      if (taken_.compare_exchange_weak(taken, taken | uint64_t(1) << slot)) return slot;
    }
    return -1;
  }

  void post(Loop& loop, int slot) {
    if (started_.load(std::memory_order_relaxed) < count() - 1) start_threads();
    slots_[slot].loop.store(&loop);
    open_.fetch_or(uint64_t(1) << slot);
    int64_t wake = std::min<int64_t>(sleepers_.load(), loop.n - 1);
    if (wake == 0) return;
    { std::lock_guard lock(mutex_); }  // a thread between its last look and its sleep holds the lock
    while (wake-- > 0) work_.notify_one();
  }

  void start_threads() {
    std::lock_guard lock(mutex_);
    try {
      for (int id = started_.load() + 1; id < count(); id++, started_.fetch_add(1))
        std::thread([this, id] { worker(id); }).detach();
    } catch (const std::system_error&) {  // the system gives no more threads: loops run on those that there are
    }
  }

 public:
  int count() const { return count_.load(std::memory_order_relaxed); }
  void set_count(int n) {
    {
      std::lock_guard lock(mutex_);
      count_.store(n < 1 ? 1 : n);
    }
    enabled_.notify_all();
    work_.notify_all();
  }

  void run(Loop& loop) {
    const int slot = loop.n == 1 || count() == 1 ? -1 : take_slot();
    if (slot < 0) {
      loop.run();
    } else {
      post(loop, slot);
      loop.run();
      close(slot);
      // The helpers are in their last iterations.
      Slot& s = slots_[slot];
      s.loop.store(nullptr);
      if (!spin([&] { return s.helpers.load() == 0; }))
        for (int n; (n = s.helpers.load()) != 0;) s.helpers.wait(n);
      taken_.fetch_and(~(uint64_t(1) << slot));
    }
    if (loop.error) std::rethrow_exception(loop.error);
  }
};

// Leaked on purpose: its threads may still wait when the process (or the worker that loaded us) ends.
Pool& pool() {
  static Pool* p = new Pool;
  return *p;
}

}  // namespace

int thread_count() { return pool().count(); }
void set_thread_count(int n) { pool().set_count(n); }

void parallel_for(int64_t n, FunctionRef<void(int64_t)> body) {
  if (n <= 0) return;
  Loop loop{.body = body, .n = n, .cancel = cancel_flag};
  pool().run(loop);
}

CancelScope::CancelScope(const std::atomic<int32_t>* flag) : previous_(cancel_flag) { cancel_flag = flag; }
CancelScope::~CancelScope() { cancel_flag = previous_; }
void throw_if_cancelled() {
  if (cancelled(cancel_flag)) throw Error("ABORTED", "the operation was aborted");
}

}  // namespace eac
