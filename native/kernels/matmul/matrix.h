// A weight matrix (out × in) in whatever form the checkpoint gave it.
#pragma once
#include <memory>
#include <variant>

#include "core/tensor.h"
#include "kernels/quant/quant_matrix.h"

namespace eac {

using Matrix = std::variant<Tensor, QuantMatrix>;  // Tensor: f32, f16 or bf16 (out, in)

inline int64_t out_features(const Matrix& m) {
  return std::visit(
      [](const auto& v) -> int64_t {
        if constexpr (std::is_same_v<std::decay_t<decltype(v)>, Tensor>)
          return v.rows();
        else
          return v.rows;
      },
      m);
}
inline int64_t in_features(const Matrix& m) {
  return std::visit(
      [](const auto& v) -> int64_t {
        if constexpr (std::is_same_v<std::decay_t<decltype(v)>, Tensor>)
          return v.cols();
        else
          return v.cols;
      },
      m);
}

}  // namespace eac
