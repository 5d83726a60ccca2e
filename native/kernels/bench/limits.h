// What this machine can do, measured on the pool's threads with the instruction set in use: what the bench divides by.
//
// DEFINITION  read_bandwidth  bytes a second read from a buffer far larger than the caches, four streams a thread
//             fma_peak        f32 operations a second, int8_peak operations a second on 8-bit operands with sums widened to 32 bits, both
//                             on registers alone; a multiply-add is two operations
#pragma once
#include <cstddef>

#include "core/tensor.h"

namespace eac {

struct MachineRates {
  double read_bandwidth, fma_peak, int8_peak;
};

// Memory to read from, a multiple of 4 MiB. 0 bytes: 1 GiB, or a quarter of the machine's memory where that is less.
Tensor limit_buffer(size_t bytes);

// One pass of some ten milliseconds for each; pass p reads where pass p - 1 ended. Other work on the machine can only lower the rates: the
// best of many passes are the machine's limits, a pass beside a measurement tells what the machine allowed just then.
MachineRates limit_pass(const Tensor& buffer, int64_t pass);

}  // namespace eac
