// Grouped quantization of a weight matrix: round to nearest, and GPTQ with a Hessian factor.
// Sources: GPTQ (Frantar et al., 2023); EAC-MoE section 4 for its use; two-stream targets: W* = W + W D H^-1.
#pragma once
#include <cstdint>
#include <optional>

#include "core/tensor.h"
#include "kernels/quant/quant_matrix.h"

namespace eac {

struct QuantOptions {
  int bits = 4;              // 2, 3 or 4
  int64_t group_size = 128;  // positive multiple of 32; larger than cols: one group
  bool symmetric = false;
  bool clip_search = false;  // shrink each group's range by 12 steps down to 0.4, keep what minimises the weighted squared error
};

// Round to nearest. `importance` (cols, f32) weights the clip search; may be null. W: f32, f16 or bf16 (rows, cols).
QuantMatrix quantize_rtn(const Tensor& w, const QuantOptions& o, const float* importance);

// H (n × n) += X^T diag(w) X, X (m × n); w (m) or null. f32.
void accumulate_hessian(Tensor& h, const Tensor& x, const float* weights);
// D (n × n) += (X_full - X)^T diag(w) X: row i belongs to the full-precision difference, column j to x_j.
void accumulate_cross(Tensor& d, const Tensor& x_full, const Tensor& x, const float* weights);

// H damped by `damping` times its mean diagonal (1 if that is 0), columns optionally ordered by falling diagonal, factored in f64
// as H^-1 = U^T U with U upper triangular. A channel without energy keeps only the damping, so it falls back to rounding.
struct HessianFactor {
  int64_t n = 0;
  bool act_order = false;
  std::vector<int32_t> order;   // order[i] = channel at position i
  std::vector<float> diagonal;  // damped diagonal by channel (unpermuted)
  Tensor u;                     // f32 (n, n), upper triangular, in permuted order
};
HessianFactor factor_hessian(const Tensor& h, double damping, bool act_order);

// W* = W + beta * W D H^-1 (f32, rows × cols): the weights that reproduce the full-precision stream's output on the quantized stream.
Tensor two_stream_target(const Tensor& w, const HessianFactor& f, const Tensor& d, float beta);

struct GptqResult {
  QuantMatrix matrix;
  double error;  // tr((W - Q) H (W - Q)^T) / rows with the damped H, taken from GPTQ's own residuals
};
// GPTQ. With act_order the group parameters are those of the original column order ("static groups"), so groups stay contiguous;
// without it they come from the updated weights when the group's first column is reached.
GptqResult quantize_gptq(const Tensor& w, const HessianFactor& f, const QuantOptions& o);

// The parts as plain matrices, and back: codes u8 (rows, cols), scales f16 and zeros u8 (rows, groups).
Tensor unpack_codes(const QuantMatrix& q);
Tensor unpack_scales(const QuantMatrix& q);
Tensor unpack_zeros(const QuantMatrix& q);
QuantMatrix pack_codes(const Tensor& codes, const Tensor& scales_f16, const Tensor& zeros_u8, int bits, int64_t group_size,
                       bool symmetric);
Tensor dequantize(const QuantMatrix& q);  // f32 (rows, cols)

// The GPTQ v2 checkpoint layout ("true zero points"), as GPTQModel writes it:
//   qweight i32 (ceil(cols/32)*bits, rows): 32 consecutive input channels of one output channel fill `bits` words, bit i*bits.. of that
//           little-endian string holding code i (for 3 bit a code may straddle two words)
//   qzeros  i32 (groups, ceil(rows/32)*bits): zero points packed the same way along the output channels
//   scales  f16 (groups, rows)
//   g_idx   i32 (cols): channel / group_size
struct GptqTensors {
  Tensor qweight, qzeros, scales, g_idx;
};
GptqTensors to_gptq(const QuantMatrix& q);
QuantMatrix from_gptq(const GptqTensors& t, int64_t rows, int64_t cols, int bits, int64_t group_size, bool symmetric);

// The oracles: plain scalar loops, f64 where it matters.
QuantMatrix quantize_rtn_reference(const Tensor& w, const QuantOptions& o, const float* importance);
GptqResult quantize_gptq_reference(const Tensor& w, const Tensor& h, double damping, bool act_order, const QuantOptions& o);

}  // namespace eac
