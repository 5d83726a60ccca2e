// The Node-API module: per-environment state, the handle classes, and the functions of types/native.d.ts.
#include "addon/handles.h"
#include "kernels/cpu/isa.h"
#include "program/cuda/device.h"
#include "program/cuda/backend.h"

#ifndef EAC_MOE_VERSION
#define EAC_MOE_VERSION "0.0.0"
#endif

namespace eac::addon {
namespace {

Napi::Value info_object(Info info) {
  Napi::Object o = Napi::Object::New(info.Env());
  o["version"] = EAC_MOE_VERSION;
  o["isa"] = isa().name;
  const Isa* levels[max_isas];
  const int n = available_isas(levels);
  Napi::Array names = Napi::Array::New(info.Env());
  for (int i = 0; i < n; i++) names.Set(uint32_t(i), levels[i]->name);
  o["isas"] = names;
  return o;
}
// The GPU, or why it cannot be used. Opens it on the first call.
Napi::Value cuda_object(Info info) {
  Napi::Object o = Napi::Object::New(info.Env());
  try {
    const cuda::DeviceInfo device = cuda::gpu().info();
    o["available"] = true;
    o["name"] = std::string(device.name);
    o["computeCapability"] = std::to_string(device.major) + "." + std::to_string(device.minor);
    o["totalMemory"] = double(device.total_memory);
    o["freeMemory"] = double(device.free_memory);
  } catch (const Error& e) {
    o["available"] = false;
    o["code"] = e.code;
    o["why"] = std::string(e.what());
  }
  return o;
}
Napi::Value set_isa(Info info) {
  const std::string name = info[0].ToString();
  if (!eac::set_isa(name.c_str())) throw_invalid("this machine has no instruction set level " + name);
  return info.Env().Undefined();
}
Napi::Value threads(Info info) { return Napi::Number::New(info.Env(), thread_count()); }
Napi::Value set_threads(Info info) {
  const double n = info[0].ToNumber();
  if (!(n >= 1 && n <= 1024)) throw_invalid("threads must be between 1 and 1024");
  set_thread_count(int(n));
  return info.Env().Undefined();
}

Napi::Value zeros(Info info) {
  return wrap_tensor(info.Env(), Tensor::zeros(dtype_from(info[0]), shape_from(info[1]), backend_from(info[2]).memory()));
}
Napi::Value from_array(Info info) {
  const Napi::Value tensor = wrap_tensor(info.Env(), Tensor::zeros(dtype_from(info[1]), shape_from(info[2])));
  const Napi::Object o = tensor.As<Napi::Object>();
  o.Get("write").As<Napi::Function>().Call(o, {info[0]});
  return tensor;
}
Napi::Value from_bytes(Info info) {
  if (!info[0].IsTypedArray()) throw_invalid("expected a Uint8Array for data");
  const auto bytes = info[0].As<Napi::Uint8Array>();
  Tensor t = Tensor::zeros(dtype_from(info[1]), shape_from(info[2]));
  if (bytes.ByteLength() != t.bytes())
    throw_invalid("expected " + std::to_string(t.bytes()) + " bytes, found " + std::to_string(bytes.ByteLength()));
  std::memcpy(t.data, bytes.Data(), t.bytes());
  return wrap_tensor(info.Env(), std::move(t));
}
Napi::Value map_file(Info info) { return MappedFileHandle::wrap(info.Env(), MappedFile::open(info[0].ToString())); }
Napi::Value create_program(Info info) {
  return ProgramHandle::wrap(info.Env(), program_from(info[0], info[1], backend_from(info[2])));
}
Napi::Value create_frame(Info info) {
  return FrameHandle::wrap(info.Env(), std::make_shared<Frame>(ProgramHandle::from(info[0], "program")));
}
Napi::Value create_kv_cache(Info info) {
  if (!info[0].IsArray()) throw_invalid("expected an array of layer widths");
  const Napi::Array layers = info[0].As<Napi::Array>();
  std::vector<KvCache::Widths> widths;
  for (uint32_t i = 0; i < layers.Length(); i++) {
    const Napi::Object o = layers.Get(i).As<Napi::Object>();
    widths.push_back({int64_t(number_from(o, "keyWidth")), int64_t(number_from(o, "valueWidth"))});
  }
  return KvCacheHandle::wrap(info.Env(), std::make_shared<KvCache>(std::move(widths), backend_from(info[1]).memory()));
}

}  // namespace

Backend& backend_from(const Napi::Value& v) {
  const std::string name = v.IsUndefined() || v.IsNull() ? "cpu" : v.ToString().Utf8Value();
  if (name == "cpu") return cpu_backend();
  if (name != "cuda") throw_invalid("device must be 'cpu' or 'cuda', found '" + name + "'");
  return cuda::backend();
}
Backend& backend_at(Device* device) { return device ? cuda::backend() : cpu_backend(); }

namespace {

// When an environment ends, its jobs stop at their next poll instead of being waited for.
void cancel_running(Environment* e) {
  for (std::atomic<int32_t>* flag : e->running) flag->store(1);
}

Napi::Object init(Napi::Env env, Napi::Object exports) {
  auto* e = new Environment;
  env.SetInstanceData(e);
  env.AddCleanupHook(cancel_running, e);
  TensorHandle::define(env, exports);
  QuantMatrixHandle::define(env, exports);
  MappedFileHandle::define(env, exports);
  HessianFactorHandle::define(env, exports);
  KvCacheHandle::define(env, exports);
  ProgramHandle::define(env, exports);
  FrameHandle::define(env, exports);
  define_kernels(exports);
  define_calibration(exports);
  define_convert(exports);
  define_bench(exports);
  define<info_object>(exports, "info");
  define<cuda_object>(exports, "cuda");
  define<set_isa>(exports, "setIsa");
  define<threads>(exports, "threads");
  define<set_threads>(exports, "setThreads");
  define<zeros>(exports, "zeros");
  define<from_array>(exports, "fromArray");
  define<from_bytes>(exports, "fromBytes");
  define<map_file>(exports, "mapFile");
  define<create_program>(exports, "createProgram");
  define<create_frame>(exports, "createFrame");
  define<create_kv_cache>(exports, "createKvCache");
  return exports;
}

}  // namespace

Napi::Object register_addon(Napi::Env env, Napi::Object exports) { return init(env, exports); }

}  // namespace eac::addon

using eac::addon::register_addon;
NODE_API_MODULE(eac_moe, register_addon)
