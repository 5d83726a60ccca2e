// What this machine can do at best, measured on the pool's threads with the instruction set in use: what the bench divides by.
//
// DEFINITION  read_bandwidth  bytes a second read from a buffer far larger than the caches, four streams a thread
//             fma_peak        f32 operations a second, int8_peak operations a second on 8-bit operands with sums widened to 32 bits, both
//                             on registers alone; a multiply-add is two operations
//             Each is the best of several passes: other work on the machine can only lower it.
#pragma once
#include <cstddef>

namespace eac {

struct MachineLimits {
  double read_bandwidth, fma_peak, int8_peak;
  size_t buffer_bytes;
  int threads;
  const char* isa;
};

// Sets the pool to `threads` for the time of the measurement: run nothing else beside it.
MachineLimits measure_limits(int threads, size_t buffer_bytes);

// 1 GiB, or a quarter of the machine's memory where that is less.
size_t default_limit_buffer();

}  // namespace eac
