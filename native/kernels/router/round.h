// Storing a router in 16 bit without losing what its calibration gained.
//
// SHAPES      w (E × d) f32; the factor U of the Hessian of the router's inputs, H^-1 = U^T U (d × d)
// DEFINITION  GPTQ on the grid of the storage dtype: channels are rounded one after the other, in the factor's order, and each one's error
//             is spread over those that follow, so that the logits change least over the inputs that H describes.
//             At 3 bit the plain rounding of a calibrated router to bf16 costs about a tenth of what the calibration gained.
#pragma once
#include "kernels/quant/quantize.h"

namespace eac {

// dtype: f16 or bf16 (f32 is returned as it is).
Tensor round_against_inputs(const Tensor& w, const HessianFactor& f, DType dtype);

}  // namespace eac
