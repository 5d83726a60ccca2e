// What the exact and the int8 version of the dispatch share.
#pragma once
#include "kernels/moe/experts.h"

namespace eac {

struct MoeCall {
  const float* x;  // (n, d)
  int64_t n, d;
  const float* weights;  // (n, k)
  int64_t k;
  const float* shared_weights;  // (n), or null without a shared expert
  const Experts& experts;
  float beta;
  float* out;  // (n, d)
};

// The blocks that suit the inputs of all experts, if every matrix is quantized.
std::optional<Int8Blocks> int8_blocks(const Experts& experts);
// For experts that have them.
void run_int8(const MoeCall& c, ExpertsScratch& s);
// out = beta * out + each token's own pairs, weighted; rows (pairs, d).
void add_up(const MoeCall& c, const ExpertsScratch& s, const float* rows);

}  // namespace eac
