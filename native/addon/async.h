// Runs a computation on a libuv worker (which fans out to our own pool) and settles a promise with its result.
// Native errors cross as plain objects { code, message }; lib/native.ts makes them EacMoeError.
#pragma once
#define NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS
#include <napi.h>

#include <atomic>
#include <memory>
#include <new>
#include <optional>
#include <set>

#include "core/error.h"
#include "core/thread_pool.h"

namespace eac::addon {

// What one JavaScript environment (the main thread or a worker) owns: constructors of the handle classes, running jobs.
struct Environment {
  Napi::FunctionReference tensor, quant_matrix, mapped_file, hessian_factor, kv_cache, program, frame;
  std::set<std::atomic<int32_t>*> running;  // cancellation flags
};

inline Napi::Value error_value(Napi::Env env, const std::string& code, const std::string& message) {
  Napi::Object e = Napi::Object::New(env);
  e["code"] = code;
  e["message"] = message;
  return e;
}

// Runs body() and turns native exceptions into JavaScript ones.
template <class F> auto guarded(Napi::Env env, F body) -> decltype(body()) {
  try {
    return body();
  } catch (const Napi::Error&) { throw; } catch (const Error& e) {
    napi_throw(env, error_value(env, e.code, e.what()));
  } catch (const std::bad_alloc&) {
    napi_throw(env, error_value(env, "OUT_OF_MEMORY", "out of memory"));
  } catch (const std::exception& e) { napi_throw(env, error_value(env, "INTERNAL", e.what())); }
  return decltype(body())();
}

template <class Result> class Job : public Napi::AsyncWorker {
 public:
  using Compute = std::function<Result()>;
  using Convert = std::function<Napi::Value(Napi::Env, Result&)>;

  static Napi::Value start(Napi::Env env, const Napi::Value& control, Compute compute, Convert convert) {
    Job* job = new Job(env, std::move(compute), std::move(convert));
    if (control.IsTypedArray()) {
      job->control_ = Napi::Persistent(control.As<Napi::Object>());
      auto array = control.As<Napi::Int32Array>();
      if (array.ElementLength() > 0) job->flag_ = reinterpret_cast<std::atomic<int32_t>*>(array.Data());
    }
    env.GetInstanceData<Environment>()->running.insert(job->flag_);
    job->Queue();
    return job->deferred_.Promise();
  }

 protected:
  void Execute() override {
    try {
      CancelScope scope(flag_);
      throw_if_cancelled();
      result_.emplace(compute_());
    } catch (const Error& e) { code_ = e.code, message_ = e.what(); } catch (const std::bad_alloc&) {
      code_ = "OUT_OF_MEMORY", message_ = "out of memory";
    } catch (const std::exception& e) { code_ = "INTERNAL", message_ = e.what(); }
    compute_ = nullptr;  // lets go of the operands before JavaScript hears of the result
  }
  void OnOK() override {
    Napi::HandleScope scope(Env());
    if (auto* data = Env().GetInstanceData<Environment>()) data->running.erase(flag_);
    if (!result_) return deferred_.Reject(error_value(Env(), code_, message_));
    try {
      deferred_.Resolve(convert_(Env(), *result_));
    } catch (const Napi::Error& e) { deferred_.Reject(e.Value()); }
  }

 private:
  Job(Napi::Env env, Compute compute, Convert convert)
      : Napi::AsyncWorker(env),
        deferred_(Napi::Promise::Deferred::New(env)),
        compute_(std::move(compute)),
        convert_(std::move(convert)) {}

  Napi::Promise::Deferred deferred_;
  Compute compute_;
  Convert convert_;
  Napi::ObjectReference control_;
  std::atomic<int32_t> own_flag_{0};
  std::atomic<int32_t>* flag_ = &own_flag_;
  std::optional<Result> result_;
  std::string code_, message_;
};

}  // namespace eac::addon
