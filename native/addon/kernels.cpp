// The kernels as functions: arguments are parsed on the JavaScript thread into native values, the work runs as a job.
#include "addon/handles.h"
#include "kernels/matmul/gemm.h"
#include "kernels/nn/output.h"
#include "kernels/router/calibrate.h"
#include "kernels/router/round.h"

#include <cmath>
#include <cstdio>
#include <numeric>

namespace eac::addon {
namespace {

QuantOptions quant_options(const Napi::Value& v) {
  const Napi::Object o = v.As<Napi::Object>();
  QuantOptions q{int(number_from(o, "bits")), int64_t(number_from(o, "groupSize")), bool_from(o, "symmetric"),
                 bool_from(o, "clipSearch")};
  if (q.bits < 2 || q.bits > 4) throw_invalid("bits must be 2, 3 or 4, found " + std::to_string(q.bits));
  if (q.group_size < 32 || q.group_size % 32 != 0)
    throw_invalid("groupSize must be a positive multiple of 32, found " + std::to_string(q.group_size));
  return q;
}
void same_width(int64_t a, int64_t b, const char* what) {
  if (a != b) throw_invalid(std::string(what) + ": " + std::to_string(a) + " against " + std::to_string(b));
}
std::vector<float> weights_from(const Napi::Value& v, int64_t n, const char* what) {
  if (v.IsUndefined() || v.IsNull()) return {};
  if (!v.IsTypedArray() || v.As<Napi::TypedArray>().TypedArrayType() != napi_float32_array)
    throw_invalid(std::string("expected a Float32Array for ") + what);
  const auto a = v.As<Napi::Float32Array>();
  same_width(int64_t(a.ElementLength()), n, what);
  return {a.Data(), a.Data() + n};
}
Napi::Value undefined_value(Napi::Env env, bool&) { return env.Undefined(); }
Napi::Value tensor_value(Napi::Env env, Tensor& t) { return wrap_tensor(env, std::move(t)); }
Napi::Value f64_value(Napi::Env env, std::vector<double>& v) {
  auto a = Napi::Float64Array::New(env, v.size());
  std::copy(v.begin(), v.end(), a.Data());
  return a;
}

Napi::Value cast(Info info) {
  const auto t = float_matrix_from(info[0], "tensor");
  const DType to = dtype_from(info[1]);
  return Job<Tensor>::start(
      info.Env(), info[2],
      [t, to] {
        Tensor out = Tensor::zeros(to, t->shape);
        const int64_t n = t->size(), block = 1 << 16;
        parallel_for((n + block - 1) / block, [&](int64_t b) {
          for (int64_t i = b * block; i < std::min(n, (b + 1) * block); i++) {
            const double v = element(*t, i);
            if (to == DType::f32)
              out.f32()[i] = float(v);
            else if (to == DType::bf16)
              out.as<uint16_t>()[i] = f32_to_bf16(float(v));
            else if (to == DType::f16)
              out.as<uint16_t>()[i] = f32_to_f16(float(v));
            else if (to == DType::f64)
              out.as<double>()[i] = v;
          }
        });
        return out;
      },
      tensor_value);
}

Napi::Value gather_rows(Info info) {
  const auto x = float_matrix_from(info[0], "x", DType::f32), out = float_matrix_from(info[2], "out", DType::f32);
  auto indices = i32_from(info[1], "indices");
  same_width(out->cols(), x->cols(), "width of out");
  same_width(out->rows(), int64_t(indices.size()), "rows of out");
  for (int32_t i : indices)
    if (i < 0 || i >= x->rows())
      throw_invalid("row index " + std::to_string(i) + " of a tensor with " + std::to_string(x->rows()) + " rows");
  return Job<bool>::start(
      info.Env(), info[3],
      [x, out, indices = std::move(indices)] {
        const int64_t d = x->cols();
        parallel_for(int64_t(indices.size() + 63) / 64, [&](int64_t b) {
          for (int64_t i = b * 64; i < std::min<int64_t>(int64_t(indices.size()), b * 64 + 64); i++)
            std::memcpy(out->f32() + i * d, x->f32() + indices[size_t(i)] * d, size_t(d) * sizeof(float));
        });
        return true;
      },
      undefined_value);
}

struct Scan {
  int64_t non_finite;
  uint64_t hash;
};

// First NaN or infinity of elements [begin, end), or -1: an exponent of all ones, one integer test an element in whatever width.
int64_t first_non_finite(const Tensor& t, int64_t begin, int64_t end) {
  bool bad = false;
  if (t.dtype == DType::f32) {
    for (int64_t i = begin; i < end; i++) bad |= (t.as<uint32_t>()[i] & 0x7f800000u) == 0x7f800000u;
  } else {
    const uint16_t mask = t.dtype == DType::f16 ? 0x7c00 : 0x7f80;
    for (int64_t i = begin; i < end; i++) bad |= (t.as<uint16_t>()[i] & mask) == mask;
  }
  for (int64_t i = begin; bad && i < end; i++)
    if (!std::isfinite(element(t, i))) return i;
  return -1;
}

// 64-bit hash of bytes: multiply and fold, 8 bytes a step (as in wyhash). Tells files apart; no defence against forgery.
uint64_t hash_bytes(const uint8_t* p, size_t n, uint64_t h) {
  const auto mix = [](uint64_t a, uint64_t b) {
    const unsigned __int128 m = static_cast<unsigned __int128>(a) * b;
    return uint64_t(m) ^ uint64_t(m >> 64);
  };
  for (; n > 0;) {
    uint64_t word = 0;
    const size_t step = n < 8 ? n : 8;
    std::memcpy(&word, p, step);
    h = mix(h ^ word ^ 0xa0761d6478bd642full, 0xe7037ed1a0b428dbull + step);
    p += step, n -= step;
  }
  return h;
}

Napi::Value scan_tensor(Info info) {
  const auto t = float_matrix_from(info[0], "tensor");
  return Job<Scan>::start(
      info.Env(), info[1],
      [t]() -> Scan {
        const int64_t n = t->size(), block = 1 << 18, blocks = (n + block - 1) / block;
        const size_t size = dtype_size(t->dtype);
        std::vector<Scan> parts(static_cast<size_t>(blocks));
        parallel_for(blocks, [&](int64_t b) {
          const int64_t begin = b * block, end = std::min(n, begin + block);
          parts[size_t(b)] = {first_non_finite(*t, begin, end),
                              hash_bytes(t->as<uint8_t>() + size_t(begin) * size, size_t(end - begin) * size, uint64_t(n))};
        });
        Scan all{-1, uint64_t(n)};
        for (const Scan& part : parts) {
          if (all.non_finite < 0) all.non_finite = part.non_finite;
          all.hash = hash_bytes(reinterpret_cast<const uint8_t*>(&part.hash), sizeof part.hash, all.hash);
        }
        return all;
      },
      [](Napi::Env env, Scan& scan) -> Napi::Value {
        char hex[17];
        std::snprintf(hex, sizeof hex, "%016llx", static_cast<unsigned long long>(scan.hash));
        Napi::Object o = Napi::Object::New(env);
        o["nonFinite"] = double(scan.non_finite);
        o["hash"] = hex;
        return o;
      });
}

Napi::Value quant_matrix_value(Napi::Env env, QuantMatrix& q) {
  return QuantMatrixHandle::wrap(env, std::make_shared<QuantMatrix>(std::move(q)));
}

Napi::Value js_quantize_rtn(Info info) {
  const auto w = float_matrix_from(info[0], "w");
  const QuantOptions o = quant_options(info[1]);
  auto importance = weights_from(info[2], w->cols(), "importance");
  return Job<QuantMatrix>::start(
      info.Env(), info[3],
      [w, o, importance = std::move(importance)] {
        return quantize_rtn(*w, o, importance.empty() ? nullptr : importance.data());
      },
      quant_matrix_value);
}

Napi::Value js_accumulate_hessian(Info info) {
  const auto h = float_matrix_from(info[0], "h", DType::f32), x = float_matrix_from(info[1], "x", DType::f32);
  same_width(h->cols(), x->cols(), "width of h"), same_width(h->rows(), x->cols(), "height of h");
  auto weights = weights_from(info[2], x->rows(), "weights");
  return Job<bool>::start(
      info.Env(), info[3],
      [h, x, weights = std::move(weights)] {
        accumulate_hessian(*h, *x, weights.empty() ? nullptr : weights.data());
        return true;
      },
      undefined_value);
}

Napi::Value js_accumulate_cross(Info info) {
  const auto d = float_matrix_from(info[0], "d", DType::f32), xf = float_matrix_from(info[1], "xFull", DType::f32),
             x = float_matrix_from(info[2], "x", DType::f32);
  same_width(d->cols(), x->cols(), "width of d"), same_width(d->rows(), x->cols(), "height of d");
  same_width(xf->cols(), x->cols(), "width of xFull"), same_width(xf->rows(), x->rows(), "rows of xFull");
  auto weights = weights_from(info[3], x->rows(), "weights");
  return Job<bool>::start(
      info.Env(), info[4],
      [d, xf, x, weights = std::move(weights)] {
        accumulate_cross(*d, *xf, *x, weights.empty() ? nullptr : weights.data());
        return true;
      },
      undefined_value);
}

Napi::Value js_factor_hessian(Info info) {
  const auto h = float_matrix_from(info[0], "h", DType::f32);
  same_width(h->rows(), h->cols(), "h must be square");
  const double damping = info[1].ToNumber().DoubleValue();
  if (!(damping > 0)) throw_invalid("damping must be positive");
  const bool act_order = info[2].ToBoolean();
  return Job<HessianFactor>::start(
      info.Env(), info[3], [h, damping, act_order] { return factor_hessian(*h, damping, act_order); },
      [](Napi::Env env, HessianFactor& f) {
        return HessianFactorHandle::wrap(env, std::make_shared<HessianFactor>(std::move(f)));
      });
}

Napi::Value js_two_stream_target(Info info) {
  const auto w = float_matrix_from(info[0], "w"), d = float_matrix_from(info[2], "d", DType::f32);
  const auto f = HessianFactorHandle::from(info[1], "factor");
  const float beta = info[3].ToNumber().FloatValue();
  same_width(w->cols(), f->n, "width of w"), same_width(d->cols(), f->n, "width of d"),
      same_width(d->rows(), f->n, "height of d");
  return Job<Tensor>::start(
      info.Env(), info[4], [w, f, d, beta] { return two_stream_target(*w, *f, *d, beta); }, tensor_value);
}

Napi::Value js_quantize_gptq(Info info) {
  const auto w = float_matrix_from(info[0], "w");
  const auto f = HessianFactorHandle::from(info[1], "factor");
  const QuantOptions o = quant_options(info[2]);
  same_width(w->cols(), f->n, "width of w");
  return Job<GptqResult>::start(
      info.Env(), info[3], [w, f, o] { return quantize_gptq(*w, *f, o); },
      [](Napi::Env env, GptqResult& r) -> Napi::Value {
        Napi::Object result = Napi::Object::New(env);
        result["error"] = r.error;
        result["matrix"] = quant_matrix_value(env, r.matrix);
        return result;
      });
}

Napi::Value js_pack_codes(Info info) {
  const auto codes = TensorHandle::from(info[0], "codes"), scales = TensorHandle::from(info[1], "scales"),
             zeros = TensorHandle::from(info[2], "zeros");
  Napi::Object o = info[3].As<Napi::Object>();
  o["clipSearch"] = false;
  const QuantOptions q = quant_options(o);
  const int64_t groups = (codes->cols() + q.group_size - 1) / q.group_size;
  if (codes->dtype != DType::u8 || scales->dtype != DType::f16 || zeros->dtype != DType::u8)
    throw_invalid("expected codes u8, scales f16 and zeros u8");
  for (const auto& t : {scales, zeros})
    same_width(t->rows(), codes->rows(), "rows of scales and zeros"), same_width(t->cols(), groups, "groups of scales and zeros");
  return Job<QuantMatrix>::start(
      info.Env(), info[4],
      [codes, scales, zeros, q] {
        for (const auto& t : {codes, zeros})
          for (int64_t i = 0; i < t->size(); i++)
            if (t->as<uint8_t>()[i] >> q.bits)
              throw_invalid("a code or zero point does not fit " + std::to_string(q.bits) + " bits");
        return pack_codes(*codes, *scales, *zeros, q.bits, q.group_size, q.symmetric);
      },
      quant_matrix_value);
}

Napi::Value js_from_gptq(Info info) {
  const Napi::Object t = info[0].As<Napi::Object>();
  Napi::Object o = info[1].As<Napi::Object>();
  o["clipSearch"] = false;
  const QuantOptions q = quant_options(o);
  const int64_t rows = int64_t(number_from(o, "rows")), cols = int64_t(number_from(o, "cols")),
                groups = (cols + q.group_size - 1) / q.group_size;
  const auto part = [&](const char* key, DType dtype, int64_t r, int64_t c) {
    const auto tensor = TensorHandle::from(t.Get(key), key);
    if (tensor->dtype != dtype || tensor->rows() != r || tensor->cols() != c)
      throw Error("INVALID_TENSOR", std::string(key) + " must be " + dtype_name(dtype) + " [" + std::to_string(r) + ", " +
                                        std::to_string(c) + "], found " + dtype_name(tensor->dtype) + " [" +
                                        std::to_string(tensor->rows()) + ", " + std::to_string(tensor->cols()) + "]");
    return *tensor;
  };
  GptqTensors g{part("qweight", DType::i32, (cols + 31) / 32 * q.bits, rows),
                part("qzeros", DType::i32, groups, (rows + 31) / 32 * q.bits), part("scales", DType::f16, groups, rows),
                part("gIdx", DType::i32, 1, cols)};
  return Job<QuantMatrix>::start(
      info.Env(), info[2],
      [g = std::move(g), rows, cols, q] { return from_gptq(g, rows, cols, q.bits, q.group_size, q.symmetric); },
      quant_matrix_value);
}

Napi::Value js_calibrate_router(Info info) {
  const auto w = float_matrix_from(info[0], "w"), x = float_matrix_from(info[1], "x", DType::f32),
             targets = float_matrix_from(info[2], "targets", DType::f32);
  const Napi::Object o = info[3].As<Napi::Object>();
  RouterCalibrationOptions options{int64_t(number_from(o, "k")), number_from(o, "ridge"), number_from(o, "tolerance"),
                                   int(number_from(o, "maxIterations"))};
  same_width(x->cols(), w->cols(), "width of x"), same_width(targets->cols(), w->rows(), "width of targets"),
      same_width(targets->rows(), x->rows(), "rows of targets");
  if (options.k < 1 || options.k > w->rows())
    throw_invalid("k must be between 1 and the number of experts (" + std::to_string(w->rows()) + "), found " +
                  std::to_string(options.k));
  return Job<RouterCalibration>::start(
      info.Env(), info[4], [w, x, targets, options] { return calibrate_router(*w, *x, *targets, options); },
      [](Napi::Env env, RouterCalibration& r) -> Napi::Value {
        Napi::Object result = Napi::Object::New(env);
        result["weight"] = wrap_tensor(env, std::move(r.weight));
        result["iterations"] = r.iterations;
        result["lossBefore"] = r.loss_before;
        result["lossAfter"] = r.loss_after;
        return result;
      });
}

Napi::Value js_round_router(Info info) {
  const auto w = float_matrix_from(info[0], "w", DType::f32);
  const auto f = HessianFactorHandle::from(info[1], "factor");
  const DType dtype = dtype_from(info[2]);
  same_width(w->cols(), f->n, "width of w");
  return Job<Tensor>::start(
      info.Env(), info[3], [w, f, dtype] { return round_against_inputs(*w, *f, dtype); }, tensor_value);
}

Napi::Value js_linear(Info info) {
  const auto x = float_matrix_from(info[0], "x", DType::f32);
  auto w = std::make_shared<Matrix>(matrix_from(info[1], "w"));
  std::shared_ptr<Tensor> bias;
  if (!info[2].IsUndefined() && !info[2].IsNull()) bias = float_matrix_from(info[2], "bias");
  const Activations activations = activations_from(info[3]);
  same_width(x->cols(), in_features(*w), "width of x");
  if (bias) same_width(bias->size(), out_features(*w), "size of bias");
  return Job<Tensor>::start(
      info.Env(), info[4],
      [x, w, bias, activations] {
        Tensor y = Tensor::zeros(DType::f32, {x->rows(), out_features(*w)});
        linear(x->f32(), x->cols(), x->rows(), *w, bias.get(), 0, y.f32(), y.cols(), activations);
        return y;
      },
      tensor_value);
}

Napi::Value js_token_nll(Info info) {
  const auto logits = float_matrix_from(info[0], "logits", DType::f32);
  auto targets = i32_from(info[1], "targets");
  same_width(int64_t(targets.size()), logits->rows(), "number of targets");
  for (int32_t t : targets)
    if (t < -1 || t >= logits->cols()) throw_invalid("target " + std::to_string(t) + " is outside the vocabulary");
  return Job<std::vector<double>>::start(
      info.Env(), info[2],
      [logits, targets = std::move(targets)] {
        std::vector<double> nll(targets.size());
        token_nll(logits->f32(), logits->rows(), logits->cols(), targets.data(), nll.data());
        return nll;
      },
      f64_value);
}

Napi::Value js_kl_divergence(Info info) {
  const auto p = float_matrix_from(info[0], "p", DType::f32), q = float_matrix_from(info[1], "q", DType::f32);
  same_width(p->rows(), q->rows(), "rows of q"), same_width(p->cols(), q->cols(), "width of q");
  return Job<std::vector<double>>::start(
      info.Env(), info[2],
      [p, q] {
        std::vector<double> kl(static_cast<size_t>(p->rows()));
        kl_divergence(p->f32(), q->f32(), p->rows(), p->cols(), kl.data());
        return kl;
      },
      f64_value);
}

Napi::Value js_top_rows(Info info) {
  const auto x = float_matrix_from(info[0], "x", DType::f32);
  const int64_t column = info[1].ToNumber().Int64Value(), count = info[2].ToNumber().Int64Value();
  auto exclude = i32_from(info[3], "exclude");
  if (column < 0 || column >= x->cols() || count < 0) throw_invalid("no such column or count");
  return Job<std::vector<int32_t>>::start(
      info.Env(), info[4],
      [x, column, count, exclude = std::move(exclude)] {
        std::vector<bool> out(static_cast<size_t>(x->rows()), false);
        for (int32_t i : exclude)
          if (i >= 0 && i < x->rows()) out[size_t(i)] = true;
        std::vector<int32_t> rows;
        for (int32_t i = 0; i < x->rows(); i++)
          if (!out[size_t(i)]) rows.push_back(i);
        const auto value = [&](int32_t i) { return x->f32()[i * x->cols() + column]; };
        const size_t n = std::min(rows.size(), size_t(count));
        std::partial_sort(rows.begin(), rows.begin() + int64_t(n), rows.end(),
                          [&](int32_t a, int32_t b) { return value(a) > value(b) || (value(a) == value(b) && a < b); });
        rows.resize(n);
        return rows;
      },
      [](Napi::Env env, std::vector<int32_t>& v) -> Napi::Value {
        auto a = Napi::Int32Array::New(env, v.size());
        std::copy(v.begin(), v.end(), a.Data());
        return a;
      });
}

}  // namespace

void define_kernels(Napi::Env env, Napi::Object exports) {
  const auto add = [&](const char* name, Napi::Value (*f)(Info)) { exports[name] = Napi::Function::New(env, f, name); };
  add("cast", exported<cast>);
  add("gatherRows", exported<gather_rows>);
  add("scanTensor", exported<scan_tensor>);
  add("quantizeRtn", exported<js_quantize_rtn>);
  add("accumulateHessian", exported<js_accumulate_hessian>);
  add("accumulateCross", exported<js_accumulate_cross>);
  add("factorHessian", exported<js_factor_hessian>);
  add("twoStreamTarget", exported<js_two_stream_target>);
  add("quantizeGptq", exported<js_quantize_gptq>);
  add("packCodes", exported<js_pack_codes>);
  add("fromGptq", exported<js_from_gptq>);
  add("calibrateRouter", exported<js_calibrate_router>);
  add("roundRouter", exported<js_round_router>);
  add("linear", exported<js_linear>);
  add("tokenNll", exported<js_token_nll>);
  add("klDivergence", exported<js_kl_divergence>);
  add("topRows", exported<js_top_rows>);
}

}  // namespace eac::addon
