// The parts of `linear` that files of their own hold.
#pragma once
#include "kernels/cuda/matmul/product.cuh"

namespace eac::cuda {

// gemv.cu: dense weights, n <= few_rows.
void multiply_few_dense(Context& c, const Linear& l);
// stream_linear.cu: the same for quantized ones.
void multiply_few_quantized(Context& c, const Linear& l);

}  // namespace eac::cuda
