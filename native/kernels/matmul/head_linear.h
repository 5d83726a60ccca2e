// Products head by head: what multi-head latent attention needs to work on compressed keys and values.
//
// SHAPES      W (heads * rows × cols): a block of rows for each head, of which the weights take [begin, begin + count)
//             x (n × heads * x_width), out (n × heads * out_width)
// DEFINITION  plain       out[t, h, r] = sum over c of W[h, begin + r, c] * x[t, h, c],   r < count, c < cols
//             transposed  out[t, h, c] = sum over r of W[h, begin + r, c] * x[t, h, r]
//             Channels of x and out beyond these are neither read nor written.
//             Source of the use: DeepSeek-V2 (arXiv 2405.04434, section 2.1.2), where W^UK is absorbed into the queries and W^UV into the output.
// REGULARITY  as linear (gemm.h): a token alone gets the bits that it gets among others.
#pragma once
#include <mutex>

#include "kernels/matmul/matrix.h"

namespace eac {

// Slices of a matrix, made dense when they are first used: in f32 if it is quantized, else as it is stored.
class HeadWeights {
 public:
  HeadWeights(Matrix w, int64_t heads, int64_t begin, int64_t count, bool transposed);
  int64_t heads() const { return heads_; }
  int64_t in() const { return transposed_ ? count_ : cols_; }
  int64_t out() const { return transposed_ ? cols_ : count_; }
  // (heads * out × in)
  const Tensor& dense() const;

 private:
  mutable std::once_flag made_;
  mutable Matrix source_;
  mutable Tensor dense_;
  int64_t heads_, begin_, count_, cols_;
  bool transposed_;
};

void head_linear(const float* x, int64_t x_width, int64_t n, const HeadWeights& w, float* out, int64_t out_width);

}  // namespace eac
