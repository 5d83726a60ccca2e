// The oracles of quantize.h: plain scalar loops that share no code with the fast versions but f16 rounding and packing.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/quant/group_params.h"

namespace eac {
namespace {

struct Params {
  float scale;
  int zero;
};

int code_of(double w, Params p, int bits) {
  const double code = std::nearbyint(w / p.scale) + p.zero;  // the default rounding mode: half to even
  return int(std::clamp(code, 0.0, double((1 << bits) - 1)));
}

// w, importance: the group's values, importance 1 where there is none
Params fit_reference(const std::vector<float>& w, const std::vector<double>& importance, const QuantOptions& o) {
  float lo = 0, hi = 0;
  for (float v : w) lo = std::min(lo, v), hi = std::max(hi, v);
  if (o.symmetric) hi = std::max(-lo, hi), lo = -hi;
  const float top = float((1 << o.bits) - 1);
  const auto params = [&](float shrink) {
    const uint16_t half = f32_to_f16(std::clamp((hi - lo) * shrink / top, 1e-7f, 65504.0f));
    const float scale = std::max(f16_to_f32(half), 0x1p-24f);
    const float zero = o.symmetric ? float(1 << (o.bits - 1)) : std::min(std::nearbyint(-lo * shrink / scale), top);
    return Params{scale, int(zero)};
  };
  const auto error = [&](Params p) {
    double sum = 0;
    for (size_t i = 0; i < w.size(); i++) {
      const double d = w[i] - double(p.scale) * (code_of(w[i], p, o.bits) - p.zero);
      sum += importance[i] * d * d;
    }
    return sum;
  };
  Params best = params(1);
  if (!o.clip_search) return best;
  double best_error = error(best);
  for (int s = 0; s < 12; s++) {
    const Params p = params(float(0.95 - 0.05 * s));
    if (const double e = error(p); e < best_error) best = p, best_error = e;
  }
  return best;
}

// The matrix under construction, unpacked.
struct Draft {
  const QuantOptions& o;
  int64_t rows, cols, group_size, groups;
  Tensor codes, scales, zeros;
  std::vector<Params> params;  // (rows, groups)

  Draft(int64_t rows_, int64_t cols_, const QuantOptions& options)
      : o(options),
        rows(rows_),
        cols(cols_),
        group_size(std::min(o.group_size, cols)),
        groups((cols + group_size - 1) / group_size),
        codes(Tensor::zeros(DType::u8, {rows, cols})),
        scales(Tensor::zeros(DType::f16, {rows, groups})),
        zeros(Tensor::zeros(DType::u8, {rows, groups})),
        params(rows * groups) {}

  // at(c): row r's current weight of channel c; importance by channel or null
  template <class At, class Importance> void fit(int64_t r, int64_t g, At at, const Importance* importance) {
    std::vector<float> values;
    std::vector<double> weight;
    for (int64_t c = g * group_size; c < std::min(cols, (g + 1) * group_size); c++) {
      values.push_back(float(at(c)));
      weight.push_back(importance ? double(importance[c]) : 1.0);
    }
    const Params p = params[r * groups + g] = fit_reference(values, weight, o);
    scales.as<uint16_t>()[r * groups + g] = f32_to_f16(p.scale);
    zeros.as<uint8_t>()[r * groups + g] = uint8_t(p.zero);
  }

  // Quantizes one weight and returns what it became.
  double put(int64_t r, int64_t c, double w) {
    const Params p = params[r * groups + c / group_size];
    const int code = code_of(w, p, o.bits);
    codes.as<uint8_t>()[r * cols + c] = uint8_t(code);
    return double(p.scale) * (code - p.zero);
  }

  QuantMatrix finish() const { return pack_codes(codes, scales, zeros, o.bits, o.group_size, o.symmetric); }
};

// The inverse of a symmetric positive definite matrix by Gauss-Jordan elimination. a: (n, n), overwritten.
void invert(std::vector<double>& a, int64_t n) {
  for (int64_t k = 0; k < n; k++) {
    const double pivot = a[k * n + k];
    if (!(pivot > 0)) throw Error("NOT_POSITIVE_DEFINITE", "the Hessian is not positive definite: raise the damping");
    a[k * n + k] = 1;
    for (int64_t j = 0; j < n; j++) a[k * n + j] /= pivot;
    for (int64_t i = 0; i < n; i++) {
      if (i == k) continue;
      const double v = a[i * n + k];
      a[i * n + k] = 0;
      for (int64_t j = 0; j < n; j++) a[i * n + j] -= v * a[k * n + j];
    }
  }
}

}  // namespace

QuantMatrix quantize_rtn_reference(const Tensor& w, const QuantOptions& o, const float* importance) {
  require_weight(w);
  make_quant_matrix(0, w.cols(), o.bits, o.group_size, o.symmetric);  // checks the options
  Draft draft(w.rows(), w.cols(), o);
  for (int64_t r = 0; r < draft.rows; r++) {
    const auto at = [&](int64_t c) { return element(w, r * draft.cols + c); };
    for (int64_t g = 0; g < draft.groups; g++) draft.fit(r, g, at, importance);
    for (int64_t c = 0; c < draft.cols; c++) draft.put(r, c, at(c));
  }
  return draft.finish();
}

// Optimal brain surgeon, a column at a time, with the explicit inverse of the Hessian over the channels not yet quantized.
GptqResult quantize_gptq_reference(const Tensor& w, const Tensor& h, double damping, bool act_order, const QuantOptions& o) {
  require_weight(w);
  make_quant_matrix(0, w.cols(), o.bits, o.group_size, o.symmetric);
  const int64_t rows = w.rows(), n = w.cols();
  double mean = 0;
  for (int64_t i = 0; i < n; i++) mean += element(h, i * n + i) / double(n);
  std::vector<double> diagonal(n), inverse(n * n), current(rows * n);
  for (int64_t i = 0; i < n; i++) diagonal[i] = element(h, i * n + i) + damping * (mean > 0 ? mean : 1);
  for (int64_t i = 0; i < n * n; i++) inverse[i] = i % (n + 1) ? element(h, i) : diagonal[i / n];
  for (int64_t i = 0; i < rows * n; i++) current[i] = element(w, i);
  invert(inverse, n);

  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  if (act_order)
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return float(diagonal[a]) > float(diagonal[b]); });

  Draft draft(rows, n, o);
  const auto fit = [&](int64_t g) {
    for (int64_t r = 0; r < rows; r++)
      draft.fit(
          r, g, [&](int64_t c) { return current[r * n + c]; }, diagonal.data());
  };
  for (int64_t g = 0; act_order && g < draft.groups; g++) fit(g);
  double error = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t c = order[i];
    if (!act_order && c % draft.group_size == 0) fit(c / draft.group_size);
    const double pivot = inverse[c * n + c];
    for (int64_t r = 0; r < rows; r++) {
      const double diff = current[r * n + c] - draft.put(r, c, current[r * n + c]);
      error += diff * diff / pivot;
      for (int64_t j = i + 1; j < n; j++) current[r * n + order[j]] -= diff / pivot * inverse[c * n + order[j]];
    }
    for (int64_t a = i + 1; a < n; a++) {  // take channel c out of the inverse
      const double v = inverse[order[a] * n + c] / pivot;
      for (int64_t b = i + 1; b < n; b++) inverse[order[a] * n + order[b]] -= v * inverse[c * n + order[b]];
    }
  }
  return {draft.finish(), rows ? error / double(rows) : 0.0};
}

}  // namespace eac
