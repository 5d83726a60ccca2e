// What calibration computes, where its operands lie.
#include "addon/arguments.h"
#include "kernels/router/round.h"
#include "program/calibration.h"

#include <numeric>

namespace eac::addon {
namespace {

using Operands = std::initializer_list<std::shared_ptr<Tensor>>;

Calibration& calibration_at(Device* device) { return backend_at(device).calibration(); }
// All of them on one device.
Calibration& calibration_of(const Operands& operands) {
  Device* device = (*operands.begin())->device;
  for (const auto& t : operands)
    if (t->device != device) throw_invalid("the operands lie on different devices");
  return calibration_at(device);
}

Napi::Value gather_rows(Info info) {
  const auto x = matrix_anywhere(info[0], "x", DType::f32), out = matrix_anywhere(info[2], "out", DType::f32);
  auto indices = i32_from(info[1], "indices");
  same_width(out->cols(), x->cols(), "width of out");
  same_width(out->rows(), int64_t(indices.size()), "rows of out");
  for (int32_t i : indices)
    if (i < 0 || i >= x->rows())
      throw_invalid("row index " + std::to_string(i) + " of a tensor with " + std::to_string(x->rows()) + " rows");
  return Job<bool>::start(
      info.Env(), info[3],
      [x, out, indices = std::move(indices)] {
        calibration_of({x, out}).gather_rows(*x, indices, *out);
        return true;
      },
      undefined_value);
}

Napi::Value js_accumulate_hessian(Info info) {
  const auto h = matrix_anywhere(info[0], "h", DType::f32), x = matrix_anywhere(info[1], "x", DType::f32);
  same_width(h->cols(), x->cols(), "width of h"), same_width(h->rows(), x->cols(), "height of h");
  auto weights = weights_from(info[2], x->rows(), "weights");
  return Job<bool>::start(
      info.Env(), info[3],
      [h, x, weights = std::move(weights)] {
        calibration_of({h, x}).accumulate_hessian(*h, *x, weights.empty() ? nullptr : weights.data());
        return true;
      },
      undefined_value);
}

Napi::Value js_accumulate_cross(Info info) {
  const auto d = matrix_anywhere(info[0], "d", DType::f32), xf = matrix_anywhere(info[1], "xFull", DType::f32),
             x = matrix_anywhere(info[2], "x", DType::f32);
  same_width(d->cols(), x->cols(), "width of d"), same_width(d->rows(), x->cols(), "height of d");
  same_width(xf->cols(), x->cols(), "width of xFull"), same_width(xf->rows(), x->rows(), "rows of xFull");
  auto weights = weights_from(info[3], x->rows(), "weights");
  return Job<bool>::start(
      info.Env(), info[4],
      [d, xf, x, weights = std::move(weights)] {
        calibration_of({d, xf, x}).accumulate_cross(*d, *xf, *x, weights.empty() ? nullptr : weights.data());
        return true;
      },
      undefined_value);
}

Napi::Value js_factor_hessian(Info info) {
  const auto h = matrix_anywhere(info[0], "h", DType::f32);
  same_width(h->rows(), h->cols(), "h must be square");
  const double damping = info[1].ToNumber().DoubleValue();
  if (!(damping > 0)) throw_invalid("damping must be positive");
  const bool act_order = info[2].ToBoolean();
  return Job<HessianFactor>::start(
      info.Env(), info[3], [h, damping, act_order] { return calibration_of({h}).factor_hessian(*h, damping, act_order); },
      [](Napi::Env env, HessianFactor& f) {
        return HessianFactorHandle::wrap(env, std::make_shared<HessianFactor>(std::move(f)));
      });
}

Napi::Value js_two_stream_target(Info info) {
  const auto w = matrix_anywhere(info[0], "w"), d = matrix_anywhere(info[2], "d", DType::f32);
  const auto f = HessianFactorHandle::from(info[1], "factor");
  const float beta = info[3].ToNumber().FloatValue();
  same_width(w->cols(), f->n, "width of w"), same_width(d->cols(), f->n, "width of d"),
      same_width(d->rows(), f->n, "height of d");
  return Job<Tensor>::start(
      info.Env(), info[4], [w, f, d, beta] { return calibration_of({d}).two_stream_target(*w, *f, *d, beta); }, tensor_value);
}

Napi::Value js_quantize_gptq(Info info) {
  const auto w = matrix_anywhere(info[0], "w");
  const auto f = HessianFactorHandle::from(info[1], "factor");
  const QuantOptions o = quant_options(info[2]);
  same_width(w->cols(), f->n, "width of w");
  return Job<GptqResult>::start(
      info.Env(), info[3], [w, f, o] { return calibration_at(f->u.device).quantize_gptq(*w, *f, o); },
      [](Napi::Env env, GptqResult& r) -> Napi::Value {
        Napi::Object result = Napi::Object::New(env);
        result["error"] = r.error;
        result["matrix"] = quant_matrix_value(env, r.matrix);
        return result;
      });
}

Napi::Value js_calibrate_router(Info info) {
  const auto w = matrix_anywhere(info[0], "w"), x = matrix_anywhere(info[1], "x", DType::f32),
             targets = matrix_anywhere(info[2], "targets", DType::f32);
  const Napi::Object o = info[3].As<Napi::Object>();
  RouterCalibrationOptions options{int64_t(number_from(o, "k")), number_from(o, "ridge"), number_from(o, "tolerance"),
                                   int(number_from(o, "maxIterations"))};
  same_width(x->cols(), w->cols(), "width of x"), same_width(targets->cols(), w->rows(), "width of targets"),
      same_width(targets->rows(), x->rows(), "rows of targets");
  if (options.k < 1 || options.k > w->rows())
    throw_invalid("k must be between 1 and the number of experts (" + std::to_string(w->rows()) + "), found " +
                  std::to_string(options.k));
  return Job<RouterCalibration>::start(
      info.Env(), info[4],
      [w, x, targets, options] {
        return calibration_of({x, targets}).calibrate_router(*w, *x, *targets, options);
      },
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
  const auto w = matrix_anywhere(info[0], "w", DType::f32);
  const auto f = HessianFactorHandle::from(info[1], "factor");
  const DType dtype = dtype_from(info[2]);
  same_width(w->cols(), f->n, "width of w");
  return Job<Tensor>::start(
      info.Env(), info[3],
      [w, f, dtype] {
        HessianFactor factor = *f;
        factor.u = f->u.on_host();
        return round_against_inputs(*w, factor, dtype);
      },
      tensor_value);
}

Napi::Value js_top_rows(Info info) {
  const auto x = matrix_anywhere(info[0], "x", DType::f32);
  const int64_t column = info[1].ToNumber().Int64Value(), count = info[2].ToNumber().Int64Value();
  auto exclude = i32_from(info[3], "exclude");
  if (column < 0 || column >= x->cols() || count < 0) throw_invalid("no such column or count");
  return Job<std::vector<int32_t>>::start(
      info.Env(), info[4],
      [any = x, column, count, exclude = std::move(exclude)] {
        const Tensor host = any->on_host(), *x = &host;
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

void define_calibration(Napi::Object exports) {
  define<gather_rows>(exports, "gatherRows");
  define<js_accumulate_hessian>(exports, "accumulateHessian");
  define<js_accumulate_cross>(exports, "accumulateCross");
  define<js_factor_hessian>(exports, "factorHessian");
  define<js_two_stream_target>(exports, "twoStreamTarget");
  define<js_quantize_gptq>(exports, "quantizeGptq");
  define<js_calibrate_router>(exports, "calibrateRouter");
  define<js_round_router>(exports, "roundRouter");
  define<js_top_rows>(exports, "topRows");
}

}  // namespace eac::addon
