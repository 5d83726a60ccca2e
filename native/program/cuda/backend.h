#pragma once
#include <string>

#include "program/backend.h"

namespace eac::cuda {

// Runs programs on the first GPU. Null where there is none; `why` then says so.
Backend* backend(std::string* why = nullptr);

}  // namespace eac::cuda
