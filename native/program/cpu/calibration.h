// The kernels of kernels/quant and kernels/router on the host's memory.
#pragma once
#include "program/calibration.h"

namespace eac {

class CpuCalibration : public Calibration {
 public:
  void gather_rows(const Tensor& x, const std::vector<int32_t>& indices, Tensor& out) override;
  void accumulate_hessian(Tensor& h, const Tensor& x, const float* weights) override;
  void accumulate_cross(Tensor& d, const Tensor& x_full, const Tensor& x, const float* weights) override;
  HessianFactor factor_hessian(const Tensor& h, double damping, bool act_order) override;
  Tensor two_stream_target(const Tensor& w, const HessianFactor& f, const Tensor& d, float beta) override;
  GptqResult quantize_gptq(const Tensor& w, const HessianFactor& f, const QuantOptions& o) override;
  RouterCalibration calibrate_router(const Tensor& w, const Tensor& x, const Tensor& targets,
                                     const RouterCalibrationOptions& o) override;
};

}  // namespace eac
