// Weights for benchmarks: built at the speed of memory, the same for the same seed on every machine and number of threads.
//
// DEFINITION  quantized: codes and zero points uniform over their values, scales so that products of unit inputs have about unit size;
//             dense: uniform in ±sqrt(3 / cols), that is variance 1 / cols.
// LIMITS      quantized: cols a multiple of 32, so that no padding channel gets a code.
#pragma once
#include <cstdint>

#include "kernels/quant/quant_matrix.h"

namespace eac {

QuantMatrix random_quant_matrix(int64_t rows, int64_t cols, int bits, int64_t group_size, bool symmetric, uint64_t seed);
// f32, f16 or bf16.
Tensor random_matrix(int64_t rows, int64_t cols, DType dtype, uint64_t seed);

}  // namespace eac
