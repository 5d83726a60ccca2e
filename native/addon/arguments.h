// Arguments and results that several groups of functions share.
#pragma once
#include "addon/handles.h"

namespace eac::addon {

inline QuantOptions quant_options(const Napi::Value& v) {
  const Napi::Object o = v.As<Napi::Object>();
  QuantOptions q{int(number_from(o, "bits")), int64_t(number_from(o, "groupSize")), bool_from(o, "symmetric"),
                 bool_from(o, "clipSearch")};
  if (q.bits < 2 || q.bits > 4) throw_invalid("bits must be 2, 3 or 4, found " + std::to_string(q.bits));
  if (q.group_size < 32 || q.group_size % 32 != 0)
    throw_invalid("groupSize must be a positive multiple of 32, found " + std::to_string(q.group_size));
  return q;
}
inline void same_width(int64_t a, int64_t b, const char* what) {
  if (a != b) throw_invalid(std::string(what) + ": " + std::to_string(a) + " against " + std::to_string(b));
}
inline std::vector<float> weights_from(const Napi::Value& v, int64_t n, const char* what) {
  if (v.IsUndefined() || v.IsNull()) return {};
  if (!v.IsTypedArray() || v.As<Napi::TypedArray>().TypedArrayType() != napi_float32_array)
    throw_invalid(std::string("expected a Float32Array for ") + what);
  const auto a = v.As<Napi::Float32Array>();
  same_width(int64_t(a.ElementLength()), n, what);
  return {a.Data(), a.Data() + n};
}
inline Napi::Value undefined_value(Napi::Env env, bool&) { return env.Undefined(); }
inline Napi::Value tensor_value(Napi::Env env, Tensor& t) { return wrap_tensor(env, std::move(t)); }
inline Napi::Value quant_matrix_value(Napi::Env env, QuantMatrix& q) {
  return QuantMatrixHandle::wrap(env, std::make_shared<QuantMatrix>(std::move(q)));
}

}  // namespace eac::addon
