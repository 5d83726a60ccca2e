#include "program/calibration.h"

#include <cstring>

#include "core/thread_pool.h"

namespace eac {
namespace {

class CpuCalibration : public Calibration {
 public:
  void gather_rows(const Tensor& x, const std::vector<int32_t>& indices, Tensor& out) override {
    const int64_t d = x.cols();
    parallel_rows(int64_t(indices.size()), 64, [&](int64_t i) {
      std::memcpy(out.f32() + i * d, x.f32() + indices[size_t(i)] * d, size_t(d) * sizeof(float));
    });
  }
  void accumulate_hessian(Tensor& h, const Tensor& x, const float* weights) override { eac::accumulate_hessian(h, x, weights); }
  void accumulate_cross(Tensor& d, const Tensor& x_full, const Tensor& x, const float* weights) override {
    eac::accumulate_cross(d, x_full, x, weights);
  }
  HessianFactor factor_hessian(const Tensor& h, double damping, bool act_order) override {
    return eac::factor_hessian(h, damping, act_order);
  }
  Tensor two_stream_target(const Tensor& w, const HessianFactor& f, const Tensor& d, float beta) override {
    return eac::two_stream_target(w, f, d, beta);
  }
  GptqResult quantize_gptq(const Tensor& w, const HessianFactor& f, const QuantOptions& o) override {
    return eac::quantize_gptq(w, f, o);
  }
  RouterCalibration calibrate_router(const Tensor& w, const Tensor& x, const Tensor& targets,
                                     const RouterCalibrationOptions& o) override {
    return eac::calibrate_router(w, x, targets, o);
  }
};

}  // namespace

Calibration& cpu_calibration() {
  static CpuCalibration calibration;
  return calibration;
}

}  // namespace eac
