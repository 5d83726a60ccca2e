// What benchmarks need: the machine's limits, and random weights.
#include "kernels/bench/limits.h"

#include "addon/handles.h"
#include "kernels/bench/random_matrix.h"

namespace eac::addon {
namespace {

Napi::Value js_limit_buffer(Info info) {
  const double bytes = info[0].ToNumber();
  if (!(bytes >= 0 && bytes <= 0x1p40)) throw_invalid("bufferBytes must be between 0 (default) and 1 TiB");
  return Job<Tensor>::start(
      info.Env(), info[1], [bytes] { return limit_buffer(size_t(bytes)); },
      [](Napi::Env env, Tensor& t) { return wrap_tensor(env, std::move(t)); });
}

Napi::Value js_limit_pass(Info info) {
  const auto buffer = host_tensor_from(info[0], "buffer");
  const double pass = info[1].ToNumber();
  if (!(pass >= 0 && pass <= 0x1p32)) throw_invalid("expected a whole number for the pass");
  return Job<MachineRates>::start(
      info.Env(), info[2], [buffer, pass] { return limit_pass(*buffer, int64_t(pass)); },
      [](Napi::Env env, MachineRates& m) -> Napi::Value {
        Napi::Object result = Napi::Object::New(env);
        result["readBandwidth"] = m.read_bandwidth;
        result["fmaPeak"] = m.fma_peak;
        result["int8Peak"] = m.int8_peak;
        return result;
      });
}

Napi::Value js_random_matrix(Info info) {
  const double rows = info[0].ToNumber(), cols = info[1].ToNumber(), seed = info[3].ToNumber();
  if (!(rows >= 1 && cols >= 1 && rows * cols <= 0x1p40)) throw_invalid("expected positive sizes for rows and cols");
  if (!(seed >= 0 && seed <= 0x1p53)) throw_invalid("expected a whole number for seed");
  const Napi::Object o = info[2].As<Napi::Object>();
  if (o.Has("dtype")) {
    const DType dtype = dtype_from(o.Get("dtype"));
    return Job<Tensor>::start(
        info.Env(), info[4], [=] { return random_matrix(int64_t(rows), int64_t(cols), dtype, uint64_t(seed)); },
        [](Napi::Env env, Tensor& t) { return wrap_tensor(env, std::move(t)); });
  }
  const int bits = int(number_from(o, "bits"));
  const int64_t group_size = int64_t(number_from(o, "groupSize"));
  const bool symmetric = bool_from(o, "symmetric");
  return Job<QuantMatrix>::start(
      info.Env(), info[4],
      [=] { return random_quant_matrix(int64_t(rows), int64_t(cols), bits, group_size, symmetric, uint64_t(seed)); },
      [](Napi::Env env, QuantMatrix& q) { return QuantMatrixHandle::wrap(env, std::make_shared<QuantMatrix>(std::move(q))); });
}

}  // namespace

void define_bench(Napi::Object exports) {
  define<js_limit_buffer>(exports, "limitBuffer");
  define<js_limit_pass>(exports, "limitPass");
  define<js_random_matrix>(exports, "randomMatrix");
}

}  // namespace eac::addon
