// Quantization kernels against their oracles and their definitions.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/thread_pool.h"
#include "harness.h"
#include "kernels/quant/quantize.h"

using namespace eac;
using namespace eac::test;

namespace {

// Activations with channels of very different energy that share common components, as real ones do.
Tensor correlated(int64_t tokens, int64_t n, unsigned seed) {
  const int64_t rank = std::max<int64_t>(1, n / 8);
  const Tensor common = random_matrix(tokens, rank, seed), mix = random_matrix(rank, n, seed + 1),
               own = random_matrix(tokens, n, seed + 2);
  Tensor x = Tensor::zeros(DType::f32, {tokens, n});
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t j = 0; j < n; j++) {
      float s = 0.5f * own.f32()[t * n + j];
      for (int64_t k = 0; k < rank; k++) s += common.f32()[t * rank + k] * mix.f32()[k * n + j] / std::sqrt(float(rank));
      x.f32()[t * n + j] = s * (0.1f + 2.0f * float((j * 37) % 19) / 19.0f);
    }
  return x;
}

Tensor hessian_of(const Tensor& x) {
  Tensor h = Tensor::zeros(DType::f32, {x.cols(), x.cols()});
  accumulate_hessian(h, x, nullptr);
  return h;
}

Tensor cast(const Tensor& t, DType dtype) {
  Tensor out = Tensor::zeros(dtype, t.shape);
  for (int64_t i = 0; i < t.size(); i++)
    out.as<uint16_t>()[i] = dtype == DType::f16 ? f32_to_f16(t.f32()[i]) : f32_to_bf16(t.f32()[i]);
  return out;
}

bool same_bytes(const Tensor& a, const Tensor& b) {
  return a.bytes() == b.bytes() && std::memcmp(a.data, b.data, a.bytes()) == 0;
}
bool same_matrix(const QuantMatrix& a, const QuantMatrix& b) {
  return same_bytes(a.codes, b.codes) && same_bytes(a.scales, b.scales) && same_bytes(a.zeros, b.zeros);
}

double equal_share(const Tensor& a, const Tensor& b) {
  int64_t equal = 0;
  for (int64_t i = 0; i < a.size(); i++) equal += a.as<uint8_t>()[i] == b.as<uint8_t>()[i];
  return a.size() ? double(equal) / double(a.size()) : 1;
}

QuantMatrix random_codes(int64_t rows, int64_t cols, int bits, int64_t group, unsigned seed) {
  std::mt19937 gen(seed);
  const int64_t groups = (cols + group - 1) / group;
  Tensor codes = Tensor::zeros(DType::u8, {rows, cols}), scales = Tensor::zeros(DType::f16, {rows, groups});
  Tensor zeros = Tensor::zeros(DType::u8, {rows, groups});
  for (int64_t i = 0; i < codes.size(); i++) codes.as<uint8_t>()[i] = uint8_t(gen() % (1u << bits));
  for (int64_t i = 0; i < zeros.size(); i++) {
    zeros.as<uint8_t>()[i] = uint8_t(gen() % (1u << bits));
    scales.as<uint16_t>()[i] = f32_to_f16(0.001f * float(1 + gen() % 1000));
  }
  const QuantMatrix q = pack_codes(codes, scales, zeros, bits, group, false);
  check(same_bytes(unpack_codes(q), codes), "pack then unpack");
  return q;
}

// ---------------------------------------------------------------------------------------------------------------- layouts

// The layout of quant_matrix.h, said again: 16 rows, 8 steps of 4 channels, 64 codes a step.
void panel_layout() {
  for (int bits = 2; bits <= 4; bits++)
    for (int64_t rows : {3, 16, 37})
      for (int64_t cols : {1, 31, 32, 33, 100, 128, 160}) {
        const QuantMatrix q = random_codes(rows, cols, bits, 64, unsigned(cols));
        const Tensor codes = unpack_codes(q);
        for (int64_t r = 0; r < q.panels() * 16; r++)
          for (int64_t c = 0; c < q.blocks() * 32; c++) {
            const uint8_t* unit = q.codes.as<uint8_t>() + (r / 16 * q.blocks() + c / 32) * 64 * bits;
            const int step = int(c % 32 / 4), byte = int(r % 16 * 4 + c % 4);
            const auto field = [&](int vector, int shift, int width) {
              return unit[64 * vector + byte] >> shift & ((1 << width) - 1);
            };
            int code;
            if (bits == 4)
              code = field(step / 2, step % 2 * 4, 4);
            else if (bits == 2)
              code = field(step / 4, step % 4 * 2, 2);
            else if (step < 6)
              code = field(step / 2, step % 2 * 3, 3);
            else
              code = field(step - 6, 6, 2) | field(2, step, 1) << 2;
            check(code == (r < rows && c < cols ? codes.as<uint8_t>()[r * cols + c] : 0),
                  "panel layout, bits " + std::to_string(bits));
          }
      }
}

// GPTQModel's recipe for 3 bit, by hand: 32 values in three words, values 10 and 21 straddling.
void pack_three_bit(const uint32_t* v, uint32_t* out) {
  out[0] = out[1] = out[2] = 0;
  for (int i = 0; i < 10; i++) out[0] |= v[i] << (3 * i);
  out[0] |= v[10] << 30;
  out[1] |= v[10] >> 2 & 1;
  for (int i = 0; i < 10; i++) out[1] |= v[11 + i] << (3 * i + 1);
  out[1] |= v[21] << 31;
  out[2] |= v[21] >> 1 & 3;
  for (int i = 0; i < 10; i++) out[2] |= v[22 + i] << (3 * i + 2);
}

void gptq_layout() {
  for (int bits = 2; bits <= 4; bits++)
    for (int64_t rows : {1, 32, 45})
      for (int64_t cols : {32, 100, 256}) {
        const QuantMatrix q = random_codes(rows, cols, bits, 64, unsigned(rows + cols));
        const Tensor codes = unpack_codes(q);
        const GptqTensors t = to_gptq(q);
        check(t.qweight.shape == std::vector<int64_t>{(cols + 31) / 32 * bits, rows}, "qweight shape");
        check(t.qzeros.shape == std::vector<int64_t>{q.groups(), (rows + 31) / 32 * bits}, "qzeros shape");
        for (int64_t r = 0; r < rows; r++)
          for (int64_t b = 0; b < q.blocks(); b++) {
            uint32_t v[32], words[4] = {};
            for (int64_t i = 0; i < 32; i++) v[i] = b * 32 + i < cols ? codes.as<uint8_t>()[r * cols + b * 32 + i] : 0;
            if (bits == 3) pack_three_bit(v, words);
            for (int i = 0; bits != 3 && i < 32; i++) words[i * bits / 32] |= v[i] << (i * bits % 32);
            for (int w = 0; w < bits; w++)
              check(uint32_t(t.qweight.i32()[(b * bits + w) * rows + r]) == words[w], "qweight words");
          }
        for (int64_t g = 0; g < q.groups(); g++) {
          uint32_t v[32] = {}, words[4] = {};
          for (int64_t i = 0; i < std::min<int64_t>(rows, 32); i++) v[i] = q.zero(i, g);
          if (bits == 3) pack_three_bit(v, words);
          for (int i = 0; bits != 3 && i < 32; i++) words[i * bits / 32] |= v[i] << (i * bits % 32);
          for (int w = 0; w < bits; w++) check(uint32_t(t.qzeros.i32()[g * t.qzeros.cols() + w]) == words[w], "qzeros words");
        }
        for (int64_t c = 0; c < cols; c++) check(t.g_idx.i32()[c] == c / 64, "g_idx");
        check(same_matrix(from_gptq(t, rows, cols, bits, 64, false), q), "from_gptq(to_gptq)");
      }
}

void bad_arguments() {
  const Tensor w = random_matrix(2, 128, 1);
  check(error_code([&] { quantize_rtn(w, {.bits = 5}, nullptr); }) == "INVALID_ARGUMENT", "bits 5");
  check(error_code([&] { quantize_rtn(w, {.group_size = 48}, nullptr); }) == "INVALID_ARGUMENT", "group of 48");
  check(error_code([&] { quantize_rtn(w, {.group_size = 0}, nullptr); }) == "INVALID_ARGUMENT", "group of 0");
  GptqTensors t = to_gptq(quantize_rtn(w, {.group_size = 64}, nullptr));
  check(error_code([&] { from_gptq(t, 2, 128, 3, 64, false); }) == "INVALID_ARGUMENT", "wrong bits in from_gptq");
  std::swap(t.g_idx.i32()[0], t.g_idx.i32()[127]);
  check(error_code([&] { from_gptq(t, 2, 128, 4, 64, false); }) == "INVALID_ARGUMENT", "scattered groups");
  w.f32()[200] = std::numeric_limits<float>::quiet_NaN();
  check(error_code([&] { quantize_rtn(w, {}, nullptr); }) == "NON_FINITE", "NaN weight");
}

// ---------------------------------------------------------------------------------------------------------------- rounding

void rtn_matches_oracle() {
  const Tensor importance = random_matrix(1, 300, 9);
  for (int64_t i = 0; i < importance.size(); i++) importance.f32()[i] = std::fabs(importance.f32()[i]);
  for (int bits = 2; bits <= 4; bits++)
    for (int64_t cols : {32, 100, 256, 300})
      for (int64_t group : {32, 128, 1024})
        for (int flags = 0; flags < 8; flags++) {
          const QuantOptions o{bits, group, (flags & 1) != 0, (flags & 2) != 0};
          const Tensor w = cast(random_matrix(7, cols, unsigned(cols + bits), 0.03f), flags & 4 ? DType::f16 : DType::bf16);
          const float* imp = flags & 4 ? importance.f32() : nullptr;
          check(same_matrix(quantize_rtn(w, o, imp), quantize_rtn_reference(w, o, imp)),
                "rtn bits " + std::to_string(bits) + " cols " + std::to_string(cols) + " flags " + std::to_string(flags));
        }
}

void rtn_extremes() {
  // one group a row: all zero, all positive, all negative, huge, tiny, one outlier
  Tensor w = Tensor::zeros(DType::f32, {6, 64});
  for (int c = 0; c < 64; c++) {
    w.f32()[64 + c] = 1 + 0.01f * c;
    w.f32()[128 + c] = -1 - 0.01f * c;
    w.f32()[192 + c] = (c % 2 ? 1e30f : -1e30f);
    w.f32()[256 + c] = 1e-12f * c;
    w.f32()[320 + c] = c == 5 ? 100.0f : 0.001f;
  }
  for (int bits = 2; bits <= 4; bits++)
    for (bool symmetric : {false, true}) {
      const QuantMatrix q = quantize_rtn(w, {bits, 64, symmetric, false}, nullptr);
      const Tensor d = dequantize(q);
      const int top = (1 << bits) - 1;
      for (int64_t r = 0; r < 6; r++) {
        const float scale = f16_to_f32(q.scale(r, 0));
        check(scale > 0 && std::isfinite(scale), "scale in range");
        check(q.zero(r, 0) <= top && (!symmetric || q.zero(r, 0) == 1 << (bits - 1)), "zero point in range");
        for (int c = 0; c < 64; c++) {
          const float v = w.f32()[r * 64 + c], got = d.f32()[r * 64 + c];
          check(std::isfinite(got), "finite");
          // symmetric: +range lies one step beyond the highest code
          if (r != 3) check(std::fabs(got - v) <= scale * (symmetric ? 1.01f : 0.51f) + 1e-7f, "within half a step");
        }
      }
      for (int c = 0; c < 64; c++) check(d.f32()[c] == 0, "zero stays zero");
    }
}

// ---------------------------------------------------------------------------------------------------------------- Hessians

void moments() {
  const int64_t m = 2100, n = 37;  // more tokens than one chunk
  const Tensor x = correlated(m, n, 3), full = correlated(m, n, 30), weight = random_matrix(1, m, 4);
  for (const float* w : {(const float*)nullptr, (const float*)weight.f32()}) {
    Tensor h = Tensor::zeros(DType::f32, {n, n}), d = Tensor::zeros(DType::f32, {n, n});
    accumulate_hessian(h, x, w);
    accumulate_cross(d, full, x, w);
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < n; j++) {
        double hs = 0, ds = 0, hm = 0, dm = 0;
        for (int64_t t = 0; t < m; t++) {
          const double v = w ? w[t] : 1, xi = x.f32()[t * n + i], xj = x.f32()[t * n + j],
                       di = double(full.f32()[t * n + i]) - xi;
          hs += v * xi * xj, hm += std::fabs(v * xi * xj);
          ds += v * di * xj, dm += std::fabs(v * di * xj);
        }
        check(std::fabs(hs - h.f32()[i * n + j]) <= 1e-5 * hm, "Hessian");
        check(std::fabs(ds - d.f32()[i * n + j]) <= 1e-5 * dm, "cross moments");
      }
  }
}

void factor_inverts() {
  for (int64_t n : {1, 2, 63, 64, 65, 130, 200, 333})
    for (bool act_order : {false, true}) {
      const Tensor h = hessian_of(correlated(2 * n + 3, n, unsigned(n)));
      const HessianFactor f = factor_hessian(h, 0.01, act_order);
      const float* u = f.u.f32();
      double mean = 0, worst = 0;
      for (int64_t i = 0; i < n; i++) mean += h.f32()[i * n + i] / double(n);
      for (int64_t i = 0; i < n; i++) {
        check(!act_order || i == 0 || f.diagonal[f.order[i - 1]] >= f.diagonal[f.order[i]], "falling diagonal");
        check(std::fabs(f.diagonal[i] - (h.f32()[i * n + i] + 0.01 * mean)) <= 1e-6 * f.diagonal[i], "damped diagonal");
        for (int64_t j = 0; j < i; j++) check(u[i * n + j] == 0, "upper triangular");
      }
      // U H U^T = I, since H^-1 = U^T U
      std::vector<double> uh(n * n);
      for (int64_t i = 0; i < n; i++)
        for (int64_t k = i; k < n; k++)
          for (int64_t j = 0; j < n; j++)
            uh[i * n + j] += u[i * n + k] * (h.f32()[int64_t(f.order[k]) * n + f.order[j]] + (k == j ? 0.01 * mean : 0));
      for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++) {
          double s = i == j ? -1 : 0;
          for (int64_t k = j; k < n; k++) s += uh[i * n + k] * u[j * n + k];
          worst = std::max(worst, std::fabs(s));
        }
      check(worst < 1e-3, "U H U^T = I, n " + std::to_string(n) + ": " + std::to_string(worst));
    }
}

void factor_refuses() {
  Tensor h = hessian_of(correlated(100, 70, 5));
  h.f32()[3 * 70 + 3] = -1e6f;
  check(error_code([&] { factor_hessian(h, 0.01, false); }) == "NOT_POSITIVE_DEFINITE", "indefinite");
  h.f32()[3 * 70 + 3] = std::numeric_limits<float>::infinity();
  check(error_code([&] { factor_hessian(h, 0.01, true); }) == "NOT_POSITIVE_DEFINITE", "infinite");
  h.f32()[3 * 70 + 3] = std::numeric_limits<float>::quiet_NaN();
  check(error_code([&] { factor_hessian(h, 0.01, true); }) == "NOT_POSITIVE_DEFINITE", "NaN");
  const Tensor zero = Tensor::zeros(DType::f32, {70, 70});
  check(error_code([&] { factor_hessian(zero, 0.0, false); }) == "NOT_POSITIVE_DEFINITE", "zero without damping");
  check(factor_hessian(zero, 0.01, false).u.f32()[0] == 10.0f, "a zero Hessian is damped by 0.01");
}

// ---------------------------------------------------------------------------------------------------------------- GPTQ

// tr((W - Q) (H + damping) (W - Q)^T) / rows
double trace_error(const Tensor& w, const Tensor& q, const Tensor& h, double damping) {
  const int64_t n = w.cols();
  double mean = 0, sum = 0;
  for (int64_t i = 0; i < n; i++) mean += h.f32()[i * n + i] / double(n);
  for (int64_t r = 0; r < w.rows(); r++)
    for (int64_t i = 0; i < n; i++) {
      const double di = element(w, r * n + i) - q.f32()[r * n + i];
      double s = damping * mean * di;
      for (int64_t j = 0; j < n; j++) s += h.f32()[i * n + j] * (element(w, r * n + j) - q.f32()[r * n + j]);
      sum += di * s;
    }
  return sum / double(w.rows());
}

void gptq_matches_oracle() {
  struct Case {
    int64_t rows, cols, group;
    int bits;
    bool symmetric, clip, act_order;
  };
  const Case cases[] = {
      {40, 256, 128, 4, false, false, false},  {40, 256, 128, 3, false, false, true},  {33, 256, 64, 2, true, false, false},
      {8, 300, 128, 3, false, true, false},    {8, 300, 32, 2, false, true, true},     {70, 192, 96, 4, true, false, true},
      {20, 500, 160, 2, false, false, false},  {20, 500, 192, 3, false, false, false}, {20, 512, 256, 3, false, true, false},
      {20, 300, 1024, 4, false, false, false}, {20, 100, 4096, 4, false, false, true}, {1, 33, 32, 3, false, false, false},
      {5, 1, 128, 4, false, false, true}};
  for (const Case& c : cases) {
    if (small && c.cols >= 500) continue;
    const std::string name = std::to_string(c.rows) + "x" + std::to_string(c.cols) + " g" + std::to_string(c.group) + " b" +
                             std::to_string(c.bits) + (c.act_order ? " act-order" : "");
    const QuantOptions o{c.bits, c.group, c.symmetric, c.clip};
    const Tensor w = random_matrix(c.rows, c.cols, unsigned(c.cols), 0.05f), h = hessian_of(correlated(2 * c.cols, c.cols, 17));
    const GptqResult fast = quantize_gptq(w, factor_hessian(h, 0.01, c.act_order), o);
    const GptqResult slow = quantize_gptq_reference(w, h, 0.01, c.act_order, o);
    // A tie that falls the other way changes the rest of its row, so whole rows may differ, but hardly the error.
    check(std::fabs(fast.error - slow.error) <= 1e-3 * slow.error, "error against the oracle, " + name);
    const double share = equal_share(unpack_codes(fast.matrix), unpack_codes(slow.matrix));
    check(share > 0.999, "codes equal to the oracle's, " + name + ": " + std::to_string(share));
    const double exact = trace_error(w, dequantize(fast.matrix), h, 0.01);
    // Parameters taken along the way aside, GPTQ's residuals telescope to exactly this trace.
    check(std::fabs(fast.error - exact) <= 2e-3 * exact, "error is the trace, " + name);
    const double rtn = trace_error(w, dequantize(quantize_rtn(w, o, nullptr)), h, 0.01);
    if (c.cols > 64) check(exact < rtn, "better than rounding, " + name);
  }
}

void dead_channels_round() {
  const int64_t n = 96;
  Tensor x = correlated(400, n, 8);
  for (int64_t t = 0; t < x.rows(); t++)
    for (int64_t j = 1; j < n; j += 2) x.f32()[t * n + j] = 0;
  const Tensor w = random_matrix(10, n, 2, 0.1f);
  const QuantOptions o{4, 32, false, false};
  const Tensor q = unpack_codes(quantize_gptq(w, factor_hessian(hessian_of(x), 0.01, true), o).matrix);
  const Tensor rtn = unpack_codes(quantize_rtn(w, o, nullptr));
  for (int64_t i = 0; i < q.size(); i++)
    if (i % n % 2) check(q.as<uint8_t>()[i] == rtn.as<uint8_t>()[i], "a channel without energy is rounded");
  const Tensor none = Tensor::zeros(DType::f32, {n, n});
  check(same_matrix(quantize_gptq(w, factor_hessian(none, 0.01, false), o).matrix, quantize_rtn(w, o, nullptr)),
        "no data: plain rounding");
}

void targets_reproduce_the_full_stream() {
  const int64_t m = 600, n = 120, rows = 9;
  const Tensor full = correlated(m, n, 40), noise = random_matrix(m, n, 41, 0.2f), w = random_matrix(rows, n, 42);
  Tensor x = Tensor::zeros(DType::f32, {m, n});
  for (int64_t i = 0; i < x.size(); i++) x.f32()[i] = 0.9f * full.f32()[i] + noise.f32()[i];
  const Tensor h = hessian_of(x);
  Tensor d = Tensor::zeros(DType::f32, {n, n});
  accumulate_cross(d, full, x, nullptr);
  for (bool act_order : {false, true}) {
    const double damping = 1e-3;
    const HessianFactor f = factor_hessian(h, damping, act_order);
    const Tensor target = two_stream_target(w, f, d, 1.0f), half = two_stream_target(w, f, d, 0.5f);
    // Normal equations: (W* - W)(H + damping) = W D, and beta scales the correction.
    double mean = 0;
    for (int64_t i = 0; i < n; i++) mean += h.f32()[i * n + i] / double(n);
    for (int64_t r = 0; r < rows; r++) {
      double off = 0, size = 0;
      for (int64_t j = 0; j < n; j++) {
        double left = 0, right = 0;
        for (int64_t i = 0; i < n; i++) {
          left += (double(target.f32()[r * n + i]) - w.f32()[r * n + i]) * (h.f32()[i * n + j] + (i == j ? damping * mean : 0));
          right += double(w.f32()[r * n + i]) * d.f32()[i * n + j];
        }
        off += (left - right) * (left - right), size += right * right;
        const double whole = target.f32()[r * n + j] - w.f32()[r * n + j], part = half.f32()[r * n + j] - w.f32()[r * n + j];
        check(std::fabs(part - 0.5 * whole) < 1e-5, "beta scales the correction");
      }
      check(off < 1e-6 * size, "normal equations of the target");
    }
  }
}

void threads_change_nothing() {
  const Tensor x = correlated(700, 320, 50), full = correlated(700, 320, 60), w = random_matrix(77, 320, 51, 0.1f);
  std::vector<GptqResult> results;
  std::vector<Tensor> targets;
  for (int threads : {1, 2, 5}) {
    set_thread_count(threads);
    Tensor h = hessian_of(x), d = Tensor::zeros(DType::f32, {320, 320});
    accumulate_cross(d, full, x, nullptr);
    const HessianFactor f = factor_hessian(h, 0.01, true);
    targets.push_back(two_stream_target(w, f, d, 0.7f));
    results.push_back(quantize_gptq(targets.back(), f, {3, 64, false, true}));
    check(same_bytes(targets.back(), targets[0]), "targets by thread count");
    check(same_matrix(results.back().matrix, results[0].matrix) && results.back().error == results[0].error,
          "GPTQ by thread count");
  }
}

}  // namespace

int main() {
  run("codes lie in panels as documented", panel_layout);
  run("the GPTQ v2 layout is GPTQModel's and comes back bit for bit", gptq_layout);
  run("bad arguments are refused", bad_arguments);
  run("round to nearest equals its oracle", rtn_matches_oracle);
  run("round to nearest survives extreme groups", rtn_extremes);
  run("moments equal plain sums", moments);
  run("the factor inverts the damped Hessian", factor_inverts);
  run("a Hessian that cannot be factored is refused", factor_refuses);
  run("GPTQ agrees with its oracle", gptq_matches_oracle);
  run("channels without energy fall back to rounding", dead_channels_round);
  run("two-stream targets solve their normal equations", targets_reproduce_the_full_stream);
  run("the number of threads changes nothing", threads_change_nothing);
  return failures ? 1 : 0;
}
