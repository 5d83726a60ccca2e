// Router calibration: QESC step 2, EAC-MoE section 4, Eq. 5 (TopK-MSE).
//
// SHAPES      W (E × d) router, X (N × d) router inputs on the quantized stream, T (N × E) logits of the full-precision stream.
// DEFINITION  m[t, e] = 1 if T[t, e] is among the K largest of row t (ties: the smaller e), else 0; K = E is plain MSE.
//             For each expert e:  minimise over w   sum_t m[t, e] (x_t . w - T[t, e])^2 + lambda_e |w - W[e]|^2,
//             lambda_e = ridge * mean diagonal of G_e,  G_e = sum_t m[t, e] x_t x_t^T.
//             A convex problem a row; solved for the correction w - W[e] by conjugate gradients on all rows at once, preconditioned by
//             the factor of G = sum_t x_t x_t^T scaled to each row, until the residual falls below `tolerance` times the right-hand side
//             (both in the preconditioned norm). A row whose window is so rare that forming and factoring G_e costs less than
//             `direct_below` iterations is solved that way instead. A row that no token has in its window keeps W[e].
//             A row that does not converge gets its best iterate.
#pragma once
#include "core/tensor.h"

namespace eac {

struct RouterCalibrationOptions {
  int64_t k = 0;  // window, 1..E
  double ridge = 1e-3;
  double tolerance = 1e-5;
  int max_iterations = 100;
  double direct_below = 32;  // 0: iterate on every row
};
struct RouterCalibration {
  Tensor weight;  // f32 (E, d)
  int iterations = 0;
  double loss_before = 0, loss_after = 0;  // Eq. 5: mean squared difference over the windows
};
// w: f32/f16/bf16 (E, d); x: f32 (N, d); targets: f32 (N, E).
RouterCalibration calibrate_router(const Tensor& w, const Tensor& x, const Tensor& targets, const RouterCalibrationOptions& o);
// The oracle: forms every G_e and solves it by Cholesky in f64.
RouterCalibration calibrate_router_reference(const Tensor& w, const Tensor& x, const Tensor& targets,
                                             const RouterCalibrationOptions& o);

}  // namespace eac
