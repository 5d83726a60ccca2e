// Products with activations quantized to int8: what inference uses where the weights are quantized.
//
// DEFINITION  see kernels/cpu/int8.inl. A block of activations, 128, 64 or 32 channels, shares one f32 scale, max|x| / 127.
// REGULARITY  An output depends on its token and its row of W only: not on the other tokens, the tiling or the number of threads.
#pragma once
#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/matmul/gemm.h"
#include "kernels/matmul/scratch.h"

namespace eac {

// How linear layers and experts whose weights are quantized treat their inputs: exactly, or as int8.
enum class Activations { f32, int8 };

QuantPanels panels_of(const QuantMatrix& q);

// Channels that share an activation scale: the most that divide the groups of the weights.
int64_t int8_block(const QuantMatrix& q);

// Tokens in int8, in memory that grows to the largest batch and is then reused.
class Int8Rows {
  Scratch q_, scale_, sum_;
  Int8Tokens view_{};

 public:
  // Room for n tokens of `width` channels; contents are lost.
  void reset(int64_t n, int64_t width, int64_t block);
  // Quantizes channels [begin, begin + count) of one token; `begin` a multiple of the block, x points at channel `begin`.
  void set(int64_t token, int64_t begin, const float* x, int64_t count);
  // All tokens, on the pool. x (n, row stride ldx).
  void quantize(const float* x, int64_t ldx, int64_t n, int64_t width, int64_t block);
  const Int8Tokens& view() const { return view_; }
};

// Y (n × out, row stride ldy) = beta * Y + X (n × in, row stride ldx) · W^T (+ bias), X quantized to int8. beta 0 or 1.
void linear_int8(const float* x, int64_t ldx, int64_t n, const QuantMatrix& w, const Tensor* bias, float beta, float* y,
                 int64_t ldy);
// The oracle: plain loops over the definition.
void linear_int8_reference(const float* x, int64_t ldx, int64_t n, const QuantMatrix& w, const Tensor* bias, float beta, float* y,
                           int64_t ldy);

// Dense weights know one way; quantized ones do as `activations` says.
void linear(const float* x, int64_t ldx, int64_t n, const Matrix& w, const Tensor* bias, float beta, float* y, int64_t ldy,
            Activations activations);

}  // namespace eac
