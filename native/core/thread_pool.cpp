#include "core/thread_pool.h"

#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>
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
  std::atomic<int64_t> next{0};
  std::atomic<int> helpers{0};  // pool threads inside run(); the loop lives on the caller's stack until this is 0
  std::atomic<bool> failed{false};
  std::exception_ptr error{};

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
  bool exhausted() const { return failed.load(std::memory_order_relaxed) || next.load(std::memory_order_relaxed) >= n; }
};

constexpr int spins = 400;  // some 10 microseconds

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int default_threads() {
  if (const char* s = std::getenv("EAC_MOE_THREADS"))
    if (int n = std::atoi(s); n > 0) return n;
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n ? int(n) : 1;
}

class Pool {
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<Loop*> loops_;         // loops that may still have iterations to hand out
  std::atomic<uint64_t> posted_{0};  // bumped at every new loop, so that idle threads can spin on it briefly
  int started_ = 0;
  std::atomic<int> count_{default_threads()};

  // Under the lock: a loop with work left, or null.
  Loop* pick() {
    for (Loop* l : loops_)
      if (!l->exhausted()) return l;
    return nullptr;
  }

  void worker(int id) {
    for (;;) {
      Loop* loop = nullptr;
      {
        std::unique_lock lock(mutex_);
        if (id < count_.load() && (loop = pick())) loop->helpers.fetch_add(1);
      }
      if (loop) {
        loop->run();
        loop->helpers.fetch_sub(1, std::memory_order_release);
        continue;
      }
      // Decoding posts many short loops in a row: look around for some microseconds before going to sleep.
      const uint64_t seen = posted_.load();
      bool again = false;
      for (int spin = 0; spin < spins && !again; spin++) {
        again = posted_.load(std::memory_order_relaxed) != seen;
        pause();
      }
      if (again) continue;
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return posted_.load() != seen || (id < count_.load() && pick()); });
    }
  }

 public:
  int count() const { return count_.load(); }
  void set_count(int n) { count_.store(n < 1 ? 1 : n); }

  void run(Loop& loop) {
    {
      std::lock_guard lock(mutex_);
      for (; started_ < count_.load() - 1; started_++) std::thread([this, id = started_ + 1] { worker(id); }).detach();
      loops_.push_back(&loop);
      posted_.fetch_add(1);
    }
    wake_.notify_all();
    loop.run();
    {
      std::lock_guard lock(mutex_);
      std::erase(loops_, &loop);
    }
    // The helpers are in their last iterations; on a busy machine one may have lost its processor: then let it have ours.
    for (int spin = 0; loop.helpers.load(std::memory_order_acquire) != 0; spin++) {
      if (spin < spins)
        pause();
      else
        std::this_thread::yield();
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
  if (n == 1 || thread_count() == 1) {
    loop.run();
    if (loop.error) std::rethrow_exception(loop.error);
  } else {
    pool().run(loop);
  }
}

CancelScope::CancelScope(const std::atomic<int32_t>* flag) : previous_(cancel_flag) { cancel_flag = flag; }
CancelScope::~CancelScope() { cancel_flag = previous_; }
void throw_if_cancelled() {
  if (cancelled(cancel_flag)) throw Error("ABORTED", "the operation was aborted");
}

}  // namespace eac
