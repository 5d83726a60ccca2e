// JavaScript handles over shared native values. A handle drops its share at dispose() or garbage collection.
#pragma once
#include "addon/async.h"
#include "core/mapped_file.h"
#include "kernels/quant/quantize.h"
#include "program/program.h"

namespace eac::addon {

[[noreturn]] inline void throw_invalid(const std::string& message) { throw Error("INVALID_ARGUMENT", message); }

template <class Self, class Value> class Handle : public Napi::ObjectWrap<Self> {
 public:
  explicit Handle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<Self>(info) {}

  static Napi::Value wrap(Napi::Env env, std::shared_ptr<Value> value) {
    Napi::Object object = Self::constructor(env).New({});
    Self* self = Napi::ObjectWrap<Self>::Unwrap(object);
    self->set_external_memory(int64_t(Self::bytes_of(*value)));
    self->value_ = std::move(value);
    return object;
  }
  // The value behind a JavaScript argument, or an error that names the argument.
  static std::shared_ptr<Value> from(const Napi::Value& v, const char* what) {
    if (!v.IsObject() || !v.As<Napi::Object>().InstanceOf(Self::constructor(v.Env()).Value()))
      throw_invalid(std::string("expected a ") + Self::class_name + " for " + what);
    return Napi::ObjectWrap<Self>::Unwrap(v.As<Napi::Object>())->get();
  }
  std::shared_ptr<Value> get() const {
    if (!value_) throw Error("DISPOSED", std::string("this ") + Self::class_name + " was disposed");
    return value_;
  }

 protected:
  Napi::Value dispose(const Napi::CallbackInfo& info) {
    value_.reset();
    set_external_memory(0);
    return info.Env().Undefined();
  }
  std::shared_ptr<Value> value_;

 private:
  // Lets the garbage collector know what hangs on a small object.
  void set_external_memory(int64_t bytes) {
    Napi::MemoryManagement::AdjustExternalMemory(this->Env(), bytes - external_);
    external_ = bytes;
  }
  int64_t external_ = 0;
};

struct TensorHandle : Handle<TensorHandle, Tensor> {
  static constexpr const char* class_name = "Tensor";
  static Napi::FunctionReference& constructor(Napi::Env env) { return env.GetInstanceData<Environment>()->tensor; }
  static size_t bytes_of(const Tensor&) { return 0; }  // most are views of mapped files or of one another
  static void define(Napi::Env env, Napi::Object exports);
  using Handle::Handle;

 private:
  friend struct Handle<TensorHandle, Tensor>;
  Napi::Value dtype(const Napi::CallbackInfo&);
  Napi::Value device(const Napi::CallbackInfo&);
  Napi::Value shape(const Napi::CallbackInfo&);
  Napi::Value byte_length(const Napi::CallbackInfo&);
  Napi::Value rows(const Napi::CallbackInfo&);
  Napi::Value reshape(const Napi::CallbackInfo&);
  Napi::Value to_array(const Napi::CallbackInfo&);
  Napi::Value to_bytes(const Napi::CallbackInfo&);
  Napi::Value write(const Napi::CallbackInfo&);
};

struct QuantMatrixHandle : Handle<QuantMatrixHandle, QuantMatrix> {
  static constexpr const char* class_name = "QuantMatrix";
  static Napi::FunctionReference& constructor(Napi::Env env) { return env.GetInstanceData<Environment>()->quant_matrix; }
  static size_t bytes_of(const QuantMatrix& q) { return q.codes.bytes() + q.scales.bytes() + q.zeros.bytes(); }
  static void define(Napi::Env env, Napi::Object exports);
  using Handle::Handle;

 private:
  Napi::Value property(const Napi::CallbackInfo&);
  Napi::Value byte_length(const Napi::CallbackInfo&);
  Napi::Value codes(const Napi::CallbackInfo&);
  Napi::Value scales(const Napi::CallbackInfo&);
  Napi::Value zeros(const Napi::CallbackInfo&);
  Napi::Value dequantize(const Napi::CallbackInfo&);
  Napi::Value to_gptq(const Napi::CallbackInfo&);
};

struct MappedFileHandle : Handle<MappedFileHandle, MappedFile> {
  static constexpr const char* class_name = "MappedFile";
  static Napi::FunctionReference& constructor(Napi::Env env) { return env.GetInstanceData<Environment>()->mapped_file; }
  static size_t bytes_of(const MappedFile&) { return 0; }
  static void define(Napi::Env env, Napi::Object exports);
  using Handle::Handle;

 private:
  Napi::Value byte_length(const Napi::CallbackInfo&);
  Napi::Value bytes(const Napi::CallbackInfo&);
  Napi::Value tensor(const Napi::CallbackInfo&);
  Napi::Value release(const Napi::CallbackInfo&);
};

struct HessianFactorHandle : Handle<HessianFactorHandle, HessianFactor> {
  static constexpr const char* class_name = "HessianFactor";
  static Napi::FunctionReference& constructor(Napi::Env env) { return env.GetInstanceData<Environment>()->hessian_factor; }
  static size_t bytes_of(const HessianFactor& f) { return f.u.bytes(); }
  static void define(Napi::Env env, Napi::Object exports);
  using Handle::Handle;

 private:
  Napi::Value size(const Napi::CallbackInfo&);
  Napi::Value diagonal(const Napi::CallbackInfo&);
};

struct KvCacheHandle : Handle<KvCacheHandle, KvCache> {
  static constexpr const char* class_name = "KvCache";
  static Napi::FunctionReference& constructor(Napi::Env env) { return env.GetInstanceData<Environment>()->kv_cache; }
  static size_t bytes_of(const KvCache&) { return 0; }
  static void define(Napi::Env env, Napi::Object exports);
  using Handle::Handle;

 private:
  Napi::Value length(const Napi::CallbackInfo&);
  Napi::Value byte_length(const Napi::CallbackInfo&);
  Napi::Value truncate(const Napi::CallbackInfo&);
};

struct ProgramHandle : Handle<ProgramHandle, Program> {
  static constexpr const char* class_name = "Program";
  static Napi::FunctionReference& constructor(Napi::Env env) { return env.GetInstanceData<Environment>()->program; }
  static size_t bytes_of(const Program&) { return 0; }
  static void define(Napi::Env env, Napi::Object exports);
  using Handle::Handle;

 private:
  Napi::Value length(const Napi::CallbackInfo&);
  Napi::Value prepare(const Napi::CallbackInfo&);
};

struct FrameHandle : Handle<FrameHandle, Frame> {
  static constexpr const char* class_name = "Frame";
  static Napi::FunctionReference& constructor(Napi::Env env) { return env.GetInstanceData<Environment>()->frame; }
  static size_t bytes_of(const Frame&) { return 0; }
  static void define(Napi::Env env, Napi::Object exports);
  using Handle::Handle;

 private:
  std::shared_ptr<Frame> idle() const;
  Napi::Value begin(const Napi::CallbackInfo&);
  Napi::Value bind(const Napi::CallbackInfo&);
  Napi::Value set_activations(const Napi::CallbackInfo&);
  Napi::Value set_pruning(const Napi::CallbackInfo&);
  Napi::Value set_sampling(const Napi::CallbackInfo&);
  Napi::Value run(const Napi::CallbackInfo&);
  Napi::Value commit(const Napi::CallbackInfo&);
  Napi::Value read(const Napi::CallbackInfo&);
  Napi::Value tensor(const Napi::CallbackInfo&);
};

// Conversions between JavaScript and native values; all throw eac::Error that names `what`.
DType dtype_from(const Napi::Value& v);
const char* dtype_name(DType t);
std::vector<int64_t> shape_from(const Napi::Value& v);
Matrix matrix_from(const Napi::Value& v, const char* what);
Activations activations_from(const Napi::Value& v);
// Any tensor in the host's memory.
std::shared_ptr<Tensor> host_tensor_from(const Napi::Value& v, const char* what);
std::shared_ptr<Tensor> float_matrix_from(const Napi::Value& v, const char* what, std::optional<DType> dtype = std::nullopt);
// The same, on any device.
std::shared_ptr<Tensor> matrix_anywhere(const Napi::Value& v, const char* what, std::optional<DType> dtype = std::nullopt);
std::vector<int32_t> i32_from(const Napi::Value& v, const char* what);
Napi::Value to_js_array(Napi::Env env, const Tensor& t);
inline Napi::Value wrap_tensor(Napi::Env env, Tensor t) {
  return TensorHandle::wrap(env, std::make_shared<Tensor>(std::move(t)));
}
inline double number_from(const Napi::Object& o, const char* key) {
  const Napi::Value v = o.Get(key);
  if (!v.IsNumber()) throw_invalid(std::string("expected a number for ") + key);
  return v.As<Napi::Number>().DoubleValue();
}
inline bool bool_from(const Napi::Object& o, const char* key) { return o.Get(key).ToBoolean().Value(); }

using Info = const Napi::CallbackInfo&;
// A function as JavaScript calls it: what f throws becomes a JavaScript error.
template <Napi::Value (*f)(Info)> Napi::Value exported(Info info) {
  return guarded(info.Env(), [&] { return f(info); });
}

template <Napi::Value (*f)(Info)> void define(Napi::Object exports, const char* name) {
  exports[name] = Napi::Function::New(exports.Env(), exported<f>, name);
}

void define_kernels(Napi::Object exports);
void define_calibration(Napi::Object exports);
void define_convert(Napi::Object exports);
void define_bench(Napi::Object exports);
std::shared_ptr<Program> program_from(const Napi::Value& registers, const Napi::Value& ops, Backend& backend);
// 'cpu' (or nothing) or 'cuda'; throws Error: INVALID_ARGUMENT where there is no such device, else as cuda::gpu() does.
Backend& backend_from(const Napi::Value& v);
// Whose memory this is; null: the host's.
Backend& backend_at(Device* device);

}  // namespace eac::addon
