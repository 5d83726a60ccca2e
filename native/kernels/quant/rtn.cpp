// Group parameters and round to nearest.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/thread_pool.h"
#include "kernels/quant/group_params.h"

namespace eac {
namespace {

// Independent partial results, so that the compiler may use vectors without reassociating anything we wrote.
constexpr int lanes = 8;

struct Range {
  float lo = 0, hi = 0;
};

Range range_with_zero(const float* w, int64_t n) {
  float lo[lanes] = {}, hi[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int l = 0; l < lanes; l++) {
      const float v = w[i + l];
      lo[l] = v < lo[l] ? v : lo[l];
      hi[l] = v > hi[l] ? v : hi[l];
    }
  Range r;
  for (; i < n; i++) r = {std::min(r.lo, w[i]), std::max(r.hi, w[i])};
  for (int l = 0; l < lanes; l++) r = {std::min(r.lo, lo[l]), std::max(r.hi, hi[l])};
  return r;
}

GroupParams params_for(Range range, float shrink, const QuantOptions& o) {
  const float top = float((1 << o.bits) - 1);
  const float wanted = (range.hi - range.lo) * shrink / top;
  GroupParams p;
  p.scale_f16 = std::max<uint16_t>(f32_to_f16(std::min(std::max(wanted, 1e-7f), 65504.0f)), 1);  // f16 bits 1 = 2^-24
  if (o.symmetric) {
    p.zero = uint8_t(1 << (o.bits - 1));
  } else {
    p.zero = uint8_t(round_limited(-range.lo * shrink, p.scale(), 0.0f, top));
  }
  return p;
}

template <bool weighted> float group_error(const float* w, int64_t n, GroupParams p, int bits, const float* importance) {
  const float scale = p.scale(), low = -float(p.zero), high = float((1 << bits) - 1) + low;
  float sum[lanes] = {};
  const auto term = [&](int64_t i) {
    const float d = w[i] - round_limited(w[i], scale, low, high) * scale;
    return weighted ? d * d * importance[i] : d * d;
  };
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int l = 0; l < lanes; l++) sum[l] += term(i + l);
  for (int l = 0; i < n; i++, l++) sum[l] += term(i);
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

}  // namespace

GroupParams fit_group(const float* w, int64_t n, const QuantOptions& o, const float* importance) {
  Range range = range_with_zero(w, n);
  if (o.symmetric) {
    range.hi = std::max(-range.lo, range.hi);
    range.lo = -range.hi;
  }
  GroupParams best = params_for(range, 1.0f, o);
  if (!o.clip_search) return best;
  const auto error = [&](GroupParams p) {
    return importance ? group_error<true>(w, n, p, o.bits, importance) : group_error<false>(w, n, p, o.bits, nullptr);
  };
  constexpr int steps = 12;
  constexpr double first = 0.95, last = 0.40;
  float best_error = error(best);
  for (int s = 0; s < steps; s++) {
    const GroupParams p = params_for(range, float(first + s * ((last - first) / (steps - 1))), o);
    if (const float e = error(p); e < best_error) best = p, best_error = e;
  }
  return best;
}

void require_weight(const Tensor& w) {
  require(w.dtype == DType::f32 || w.dtype == DType::f16 || w.dtype == DType::bf16,
          "weights to quantize must be f32, f16 or bf16");
  require(w.shape.size() == 2 && w.cols() > 0, "a weight to quantize must be a matrix (out, in) with at least one column");
}

void load_row(const Tensor& w, int64_t row, float* out) {
  const int64_t n = w.cols();
  switch (w.dtype) {
    case DType::f32: std::copy_n(w.f32() + row * n, n, out); break;
    case DType::bf16:
      for (int64_t i = 0; i < n; i++) out[i] = bf16_to_f32(w.as<uint16_t>()[row * n + i]);
      break;
    default:
      for (int64_t i = 0; i < n; i++) out[i] = f16_to_f32(w.as<uint16_t>()[row * n + i]);
  }
  int bad = 0;
  for (int64_t i = 0; i < n; i++) bad |= !(std::fabs(out[i]) <= std::numeric_limits<float>::max());
  if (bad)
    throw Error("NON_FINITE", "row " + std::to_string(row) + " of the weight holds NaN or infinity and cannot be quantized");
}

QuantMatrix quantize_rtn(const Tensor& w, const QuantOptions& o, const float* importance) {
  require_weight(w);
  QuantMatrix q = make_quant_matrix(w.rows(), w.cols(), o.bits, o.group_size, o.symmetric);
  parallel_for(q.panels(), [&](int64_t panel) {
    std::vector<float> row(q.cols);
    std::vector<uint8_t> codes(quant_panel * q.cols);
    for (int64_t r = panel * quant_panel; r < std::min(q.rows, (panel + 1) * quant_panel); r++) {
      load_row(w, r, row.data());
      for (int64_t g = 0; g < q.groups(); g++) {
        const int64_t c = g * q.group_size, n = std::min(q.group_size, q.cols - c);
        const GroupParams p = fit_group(&row[c], n, o, importance ? importance + c : nullptr);
        quantize_group(&row[c], n, p, o.bits, &codes[r % quant_panel * q.cols + c]);
        q.scale(r, g) = p.scale_f16;
        q.zero(r, g) = p.zero;
      }
    }
    pack_panel(codes.data(), panel, q);
  });
  return q;
}

}  // namespace eac
