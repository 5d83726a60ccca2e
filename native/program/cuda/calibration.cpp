#include "program/cuda/calibration.h"

#include <algorithm>
#include <numeric>

namespace eac::cuda {
namespace {

// On the device, or null for none.
std::shared_ptr<float> weights_on(Gpu& gpu, const float* weights, int64_t n) {
  return weights ? gpu.upload(std::vector<float>(weights, weights + n)) : nullptr;
}

class CudaCalibration : public Calibration {
 public:
  explicit CudaCalibration(Gpu& gpu) : gpu_(gpu) {}

  void gather_rows(const Tensor& x, const std::vector<int32_t>& indices, Tensor& out) override {
    const auto rows = gpu_.upload(indices);
    call<GatherRows>(gpu_.table().gather_rows, {x.f32(), rows.get(), int64_t(indices.size()), x.cols(), out.f32()});
  }

  void accumulate_hessian(Tensor& h, const Tensor& x, const float* weights) override {
    const auto w = weights_on(gpu_, weights, x.rows());
    call<Hessian>(gpu_.table().hessian, {x.f32(), x.rows(), x.cols(), w.get(), h.f32()});
  }

  void accumulate_cross(Tensor& d, const Tensor& x_full, const Tensor& x, const float* weights) override {
    const auto w = weights_on(gpu_, weights, x.rows());
    call<Cross>(gpu_.table().cross, {x_full.f32(), x.f32(), x.rows(), x.cols(), w.get(), d.f32()});
  }

  HessianFactor factor_hessian(const Tensor& h, double damping, bool act_order) override {
    const int64_t n = h.cols();
    HessianFactor f;
    f.n = n, f.act_order = act_order;
    f.u = Tensor::zeros(DType::f32, {n, n}, &gpu_);
    const Tensor order = Tensor::zeros(DType::i32, {n}, &gpu_), diagonal = Tensor::zeros(DType::f32, {n}, &gpu_);
    call<Factor>(gpu_.table().factor, {h.f32(), n, damping, act_order, order.i32(), diagonal.f32(), f.u.f32()});
    const Tensor o = order.on_host(), d = diagonal.on_host();
    f.order.assign(o.i32(), o.i32() + n);
    f.diagonal.assign(d.f32(), d.f32() + n);
    return f;
  }

  Tensor two_stream_target(const Tensor& w, const HessianFactor& f, const Tensor& d, float beta) override {
    const Tensor weight = gpu_.take(w), u = gpu_.take(f.u), cross = gpu_.take(d);
    const auto order = gpu_.upload(f.order);
    Tensor out = Tensor::zeros(DType::f32, {w.rows(), w.cols()}, &gpu_);
    call<TwoStream>(gpu_.table().two_stream,
                    {storage_of(w.dtype), weight.data, w.rows(), f.n, order.get(), u.f32(), cross.f32(), beta, out.f32()});
    return out;
  }

  GptqResult quantize_gptq(const Tensor& w, const HessianFactor& f, const QuantOptions& o) override {
    const int64_t rows = w.rows(), cols = w.cols(), groups = (cols + o.group_size - 1) / o.group_size;
    const Tensor weight = gpu_.take(w), u = gpu_.take(f.u);
    const auto order = gpu_.upload(f.order);
    const auto importance = gpu_.upload(f.diagonal);
    const Tensor codes = Tensor::zeros(DType::u8, {rows, cols}, &gpu_), scales = Tensor::zeros(DType::f16, {rows, groups}, &gpu_),
                 zeros = Tensor::zeros(DType::u8, {rows, groups}, &gpu_), errors = Tensor::zeros(DType::f64, {rows}, &gpu_);
    call<Quantize>(gpu_.table().quantize, {storage_of(w.dtype), weight.data, rows, cols, o.bits, o.group_size, o.symmetric,
                                           o.clip_search, f.act_order, importance.get(), order.get(), u.f32(),
                                           codes.as<uint8_t>(), scales.as<uint16_t>(), zeros.as<uint8_t>(), errors.as<double>()});
    const Tensor e = errors.on_host();
    const double sum = std::accumulate(e.as<double>(), e.as<double>() + rows, 0.0);
    return {pack_codes(codes.on_host(), scales.on_host(), zeros.on_host(), o.bits, o.group_size, o.symmetric),
            rows > 0 ? sum / double(rows) : 0};
  }

  RouterCalibration calibrate_router(const Tensor& w, const Tensor& x, const Tensor& targets,
                                     const RouterCalibrationOptions& o) override {
    const auto weight = gpu_.upload(elements(w.on_host()));
    const Tensor out = Tensor::zeros(DType::f32, {w.rows(), w.cols()}, &gpu_);
    RouterCalibration r;
    int32_t iterations = 0;
    double loss[2] = {};
    call<CalibrateRouter>(gpu_.table().calibrate_router, {weight.get(), x.f32(), targets.f32(), w.rows(), w.cols(), x.rows(), o.k,
                                                          o.ridge, o.tolerance, o.max_iterations, out.f32(), &iterations, loss});
    r.weight = out.on_host();
    r.iterations = iterations, r.loss_before = loss[0], r.loss_after = loss[1];
    return r;
  }

 private:
  template <class Arguments> void call(Status (*f)(Context*, const Arguments*), const Arguments& a) {
    gpu_.run([&](const Stream& s) { s(f(s.context(), &a)); });
  }
  Gpu& gpu_;
};

}  // namespace

std::unique_ptr<Calibration> calibration(Gpu& gpu) { return std::make_unique<CudaCalibration>(gpu); }

}  // namespace eac::cuda
