// Times of operations on the device, beside the rates measured in the same run and what is asked of them.
//
// SAMPLES     Of 20 ms at least, by the host's clock; a time is the median of seven.
// QUEUED      Calls one after the other, as in prefill and calibration: for operations that take longer than the host needs to queue them.
// RECORDED    A CUDA graph of calls, as the product decodes. Call i has weights or caches of its own, so many of them that none comes back
//             before 256 MB of others were read: as in decoding, layer after layer, they come from memory, not from the L2. Other inputs are the
//             same each time and lie in the L2, as what the operation before has just written.
// EMULATION   Shows only that all this runs: sizes are small, samples single calls.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "cuda/check.h"

namespace eac::cuda::check {

// A size: as it is, under emulation a 64th, in multiples of 32.
int64_t scaled(int64_t n);
// How many weights (or caches) of so many bytes a recorded sequence takes in turn.
int64_t operands_of(double bytes);

// What a call touches at least. Operations are of matrix products in bf16, a multiply-add is two.
struct Cost {
  double bytes = 0, operations = 0;
};
struct Timing {
  double seconds;
  double share;  // of the copy bandwidth, or of the matrix rate; NaN: no such rate was measured
};
// Each prints a line.
Timing timed(const std::string& name, const Cost& cost, const std::function<void()>& call);
Timing timed_recorded(const std::string& name, const Cost& cost, int64_t operands, const std::function<void(int64_t)>& call);
// Seconds of a queued call of each, samples in turn.
std::vector<double> time_in_turn(const std::vector<std::function<void()>>& calls);

// What is asked of a value: a lower limit (met from it on), or an upper one (met below it).
struct Goal {
  enum { at_least, below } kind;
  double limit;
};
// Prints whether `value` (NaN: not measured) meets its goal, and keeps it for the summary: values of one line stand side by side.
void judge(const std::string& line, double value, const Goal& goal);
void print_summary();

// Uniform routing, as in the CPU's benchmarks: top_k different experts a token, (tokens, top_k).
std::vector<int32_t> uniform_choices(int64_t tokens, int64_t experts, int64_t top_k, unsigned seed);
// Pairs of each expert in the timed prefills of Mixtral's shape, a line for each number of tokens: PyTorch takes the same.
void print_loads();
// The copy bandwidth; EAC_MOE_PYTORCH has what scripts/cuda/torch_rate.py printed.
void measure_limits();
// Of PyTorch, by name; NaN: not measured.
double pytorch(const std::string& name);

}  // namespace eac::cuda::check
