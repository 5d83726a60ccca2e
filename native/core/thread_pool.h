// One pool of threads for the whole process. The calling thread is worker 0, so a pool of 1 starts no thread.
// Several callers may run loops at the same time. Kernels split their work so that each output element is computed
// by one iteration in a fixed order: results never depend on the number of threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>

namespace eac {

// A non-owning callable reference: no allocation per loop.
template <class F> class FunctionRef;
template <class R, class... A> class FunctionRef<R(A...)> {
  void* object_;
  R (*call_)(void*, A...);

 public:
  template <class F> FunctionRef(F&& f)  // NOLINT: implicit on purpose
      : object_((void*)&f), call_([](void* o, A... a) -> R { return (*static_cast<std::remove_reference_t<F>*>(o))(a...); }) {}
  R operator()(A... a) const { return call_(object_, a...); }
};

// The number of threads that loops use, the caller included. Default: EAC_MOE_THREADS, else the CPUs this process may use.
int thread_count();
void set_thread_count(int n);

// Calls body(i) for every i in [0, n), in any order, on several threads; returns when all are done. The first exception
// thrown by a body is rethrown here. Throws Error("ABORTED") if the cancellation flag of the calling job is raised.
void parallel_for(int64_t n, FunctionRef<void(int64_t)> body);
// body(i) for i in [0, n), `step` in a row a task: for bodies that are short.
template <class F> void parallel_rows(int64_t n, int64_t step, F&& body) {
  parallel_for((n + step - 1) / step, [&](int64_t task) {
    const int64_t end = n < (task + 1) * step ? n : (task + 1) * step;
    for (int64_t i = task * step; i < end; i++) body(i);
  });
}

// Cancellation: a job installs its flag on the thread that runs it; parallel_for polls it between iterations.
class CancelScope {
  const std::atomic<int32_t>* previous_;

 public:
  explicit CancelScope(const std::atomic<int32_t>* flag);
  ~CancelScope();
  CancelScope(const CancelScope&) = delete;
};
void throw_if_cancelled();

}  // namespace eac
