// Normalisations, row by row, f32 with the sums in f64.
// SHAPES  x, y (n × d), may alias; weight, bias (d) in f32, f16 or bf16.
//   rms    y = x / sqrt(mean(x^2) + eps) * weight                       (Zhang & Sennrich, 2019)
//   layer  y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias       (Ba et al., 2016)
#pragma once
#include "core/tensor.h"

namespace eac {

void rms_norm(const float* x, int64_t n, int64_t d, const Tensor& weight, float eps, float* y);
void layer_norm(const float* x, int64_t n, int64_t d, const Tensor& weight, const Tensor& bias, float eps, float* y);

}  // namespace eac
