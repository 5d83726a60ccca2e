// The CUDA library, opened at run time: nothing here needs a CUDA header, library or driver.
#pragma once
#include <string>

#include "kernels/cuda/table.h"

namespace eac::cuda {

// The table of the library that EAC_MOE_CUDA names, else of eac_moe_cuda.so beside the addon; null where there is none or no device answers, and
// `why` then says so. Looked for once.
const Table* library(std::string* why = nullptr);

// Throws Error: OUT_OF_MEMORY, NOT_POSITIVE_DEFINITE, NON_FINITE, INVALID_ARGUMENT, or DEVICE for what the driver says.
void check(const Table& table, const Context* context, Status status);

}  // namespace eac::cuda
