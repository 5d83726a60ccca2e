// What calibration computes on stored activations, on the device where they lie (kernels/quant/quantize.h, kernels/router/calibrate.h).
#pragma once
#include <vector>

#include "kernels/quant/quantize.h"
#include "kernels/router/calibrate.h"

namespace eac {

// Activations (x, x_full, targets) and sums over them (h, d) lie in the backend's memory, weights there or on the host. What comes back lies in
// the backend's memory where it has the size of a matrix of weights or of a Hessian, but quantized matrices and routers on the host.
class Calibration {
 public:
  virtual ~Calibration() = default;
  virtual void gather_rows(const Tensor& x, const std::vector<int32_t>& indices, Tensor& out) = 0;  // out[i] = x[indices[i]]
  virtual void accumulate_hessian(Tensor& h, const Tensor& x, const float* weights) = 0;            // weights: on the host
  virtual void accumulate_cross(Tensor& d, const Tensor& x_full, const Tensor& x, const float* weights) = 0;
  virtual HessianFactor factor_hessian(const Tensor& h, double damping, bool act_order) = 0;
  virtual Tensor two_stream_target(const Tensor& w, const HessianFactor& f, const Tensor& d, float beta) = 0;
  virtual GptqResult quantize_gptq(const Tensor& w, const HessianFactor& f, const QuantOptions& o) = 0;
  virtual RouterCalibration calibrate_router(const Tensor& w, const Tensor& x, const Tensor& targets,
                                             const RouterCalibrationOptions& o) = 0;
};

// By the kernels of kernels/quant and kernels/router.
Calibration& cpu_calibration();

}  // namespace eac
