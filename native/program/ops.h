// The operations that a program is made of: registers by number, weights by value (tensors share their memory).
// The meaning of each is documented in types/native.d.ts, which mirrors this file, and with its kernel.
#pragma once
#include <memory>
#include <optional>
#include <variant>
#include <vector>

#include "kernels/matmul/head_linear.h"
#include "kernels/matmul/matrix.h"
#include "kernels/moe/experts.h"
#include "kernels/nn/attention.h"
#include "kernels/router/select.h"

namespace eac::op {

using Register = int32_t;

struct Embed {
  Register out;
  Tensor table;
  float scale;
};
struct RmsNorm {
  Register x, out;
  Tensor weight;
  float eps;
};
struct LayerNorm {
  Register x, out;
  Tensor weight, bias;
  float eps;
};
struct Linear {
  Register x, out;
  Matrix weight;
  std::optional<Tensor> bias;
  bool add;
};
struct Rope {
  Register x;
  eac::Rope rope;
};
struct Attention {
  Register q, k, v, out;
  eac::Attention attention;
};
struct Route {
  Register logits, weights, indices, counts;
  RouterSpec router;
};
struct Reselect {
  Register logits, weights, indices, counts;
  RouterSpec router;
};
struct Experts {
  Register x, weights, indices, out;
  eac::Experts experts;
  bool add;
};
struct Glu {
  Register gate, up;
  Activation activation;
};
struct Copy {
  Register x, out;
};
// x *= scale
struct Scale {
  Register x;
  float scale;
};
// out += scale * x
struct AddScaled {
  Register x, out;
  float scale;
};
// Some columns of each head: out[h][to + i] = x[h][from + i]
struct Columns {
  Register x, out;
  int64_t heads, from, to, count;
};
struct HeadLinear {
  Register x, out;
  std::shared_ptr<const HeadWeights> weights;
};
struct LastRows {
  Register x, out;
};
struct Sample {
  Register logits, out;
};

using Op = std::variant<Embed, RmsNorm, LayerNorm, Linear, Rope, Attention, Route, Reselect, Experts, Glu, Copy, Scale, AddScaled,
                        Columns, HeadLinear, LastRows, Sample>;

}  // namespace eac::op
