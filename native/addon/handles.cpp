#include "addon/handles.h"

namespace eac::addon {

namespace {
struct DTypeName {
  DType dtype;
  const char* name;
};
constexpr DTypeName dtypes[] = {{DType::f32, "f32"}, {DType::f16, "f16"}, {DType::bf16, "bf16"},
                                {DType::f64, "f64"}, {DType::i32, "i32"}, {DType::u8, "u8"}};

// A method that reports native exceptions as JavaScript errors.
#define GUARDED(expression) return guarded(info.Env(), [&]() -> Napi::Value { expression; })

template <class T> Napi::Value typed_copy(Napi::Env env, const void* data, int64_t n) {
  auto array = Napi::TypedArrayOf<T>::New(env, size_t(n));
  std::memcpy(array.Data(), data, size_t(n) * sizeof(T));
  return array;
}

int64_t index_from(const Napi::Value& v, const char* what) {
  if (!v.IsNumber()) throw_invalid(std::string("expected a number for ") + what);
  const double d = v.As<Napi::Number>().DoubleValue();
  if (!(d >= 0 && d <= 9007199254740991.0) || d != double(int64_t(d)))
    throw_invalid(std::string("expected a whole number for ") + what);
  return int64_t(d);
}
}  // namespace

DType dtype_from(const Napi::Value& v) {
  const std::string name = v.ToString();
  for (const DTypeName& d : dtypes)
    if (name == d.name) return d.dtype;
  throw_invalid("unknown dtype " + name);
}
const char* dtype_name(DType t) {
  for (const DTypeName& d : dtypes)
    if (d.dtype == t) return d.name;
  return "?";
}
std::vector<int64_t> shape_from(const Napi::Value& v) {
  if (!v.IsArray()) throw_invalid("expected an array of sizes for shape");
  Napi::Array a = v.As<Napi::Array>();
  std::vector<int64_t> shape;
  double total = 1;
  for (uint32_t i = 0; i < a.Length(); i++) {
    shape.push_back(index_from(a.Get(i), "shape"));
    total *= double(shape.back());
  }
  if (total > 0x1p52) throw_invalid("the shape is too large");
  return shape;
}
Matrix matrix_from(const Napi::Value& v, const char* what) {
  Environment* e = v.Env().GetInstanceData<Environment>();
  if (v.IsObject() && v.As<Napi::Object>().InstanceOf(e->quant_matrix.Value())) return *QuantMatrixHandle::from(v, what);
  return *float_matrix_from(v, what);
}
Activations activations_from(const Napi::Value& v) {
  const std::string name = v.ToString();
  if (name == "int8") return Activations::int8;
  if (name != "float32") throw_invalid("activations must be 'int8' or 'float32', found '" + name + "'");
  return Activations::f32;
}
std::shared_ptr<Tensor> host_tensor_from(const Napi::Value& v, const char* what) {
  auto t = TensorHandle::from(v, what);
  if (t->device) throw_invalid(std::string(what) + " lies on " + t->device->name() + "; expected a tensor in the host's memory");
  return t;
}
std::shared_ptr<Tensor> float_matrix_from(const Napi::Value& v, const char* what, std::optional<DType> dtype) {
  host_tensor_from(v, what);
  return matrix_anywhere(v, what, dtype);
}
std::shared_ptr<Tensor> matrix_anywhere(const Napi::Value& v, const char* what, std::optional<DType> dtype) {
  auto t = TensorHandle::from(v, what);
  const bool ok = dtype ? t->dtype == *dtype : (t->dtype == DType::f32 || t->dtype == DType::f16 || t->dtype == DType::bf16);
  if (!ok)
    throw_invalid(std::string(what) + " has dtype " + dtype_name(t->dtype) + "; expected " +
                  (dtype ? dtype_name(*dtype) : "f32, f16 or bf16"));
  return t;
}
std::vector<int32_t> i32_from(const Napi::Value& v, const char* what) {
  if (!v.IsTypedArray() || v.As<Napi::TypedArray>().TypedArrayType() != napi_int32_array)
    throw_invalid(std::string("expected an Int32Array for ") + what);
  auto a = v.As<Napi::Int32Array>();
  return {a.Data(), a.Data() + a.ElementLength()};
}
Napi::Value to_js_array(Napi::Env env, const Tensor& any) {
  const Tensor t = any.on_host();
  if (t.dtype == DType::i32) return typed_copy<int32_t>(env, t.data, t.size());
  if (t.dtype == DType::u8) return typed_copy<uint8_t>(env, t.data, t.size());
  if (t.dtype == DType::f32) return typed_copy<float>(env, t.data, t.size());
  auto array = Napi::Float32Array::New(env, size_t(t.size()));
  for (int64_t i = 0; i < t.size(); i++) array.Data()[i] = float(element(t, i));
  return array;
}

void TensorHandle::define(Napi::Env env, Napi::Object exports) {
  Napi::Function f =
      DefineClass(env, class_name,
                  {InstanceAccessor<&TensorHandle::dtype>("dtype"), InstanceAccessor<&TensorHandle::shape>("shape"),
                   InstanceAccessor<&TensorHandle::device>("device"), InstanceAccessor<&TensorHandle::byte_length>("byteLength"),
                   InstanceMethod<&TensorHandle::rows>("rows"), InstanceMethod<&TensorHandle::reshape>("reshape"),
                   InstanceMethod<&TensorHandle::to_array>("toArray"), InstanceMethod<&TensorHandle::to_bytes>("toBytes"),
                   InstanceMethod<&TensorHandle::write>("write"), InstanceMethod("dispose", &TensorHandle::dispose)});
  constructor(env) = Napi::Persistent(f);
  exports[class_name] = f;
}
Napi::Value TensorHandle::dtype(const Napi::CallbackInfo& info) {
  GUARDED(return Napi::String::New(info.Env(), dtype_name(get()->dtype)));
}
Napi::Value TensorHandle::shape(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const auto t = get();
    Napi::Array a = Napi::Array::New(info.Env(), t->shape.size());
    for (size_t i = 0; i < t->shape.size(); i++) a.Set(uint32_t(i), double(t->shape[i]));
    return a;
  });
}
Napi::Value TensorHandle::device(const Napi::CallbackInfo& info) {
  GUARDED(const auto t = get(); return Napi::String::New(info.Env(), t->device ? t->device->name() : "cpu"));
}
Napi::Value TensorHandle::byte_length(const Napi::CallbackInfo& info) {
  GUARDED(return Napi::Number::New(info.Env(), double(get()->bytes())));
}
Napi::Value TensorHandle::rows(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const auto t = get();
    const int64_t begin = index_from(info[0], "begin"), end = index_from(info[1], "end");
    if (begin > end || end > t->rows())
      throw_invalid("rows " + std::to_string(begin) + " to " + std::to_string(end) + " of a tensor with " +
                    std::to_string(t->rows()));
    return wrap_tensor(info.Env(), t->row_range(begin, end));
  });
}
Napi::Value TensorHandle::reshape(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    Tensor t = *get();
    const int64_t size = t.size();
    t.shape = shape_from(info[0]);
    if (t.size() != size) throw_invalid("the new shape has another number of elements");
    return wrap_tensor(info.Env(), std::move(t));
  });
}
Napi::Value TensorHandle::to_array(const Napi::CallbackInfo& info) { GUARDED(return to_js_array(info.Env(), *get())); }
Napi::Value TensorHandle::to_bytes(const Napi::CallbackInfo& info) {
  GUARDED(return typed_copy<uint8_t>(info.Env(), get()->on_host().data, int64_t(get()->bytes())));
}

namespace {
template <class Source> void convert_into(const Source* src, Tensor& t) {
  for (int64_t i = 0; i < t.size(); i++) switch (t.dtype) {
      case DType::f32: t.f32()[i] = float(src[i]); break;
      case DType::f64: t.as<double>()[i] = double(src[i]); break;
      case DType::f16: t.as<uint16_t>()[i] = f32_to_f16(float(src[i])); break;
      case DType::bf16: t.as<uint16_t>()[i] = f32_to_bf16(float(src[i])); break;
      case DType::i32: t.i32()[i] = int32_t(src[i]); break;
      case DType::u8: t.as<uint8_t>()[i] = uint8_t(src[i]); break;
    }
}
void write_array(const Napi::Value& v, Tensor& t) {
  if (!v.IsTypedArray()) throw_invalid("expected a typed array");
  const auto a = v.As<Napi::TypedArray>();
  if (int64_t(a.ElementLength()) != t.size())
    throw_invalid("expected " + std::to_string(t.size()) + " numbers, found " + std::to_string(a.ElementLength()));
  switch (a.TypedArrayType()) {
    case napi_float32_array: return convert_into(v.As<Napi::Float32Array>().Data(), t);
    case napi_float64_array: return convert_into(v.As<Napi::Float64Array>().Data(), t);
    case napi_int32_array: return convert_into(v.As<Napi::Int32Array>().Data(), t);
    case napi_uint16_array: return convert_into(v.As<Napi::Uint16Array>().Data(), t);
    case napi_uint8_array: return convert_into(v.As<Napi::Uint8Array>().Data(), t);
    default: throw_invalid("expected a Float32Array, Float64Array, Int32Array, Uint16Array or Uint8Array");
  }
}
}  // namespace

Napi::Value TensorHandle::write(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const auto t = get();
    Tensor host = t->device ? Tensor::zeros(t->dtype, t->shape) : *t;
    write_array(info[0], host);
    if (t->device) t->device->from_host(t->data, host.data, host.bytes());
    return info.Env().Undefined();
  });
}

namespace {
Napi::Value start_tensor(Napi::Env env, std::function<Tensor()> compute) {
  return Job<Tensor>::start(env, env.Undefined(), std::move(compute),
                            [](Napi::Env e, Tensor& t) { return wrap_tensor(e, std::move(t)); });
}
}  // namespace

void QuantMatrixHandle::define(Napi::Env env, Napi::Object exports) {
  const auto property = [](const char* name, int which) {
    return InstanceAccessor<&QuantMatrixHandle::property>(name, napi_default, reinterpret_cast<void*>(intptr_t(which)));
  };
  Napi::Function f = DefineClass(
      env, class_name,
      {property("bits", 0), property("rows", 1), property("cols", 2), property("groupSize", 3), property("symmetric", 4),
       InstanceAccessor<&QuantMatrixHandle::byte_length>("byteLength"), InstanceMethod<&QuantMatrixHandle::codes>("codes"),
       InstanceMethod<&QuantMatrixHandle::scales>("scales"), InstanceMethod<&QuantMatrixHandle::zeros>("zeros"),
       InstanceMethod<&QuantMatrixHandle::dequantize>("dequantize"), InstanceMethod<&QuantMatrixHandle::to_gptq>("toGptq"),
       InstanceMethod("dispose", &QuantMatrixHandle::dispose)});
  constructor(env) = Napi::Persistent(f);
  exports[class_name] = f;
}
Napi::Value QuantMatrixHandle::property(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const auto q = get();
    switch (intptr_t(info.Data())) {
      case 0: return Napi::Number::New(info.Env(), q->bits);
      case 1: return Napi::Number::New(info.Env(), double(q->rows));
      case 2: return Napi::Number::New(info.Env(), double(q->cols));
      case 3: return Napi::Number::New(info.Env(), double(q->group_size));
      default: return Napi::Boolean::New(info.Env(), q->symmetric);
    }
  });
}
Napi::Value QuantMatrixHandle::byte_length(const Napi::CallbackInfo& info) {
  GUARDED(return Napi::Number::New(info.Env(), double(bytes_of(*get()))));
}
Napi::Value QuantMatrixHandle::codes(const Napi::CallbackInfo& info) {
  GUARDED(return start_tensor(info.Env(), [q = get()] { return unpack_codes(*q); }));
}
Napi::Value QuantMatrixHandle::scales(const Napi::CallbackInfo& info) {
  GUARDED(return wrap_tensor(info.Env(), unpack_scales(*get())));
}
Napi::Value QuantMatrixHandle::zeros(const Napi::CallbackInfo& info) {
  GUARDED(return wrap_tensor(info.Env(), unpack_zeros(*get())));
}
Napi::Value QuantMatrixHandle::dequantize(const Napi::CallbackInfo& info) {
  GUARDED(return start_tensor(info.Env(), [q = get()] { return eac::dequantize(*q); }));
}
Napi::Value QuantMatrixHandle::to_gptq(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return Job<GptqTensors>::start(
        info.Env(), info.Env().Undefined(), [q = get()] { return eac::to_gptq(*q); },
        [](Napi::Env env, GptqTensors& t) -> Napi::Value {
          Napi::Object o = Napi::Object::New(env);
          o["qweight"] = wrap_tensor(env, std::move(t.qweight));
          o["qzeros"] = wrap_tensor(env, std::move(t.qzeros));
          o["scales"] = wrap_tensor(env, std::move(t.scales));
          o["gIdx"] = wrap_tensor(env, std::move(t.g_idx));
          return o;
        });
  });
}

void MappedFileHandle::define(Napi::Env env, Napi::Object exports) {
  Napi::Function f =
      DefineClass(env, class_name,
                  {InstanceAccessor<&MappedFileHandle::byte_length>("byteLength"),
                   InstanceMethod<&MappedFileHandle::bytes>("bytes"), InstanceMethod<&MappedFileHandle::tensor>("tensor"),
                   InstanceMethod<&MappedFileHandle::release>("release"), InstanceMethod("dispose", &MappedFileHandle::dispose)});
  constructor(env) = Napi::Persistent(f);
  exports[class_name] = f;
}
Napi::Value MappedFileHandle::byte_length(const Napi::CallbackInfo& info) {
  GUARDED(return Napi::Number::New(info.Env(), double(get()->size())));
}
Napi::Value MappedFileHandle::bytes(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const auto file = get();
    const int64_t begin = index_from(info[0], "begin"), end = index_from(info[1], "end");
    if (begin > end || size_t(end) > file->size()) throw_invalid("bytes outside the file");
    return typed_copy<uint8_t>(info.Env(), file->data() + begin, end - begin);
  });
}
Napi::Value MappedFileHandle::tensor(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const auto file = get();
    Tensor t{dtype_from(info[0]), shape_from(info[1]), nullptr, file};
    const int64_t offset = index_from(info[2], "byteOffset");
    if (size_t(offset) > file->size() || t.bytes() > file->size() - size_t(offset))
      throw_invalid("the tensor reaches beyond the file");
    t.data = file->data() + offset;
    if (uintptr_t(t.data) % dtype_size(t.dtype) != 0) {  // legal in the format, if unusual: give it an aligned copy
      Tensor copy = Tensor::zeros(t.dtype, t.shape);
      std::memcpy(copy.data, t.data, t.bytes());
      t = std::move(copy);
    }
    return wrap_tensor(info.Env(), std::move(t));
  });
}
Napi::Value MappedFileHandle::release(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    get()->release(size_t(index_from(info[0], "begin")), size_t(index_from(info[1], "end")));
    return info.Env().Undefined();
  });
}

void HessianFactorHandle::define(Napi::Env env, Napi::Object exports) {
  Napi::Function f = DefineClass(
      env, class_name,
      {InstanceAccessor<&HessianFactorHandle::size>("size"), InstanceMethod<&HessianFactorHandle::diagonal>("diagonal"),
       InstanceMethod("dispose", &HessianFactorHandle::dispose)});
  constructor(env) = Napi::Persistent(f);
  exports[class_name] = f;
}
Napi::Value HessianFactorHandle::size(const Napi::CallbackInfo& info) {
  GUARDED(return Napi::Number::New(info.Env(), double(get()->n)));
}
Napi::Value HessianFactorHandle::diagonal(const Napi::CallbackInfo& info) {
  GUARDED(return typed_copy<float>(info.Env(), get()->diagonal.data(), int64_t(get()->diagonal.size())));
}

void KvCacheHandle::define(Napi::Env env, Napi::Object exports) {
  Napi::Function f = DefineClass(
      env, class_name,
      {InstanceAccessor<&KvCacheHandle::length>("length"), InstanceAccessor<&KvCacheHandle::byte_length>("byteLength"),
       InstanceMethod<&KvCacheHandle::truncate>("truncate"), InstanceMethod("dispose", &KvCacheHandle::dispose)});
  constructor(env) = Napi::Persistent(f);
  exports[class_name] = f;
}
Napi::Value KvCacheHandle::length(const Napi::CallbackInfo& info) {
  GUARDED(return Napi::Number::New(info.Env(), double(get()->length)));
}
Napi::Value KvCacheHandle::byte_length(const Napi::CallbackInfo& info) {
  GUARDED(return Napi::Number::New(info.Env(), double(get()->bytes())));
}
Napi::Value KvCacheHandle::truncate(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const auto cache = get();
    const int64_t n = index_from(info[0], "length");
    if (n > cache->length) throw_invalid("the cache holds only " + std::to_string(cache->length) + " tokens");
    cache->length = n;
    return info.Env().Undefined();
  });
}

}  // namespace eac::addon
