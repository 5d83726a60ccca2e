// The parameters of one quantization group, shared by round to nearest and GPTQ.
//
// DEFINITION  lo = min(0, min w), hi = max(0, max w); symmetric: hi = max(-lo, hi), lo = -hi.
//             scale = f16((hi - lo) / (2^bits - 1)), zero = round(-lo / scale) limited to 2^bits - 1; symmetric: zero = 2^(bits-1).
//             code = limit(round(w / scale) + zero, 0, 2^bits - 1). All rounding is half to even.
//             Clip search: the range times 1, .95, .90 ... .40; the first that gives the least sum of importance * (w - q)^2.
// LIMITS      the scale stays within [1e-7, 65504] before it is rounded to f16, so it is neither 0 nor infinite.
#pragma once
#include <cstdint>

#include "kernels/quant/quantize.h"

namespace eac {

struct GroupParams {
  uint16_t scale_f16;
  uint8_t zero;
  float scale() const { return f16_to_f32(scale_f16); }
};

// w (n) contiguous; importance (n) or null.
GroupParams fit_group(const float* w, int64_t n, const QuantOptions& o, const float* importance);

// round(w / scale), limited so that adding the zero point gives a code; `low` = -zero, `high` = 2^bits - 1 - zero.
// Limiting first keeps |x| small, so that adding 1.5 * 2^23 rounds half to even without a library call. NaN becomes `low`.
inline float round_limited(float w, float scale, float low, float high) {
  constexpr float magic = 12582912.0f;
  float x = w / scale;
  x = x > low ? x : low;
  x = x < high ? x : high;
  return (x + magic) - magic;
}

inline void quantize_group(const float* w, int64_t n, GroupParams p, int bits, uint8_t* codes) {
  const float scale = p.scale(), zero = p.zero, low = -zero, high = float((1 << bits) - 1) - zero;
  for (int64_t i = 0; i < n; i++) codes[i] = uint8_t(int(round_limited(w[i], scale, low, high) + zero));
}

// One row of W as f32. Throws Error("NON_FINITE") for NaN or infinity, which no code can hold.
void load_row(const Tensor& w, int64_t row, float* out);

// Codes of one panel, u8 (up to 16 rows, cols), into the layout of quant_matrix.h.
void pack_panel(const uint8_t* codes, int64_t panel, QuantMatrix& q);

// A matrix with empty codes, after checking the options and the shape.
QuantMatrix make_quant_matrix(int64_t rows, int64_t cols, int bits, int64_t group_size, bool symmetric);
void require_weight(const Tensor& w);

}  // namespace eac
