// The same by the CUDA library.
#pragma once
#include "program/calibration.h"
#include "program/cuda/device.h"

namespace eac::cuda {

class CudaCalibration : public Calibration {
 public:
  explicit CudaCalibration(Gpu& gpu) : gpu_(gpu) {}
  void gather_rows(const Tensor& x, const std::vector<int32_t>& indices, Tensor& out) override;
  void accumulate_hessian(Tensor& h, const Tensor& x, const float* weights) override;
  void accumulate_cross(Tensor& d, const Tensor& x_full, const Tensor& x, const float* weights) override;
  HessianFactor factor_hessian(const Tensor& h, double damping, bool act_order) override;
  Tensor two_stream_target(const Tensor& w, const HessianFactor& f, const Tensor& d, float beta) override;
  GptqResult quantize_gptq(const Tensor& w, const HessianFactor& f, const QuantOptions& o) override;
  RouterCalibration calibrate_router(const Tensor& w, const Tensor& x, const Tensor& targets,
                                     const RouterCalibrationOptions& o) override;

 private:
  template <class Arguments> void call(Status (*f)(Context*, const Arguments*), const Arguments& a);
  Gpu& gpu_;
};

}  // namespace eac::cuda
