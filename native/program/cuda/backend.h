#pragma once
#include "program/backend.h"

namespace eac::cuda {

// Runs programs on the first GPU. Throws as gpu() does.
Backend& backend();

}  // namespace eac::cuda
