// What the operations of calibration share: whose scratch memory is whose, and what kernels find wrong.
#pragma once
#include "kernels/cuda/context.cuh"

namespace eac::cuda {

// Operations call each other, so each has its own scratch memory.
enum Slot {
  slot_split_a,
  slot_split_b,
  slot_partial,
  slot_matrix,   // factor: the f64 matrix
  slot_blocks,   // factor: inverses of its diagonal blocks, a panel
  slot_weights,  // quantize, two-stream: f32 (rows, cols)
  slot_ordered,  // the same in the factor's order
  slot_errors,   // GPTQ: a block's errors
  slot_gram,     // router: Hessian and factor
  slot_tokens,   // router: by token
  slot_rows,     // router: by expert
  slot_findings,
};
static_assert(slot_findings < Context::scratches);

__device__ __forceinline__ bool is_finite(double v) { return fabs(v) <= 1.7976931348623157e308; }
__device__ __forceinline__ bool is_finite(float v) { return fabsf(v) <= 3.402823466e38f; }

// Kernels set bits of one number on the device, which is read once at the end.
int32_t* clear_findings(Context&);
int32_t read_findings(Context&);  // waits for the stream
// Sets `bit` if one of x (n) is NaN or infinite.
void find_non_finite(Context&, const float* x, int64_t n, int32_t bit);

}  // namespace eac::cuda
