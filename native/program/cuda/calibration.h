#pragma once
#include "program/calibration.h"
#include "program/cuda/device.h"

namespace eac::cuda {

// By the CUDA library, on this device.
std::unique_ptr<Calibration> calibration(Gpu& gpu);

}  // namespace eac::cuda
