// The CUDA library, opened at run time: nothing here needs a CUDA header, library or driver.
#pragma once
#include <string>

#include "kernels/cuda/table.h"

namespace eac::cuda {

// The table of the library that EAC_MOE_CUDA names, else of eac_moe_cuda.so beside the addon. Throws Error: INVALID_ARGUMENT where there is no library
// or no GPU; FILE_NOT_FOUND or DEVICE where one was meant to be used and cannot: a file that is missing, no library or of another version, a driver
// that is too old or fails. Looked for until it is found.
const Table& library();

// Throws Error: OUT_OF_MEMORY, NOT_POSITIVE_DEFINITE, NON_FINITE, INVALID_ARGUMENT, or DEVICE for what the driver says.
void check(const Table& table, const Context* context, Status status);

}  // namespace eac::cuda
