// Rotary embedding and causal attention with grouped query heads.
#pragma once
#include <vector>

#include "core/tensor.h"
#include "kernels/nn/sequence.h"

namespace eac {

// In place on x (n × heads*head_dim). For pair i of 2*frequencies.size() turning channels and position p:
//   (a, b) -> (a cos - b sin, a sin + b cos) * scale,  angle = p * frequencies[i]
// (a, b) = channels (i, i + dim/2), or (2i, 2i+1) when interleaved. A sequence whose end lies beyond `long_from` tokens uses the long
// frequencies and scale (longrope, arXiv 2402.13753; as in Phi-3.5-MoE's code).
struct Rope {
  int64_t head_dim = 0;
  std::vector<float> frequencies, long_frequencies;
  float scale = 1, long_scale = 1;
  bool interleaved = false;
  int64_t long_from = 0;
  int64_t offset = 0;  // where the turning channels of a head begin
};
void rope(float* x, int64_t width, const std::vector<Sequence>& sequences, const Rope& r);

// SHAPES      q (n × heads*head_dim); k (n × kv_heads*head_dim); v (n × kv_heads*value_dim); out (n × heads*value_dim);
//             heads a multiple of kv_heads; sinks (heads) or empty
// DEFINITION  k and v are appended to the sequence's cache at `layer` (not yet counted in its length); token at position p then attends
//             to positions max(0, p - window + 1) .. p (window 0: from 0):  out = softmax(scale q.k) v.
//             A sink is a logit of its head that joins the softmax's denominator and has no value (gpt-oss).
// REGULARITY  A token's result does not depend on how its sequence was cut into batches, on the rest of the batch or on threads: decoding
//             gives bit for bit what prefill gives (on one instruction set, for finite keys and values).
struct Attention {
  int64_t layer = 0, heads = 0, kv_heads = 0, head_dim = 0, window = 0;
  float scale = 1;
  std::vector<float> sinks = {};
  int64_t value_dim = 0;  // 0: head_dim

  int64_t value_channels() const { return value_dim > 0 ? value_dim : head_dim; }
};
void attention(const float* q, const float* k, const float* v, const std::vector<Sequence>& sequences, const Attention& a,
               float* out);

}  // namespace eac
