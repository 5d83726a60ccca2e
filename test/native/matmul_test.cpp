// The matrix products and the vector helpers, on every instruction set that this machine has, against plain loops in f64.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/thread_pool.h"
#include "kernels/cpu/isa.h"
#include "kernels/matmul/int8.h"
#include "kernels/quant/quantize.h"

using namespace eac;

namespace {

const bool small = std::getenv("EAC_MOE_TEST_SMALL") != nullptr;  // leave out what takes long under emulation or ThreadSanitizer

int failures = 0;

void check(bool ok, const std::string& name, const std::string& detail) {
  if (ok) return;
  failures++;
  std::printf("FAILED %s %s: %s\n", isa().name, name.c_str(), detail.c_str());
}
void expect_close(const std::string& name, const std::vector<double>& want, const std::vector<double>& got, double tolerance) {
  for (size_t i = 0; i < want.size(); i++)
    if (!(std::fabs(want[i] - got[i]) <= tolerance)) {
      check(false, name,
            "element " + std::to_string(i) + ": want " + std::to_string(want[i]) + ", got " + std::to_string(got[i]));
      return;
    }
}

struct Random {
  uint64_t state = 88172645463325252ull;
  uint64_t next() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state * 2685821657736338717ull >> 11;
  }
  float uniform() { return float(double(next()) * 0x1p-52 - 1.0); }  // [-1, 1)
  int64_t below(int64_t n) { return int64_t(next() % uint64_t(n)); }
};
Random random_source;

Tensor random_tensor(DType dtype, int64_t rows, int64_t cols) {
  Tensor t = Tensor::zeros(dtype, {rows, cols});
  for (int64_t i = 0; i < t.size(); i++) {
    const float v = random_source.uniform();
    if (dtype == DType::f32)
      t.f32()[i] = v;
    else if (dtype == DType::f64)
      t.as<double>()[i] = v;
    else
      t.as<uint16_t>()[i] = dtype == DType::f16 ? f32_to_f16(v) : f32_to_bf16(v);
  }
  return t;
}

QuantMatrix random_quant(int bits, int64_t rows, int64_t cols, int64_t group_size) {
  const int64_t groups = (cols + group_size - 1) / group_size;
  Tensor codes = Tensor::zeros(DType::u8, {rows, cols}), scales = Tensor::zeros(DType::f16, {rows, groups}),
         zeros = Tensor::zeros(DType::u8, {rows, groups});
  for (int64_t i = 0; i < codes.size(); i++) codes.as<uint8_t>()[i] = uint8_t(random_source.below(1 << bits));
  for (int64_t i = 0; i < scales.size(); i++) {
    scales.as<uint16_t>()[i] = f32_to_f16(0.3f * random_source.uniform());
    zeros.as<uint8_t>()[i] = uint8_t(random_source.below(1 << bits));
  }
  return pack_codes(codes, scales, zeros, bits, group_size, false);
}

std::vector<double> values(const Tensor& t) {
  std::vector<double> v(size_t(t.size()));
  for (int64_t i = 0; i < t.size(); i++) v[size_t(i)] = element(t, i);
  return v;
}

// --- gemm ---------------------------------------------------------------------------------------------------------

using Gemm32 = void (*)(int64_t, int64_t, int64_t, float, Operand, Operand, float, float*, int64_t);

Operand operand(const Tensor& t, bool transposed) {
  const int64_t ld = t.cols();
  return transposed ? Operand{t.data, t.dtype, 1, ld} : Operand{t.data, t.dtype, ld, 1};
}

void gemm_case(int64_t m, int64_t n, int64_t k, DType ta, DType tb, bool trans_a, bool trans_b, float beta, bool serial) {
  const bool f64 = ta == DType::f64;
  const Tensor a = trans_a ? random_tensor(ta, k, m) : random_tensor(ta, m, k);
  const Tensor b = trans_b ? random_tensor(tb, n, k) : random_tensor(tb, k, n);
  const Operand oa = operand(a, trans_a), ob = operand(b, trans_b);
  const int64_t ldc = n + 3;
  Tensor c = random_tensor(f64 ? DType::f64 : DType::f32, m, ldc);
  std::vector<double> want = values(c);
  if (beta == 0)  // C must not be read
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++) {
        if (f64)
          c.as<double>()[i * ldc + j] = std::numeric_limits<double>::quiet_NaN();
        else
          c.f32()[i * ldc + j] = std::numeric_limits<float>::quiet_NaN();
      }
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      double s = 0;
      for (int64_t p = 0; p < k; p++)
        s += element(a, i * oa.row_stride + p * oa.col_stride) * element(b, p * ob.row_stride + j * ob.col_stride);
      double& w = want[size_t(i * ldc + j)];
      w = (beta != 0 ? w : 0) + 0.75 * s;
    }
  if (f64)
    gemm_f64(m, n, k, 0.75, oa, ob, double(beta), c.as<double>(), ldc);
  else
    (serial ? Gemm32(gemm_f32_serial) : Gemm32(gemm_f32))(m, n, k, 0.75f, oa, ob, beta, c.f32(), ldc);
  const std::string name = "gemm " + std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k) + " types " +
                           std::to_string(int(ta)) + std::to_string(int(tb)) + " trans " + std::to_string(trans_a) +
                           std::to_string(trans_b) + " beta " + std::to_string(int(beta));
  expect_close(name, want, values(c), (f64 ? 1e-14 : 4e-7) * double(k + 4));
}

void test_gemm() {
  const int64_t sizes[][3] = {{1, 1, 1},    {3, 5, 2},    {14, 32, 16},  {13, 31, 7}, {15, 33, 9},
                              {6, 16, 256}, {7, 17, 257}, {29, 65, 300}, {4, 8, 4},   {5, 9, 513}};
  for (const auto& s : sizes)
    for (int trans = 0; trans < 4; trans++)
      for (float beta : {0.0f, 1.0f}) {
        for (DType ta : {DType::f32, DType::f16, DType::bf16})
          for (DType tb : {DType::f32, DType::f16, DType::bf16})
            gemm_case(s[0], s[1], s[2], ta, tb, trans & 1, trans & 2, beta, beta == 0);
        gemm_case(s[0], s[1], s[2], DType::f64, DType::f64, trans & 1, trans & 2, beta, false);
      }
  gemm_case(180, 200, 270, DType::f32, DType::bf16, false, true, 0, false);
  gemm_case(343, 130, 60, DType::f64, DType::f64, true, false, 1, false);
  gemm_case(3, 4, 0, DType::f32, DType::f32, false, false, 0, false);
  gemm_case(3, 4, 0, DType::f32, DType::f32, false, false, 1, false);
  gemm_case(4040, 3, 5, DType::f32, DType::f32, false, false, 1, false);  // more than one block of packed rows, of packed columns
  gemm_case(3, 4040, 5, DType::f32, DType::f32, false, true, 0, false);
}

// Neither strides that are both larger than 1, nor the position in the matrix, nor threads change an element.
void test_gemm_regularity() {
  const int64_t m = 61, n = 77, k = 530;
  const Tensor a = random_tensor(DType::f32, m, k), b = random_tensor(DType::f32, k, n);
  const Operand oa = operand(a, false), ob = operand(b, false);
  Tensor whole = Tensor::zeros(DType::f32, {m, n}), part = Tensor::zeros(DType::f32, {m, n});
  gemm_f32(m, n, k, 1, oa, ob, 0, whole.f32(), n);
  const int threads = thread_count();
  for (int t : {1, 3}) {
    set_thread_count(t);
    gemm_f32(m, n, k, 1, oa, ob, 0, part.f32(), n);
    check(std::memcmp(whole.data, part.data, whole.bytes()) == 0, "gemm regularity", "threads change the result");
  }
  set_thread_count(threads);
  for (int64_t i = 0; i < m; i += 5)
    for (int64_t j = 0; j < n; j += 7) {
      float c = 0;
      gemm_f32_serial(1, 1, k, 1, {a.f32() + i * k, DType::f32, k, 1}, {b.f32() + j, DType::f32, n, 1}, 0, &c, 1);
      check(c == whole.f32()[i * n + j], "gemm regularity", "position changes the result");
    }
  Tensor spread = Tensor::zeros(DType::f32, {m, k * 2});
  for (int64_t i = 0; i < m * k; i++) spread.f32()[2 * i] = a.f32()[i];
  gemm_f32(m, n, k, 1, {spread.data, DType::f32, 2 * k, 2}, ob, 0, part.f32(), n);
  check(std::memcmp(whole.data, part.data, whole.bytes()) == 0, "gemm regularity", "strides change the result");
}

void test_syrk() {
  for (int64_t n : {1, 7, 33, 64, 129, 300})
    for (int64_t m : {1, 40, 259, 700})  // 700: more than one block of k
      for (bool weighted : {false, true}) {
        if (small && n > 64 && m > 259) continue;
        const int64_t ldx = n + 2, ldc = n + 1;
        const Tensor x = random_tensor(DType::f32, m, ldx), w = random_tensor(DType::f32, 1, m);
        Tensor c = Tensor::zeros(DType::f32, {n, ldc});
        for (int64_t i = 0; i < n; i++)
          for (int64_t j = 0; j <= i; j++) c.f32()[i * ldc + j] = c.f32()[j * ldc + i] = random_source.uniform();
        std::vector<double> want = values(c);
        for (int64_t i = 0; i < n; i++)
          for (int64_t j = 0; j < n; j++)
            for (int64_t p = 0; p < m; p++)
              want[size_t(i * ldc + j)] +=
                  2.0 * (weighted ? w.f32()[p] : 1.0f) * double(x.f32()[p * ldx + i]) * x.f32()[p * ldx + j];
        syrk_f32(m, n, 2, x.f32(), ldx, weighted ? w.f32() : nullptr, c.f32(), ldc);
        expect_close("syrk " + std::to_string(m) + "x" + std::to_string(n), want, values(c), 1e-6 * double(m + 4));
        for (int64_t i = 0; i < n; i++)
          for (int64_t j = 0; j < i; j++) check(c.f32()[i * ldc + j] == c.f32()[j * ldc + i], "syrk", "not symmetric");
      }
}

// --- linear -------------------------------------------------------------------------------------------------------

std::string describe(const Matrix& w) {
  if (const Tensor* t = std::get_if<Tensor>(&w)) return "dtype " + std::to_string(int(t->dtype));
  const QuantMatrix& q = std::get<QuantMatrix>(w);
  return std::to_string(q.bits) + " bit, group " + std::to_string(q.group_size);
}

void linear_case(const Matrix& w, int64_t n, const Tensor* bias, float beta) {
  const int64_t in = in_features(w), out = out_features(w), ldx = in + 5, ldy = out + 2;
  const Tensor x = random_tensor(DType::f32, n, ldx);
  Tensor y = random_tensor(DType::f32, n, ldy), want = Tensor::zeros(DType::f32, {n, ldy});
  std::memcpy(want.data, y.data, y.bytes());
  linear_reference(x.f32(), ldx, n, w, bias, beta, want.f32(), ldy);
  if (beta == 0)
    for (int64_t t = 0; t < n; t++) std::fill_n(y.f32() + t * ldy, out, std::numeric_limits<float>::quiet_NaN());
  Tensor pieces = Tensor::zeros(DType::f32, {n, ldy});
  std::memcpy(pieces.data, y.data, y.bytes());
  linear(x.f32(), ldx, n, w, bias, beta, y.f32(), ldy);
  const std::string name =
      "linear " + std::to_string(n) + "x" + std::to_string(out) + "x" + std::to_string(in) + " " + describe(w);
  expect_close(name, values(want), values(y), 1e-6 * double(in + 4));
  // The same bits from pieces of rows and single tokens: neither tiling nor the decoding path shows.
  const int64_t step = std::holds_alternative<Tensor>(w) ? 5 : quant_panel;
  for (int64_t r = 0; r < out; r += step)
    linear_serial(x.f32(), ldx, n, w, bias, r, std::min(out, r + step), beta, pieces.f32(), ldy);
  check(std::memcmp(y.data, pieces.data, y.bytes()) == 0, name, "pieces differ from the whole");
  if (beta == 0) {
    const int threads = thread_count();
    set_thread_count(1);
    linear(x.f32(), ldx, n, w, bias, 0, pieces.f32(), ldy);
    set_thread_count(threads);
    check(std::memcmp(y.data, pieces.data, y.bytes()) == 0, name, "threads change the result");
    for (int64_t t = 0; t < n; t++) linear(x.f32() + t * ldx, ldx, 1, w, bias, 0, pieces.f32() + t * ldy, ldy);
    check(std::memcmp(y.data, pieces.data, y.bytes()) == 0, name, "single tokens differ from all together");
  }
}

void test_linear() {
  const int64_t shapes[][2] = {{1, 1},    {3, 31},  {4, 32},    {5, 33},  {33, 64},
                               {37, 100}, {8, 160}, {35, 1600}, {9, 2080}};  // out, in
  for (const auto& s : shapes) {
    if (s[1] == 1600 && small) continue;
    std::vector<Matrix> weights;
    for (DType t : {DType::f32, DType::f16, DType::bf16}) weights.push_back(random_tensor(t, s[0], s[1]));
    for (int bits : {2, 3, 4})
      for (int64_t group : {32, 96, 128, 5000}) weights.push_back(random_quant(bits, s[0], s[1], group));
    const Tensor biases[] = {random_tensor(DType::f32, 1, s[0]), random_tensor(DType::f16, 1, s[0]),
                             random_tensor(DType::bf16, 1, s[0])};
    for (const Matrix& w : weights)
      for (int64_t n : {1, 2, 3, 4, 5, 6, 7, 13, 20})
        if (!small || n % 4 == 1) linear_case(w, n, n % 4 ? &biases[n % 4 - 1] : nullptr, float(n % 2 == 0 && n % 3 == 0));
  }
  // So many tokens that operands are packed: edges of the tiles, few rows, channels that fill no vector.
  const Tensor bias = random_tensor(DType::f16, 1, 101);
  for (int64_t n : {96, 97, 103, 111, 200}) {
    if (small && n != 103) continue;
    linear_case(random_tensor(DType::f32, 101, 64), n, &bias, float(n % 2));
    linear_case(random_tensor(DType::bf16, 101, 33), n, &bias, 0);
    linear_case(random_tensor(DType::f16, 3, 70), n, nullptr, 0);
    linear_case(random_quant(4, 41, 96, 32), n, nullptr, 0);
  }
  linear_case(random_quant(3, 40, 1100, 128), 200, nullptr, 0);
  linear_case(random_tensor(DType::bf16, 70, 1056), 385, nullptr, 1);
}

void test_quant_group_shorter_than_block() {
  linear_case(random_quant(4, 6, 20, 20), 3, nullptr, 0);  // one group, no multiple of 32
  linear_case(random_quant(2, 6, 70, 70), 1, nullptr, 0);
}

// Exact integers and one fused multiply-add a block: with such an instruction, bit for bit what the definition says.
void int8_case(const QuantMatrix& w, int64_t n, const Tensor* bias, float beta) {
  const int64_t ldx = w.cols + 3, ldy = w.rows + 2;
  const Tensor x = random_tensor(DType::f32, n, ldx);
  for (int64_t c = 0; c < std::min<int64_t>(w.cols, 32); c++) x.f32()[c] = 0;  // a block without energy
  const Tensor y = random_tensor(DType::f32, n, ldy), want = Tensor::zeros(DType::f32, {n, ldy}),
               single = Tensor::zeros(DType::f32, {n, ldy});
  std::memcpy(want.data, y.data, y.bytes());
  std::memcpy(single.data, y.data, y.bytes());
  linear_int8_reference(x.f32(), ldx, n, w, bias, beta, want.f32(), ldy);
  linear_int8(x.f32(), ldx, n, w, bias, beta, y.f32(), ldy);
  const std::string name =
      "int8 " + std::to_string(n) + "x" + std::to_string(w.rows) + "x" + std::to_string(w.cols) + " " + describe(w);
#if defined(__x86_64__)
  const bool fused = std::strcmp(isa().name, "baseline") != 0;
#else
  const bool fused = true;
#endif
  expect_close(name, values(want), values(y), fused ? 0 : 0.1);  // without one, a tie may round the other way: one step of q
  for (int64_t t = 0; t < n; t++) linear_int8(x.f32() + t * ldx, ldx, 1, w, bias, beta, single.f32() + t * ldy, ldy);
  check(std::memcmp(y.data, single.data, y.bytes()) == 0, name, "single tokens differ from all together");
}

void test_int8() {
  const int64_t shapes[][2] = {{16, 128}, {1, 32}, {50, 320}, {64, 96}, {130, 1100}, {33, 20}, {80, 257}};
  for (const auto& s : shapes)
    for (int bits : {2, 3, 4})
      for (int64_t group : {32, 64, 96, 128, 256, 5000}) {
        if (s[1] == 1100 && group != 128 && std::getenv("EAC_MOE_TEST_SMALL")) continue;
        const QuantMatrix w = random_quant(bits, s[0], s[1], group);
        const Tensor bias = random_tensor(DType::bf16, 1, s[0]);
        for (int64_t n : {1, 2, 3, 4, 5, 6, 7, 9, 13, 70})
          if (!small || n % 5 == 0 || n == 1) int8_case(w, n, n % 2 ? &bias : nullptr, float(n % 3 == 0));
      }
}

// The largest codes against the largest activations, so that every accumulator meets its bound.
void test_int8_extremes() {
  for (int bits : {2, 3, 4}) {
    const int64_t rows = 32, cols = 512;
    Tensor codes = Tensor::zeros(DType::u8, {rows, cols}), scales = Tensor::zeros(DType::f16, {rows, 4}),
           zeros = Tensor::zeros(DType::u8, {rows, 4});
    std::memset(codes.data, (1 << bits) - 1, codes.bytes());
    for (int64_t i = 0; i < scales.size(); i++) scales.as<uint16_t>()[i] = f32_to_f16(0.5f);
    const QuantMatrix w = pack_codes(codes, scales, zeros, bits, 128, false);
    const Tensor x = Tensor::zeros(DType::f32, {9, cols}), y = Tensor::zeros(DType::f32, {9, rows});
    for (int64_t i = 0; i < x.size(); i++) x.f32()[i] = i / cols % 2 ? -127.0f : 127.0f;
    linear_int8(x.f32(), cols, 9, w, nullptr, 0, y.f32(), rows);
    for (int64_t i = 0; i < y.size(); i++)
      check(y.f32()[i] == (i / rows % 2 ? -1 : 1) * 127.0f * 512.0f * 0.5f * float((1 << bits) - 1), "int8 extremes",
            std::to_string(bits) + " bit: " + std::to_string(y.f32()[i]));
  }
}

void test_int8_not_finite() {
  const QuantMatrix w = random_quant(4, 32, 256, 128);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    const Tensor x = random_tensor(DType::f32, 3, 256), y = Tensor::zeros(DType::f32, {3, 32});
    x.f32()[256 + 200] = bad;
    linear_int8(x.f32(), 256, 3, w, nullptr, 0, y.f32(), 32);
    for (int64_t i = 0; i < 96; i++)
      check(std::isnan(y.f32()[i]) == (i / 32 == 1), "int8", "a token that is not finite must show, and no other");
  }
}

void test_conversions() {
  std::vector<uint16_t> all(65536);
  std::vector<float> out(65536);
  for (int i = 0; i < 65536; i++) all[size_t(i)] = uint16_t(i);
  for (DType t : {DType::f16, DType::bf16}) {
    isa().to_f32(t, all.data(), 65533, out.data());
    for (int i = 0; i < 65533; i++) {
      const float want = t == DType::f16 ? f16_to_f32(uint16_t(i)) : bf16_to_f32(uint16_t(i));
      const bool same = std::isnan(want) ? std::isnan(out[size_t(i)]) : std::memcmp(&want, &out[size_t(i)], 4) == 0;
      check(same, "to_f32", "pattern " + std::to_string(i));
    }
  }
}

// --- helpers ------------------------------------------------------------------------------------------------------

void test_exp() {
  const float inf = std::numeric_limits<float>::infinity();
  const float special[] = {-inf,   inf, 0.0f, -0.0f, 88.72f, 88.73f, 1000.0f, -1000.0f, std::numeric_limits<float>::quiet_NaN(),
                           -104.5f};
  float out[10];
  isa().exp_f32(special, 10, out);
  check(out[0] == 0 && out[1] == inf && out[2] == 1 && out[3] == 1, "exp", "limits");
  check(std::isfinite(out[4]) && out[5] == inf && out[6] == inf && out[7] == 0 && std::isnan(out[8]) && out[9] == 0, "exp",
        "range");
  double worst = 0;
  std::vector<float> x, y(1000);
  for (int block = 0; block < 400; block++) {
    x.clear();
    for (int i = 0; i < 1000; i++) x.push_back(block % 2 ? random_source.uniform() : 88.0f * random_source.uniform());
    isa().exp_f32(x.data(), int64_t(x.size()), y.data());
    for (size_t i = 0; i < x.size(); i++) {
      const double want = std::exp(double(x[i]));
      const float f = float(want);
      if (f < 1.2e-38f) continue;
      const double ulp = double(std::nextafter(f, inf)) - double(f);
      worst = std::max(worst, std::fabs(double(y[i]) - want) / ulp);
    }
  }
  check(worst < 2.0, "exp", "error in ulp " + std::to_string(worst));
}

void test_helpers() {
  for (int64_t n : {1, 3, 4, 7, 8, 15, 16, 17, 31, 64, 65, 100, 1000}) {
    const Tensor a = random_tensor(DType::f32, 1, n), b = random_tensor(DType::f32, 1, n);
    const float *x = a.f32(), *u = b.f32();
    double dot = 0, sum = 0;
    float max = -1e30f;
    for (int64_t i = 0; i < n; i++) dot += double(x[i]) * u[i], max = std::max(max, x[i]);
    for (int64_t i = 0; i < n; i++) sum += std::exp(double(x[i]) - max);
    check(std::fabs(isa().dot_f32(x, u, n) - dot) < 1e-6 * double(n), "dot", std::to_string(n));
    // One element more than the row: it must not be touched.
    std::vector<float> v(size_t(n) + 1, 7.0f);
    std::vector<double> want(size_t(n) + 1, 7.0);
    const auto compare = [&](const char* name) {
      expect_close(std::string(name).append(" ").append(std::to_string(n)), want, std::vector<double>(v.begin(), v.end()), 1e-6);
    };
    const auto reset = [&] { std::copy_n(x, n, v.begin()); };
    reset();
    isa().silu_mul(v.data(), u, n);
    for (int64_t i = 0; i < n; i++) want[size_t(i)] = x[i] / (1 + std::exp(-double(x[i]))) * u[i];
    compare("silu_mul");
    reset();
    isa().axpy_f32(0.3f, u, v.data(), n);
    for (int64_t i = 0; i < n; i++) want[size_t(i)] = 0.3 * u[i] + x[i];
    compare("axpy");
    reset();
    isa().scale_f32(-3, v.data(), n);
    for (int64_t i = 0; i < n; i++) want[size_t(i)] = -3.0 * x[i];
    compare("scale");
    reset();
    const SoftmaxInfo info = isa().softmax_row(v.data(), n);
    for (int64_t i = 0; i < n; i++) want[size_t(i)] = std::exp(double(x[i]) - max) / sum;
    compare("softmax");
    check(info.max == max && std::fabs(info.sum - sum) < 1e-5 * sum, "softmax", "max and sum");
    for (int64_t i = 0; i < n; i++) v[size_t(i)] = -std::numeric_limits<float>::infinity();
    isa().softmax_row(v.data(), n);
    for (int64_t i = 0; i < n; i++) check(v[size_t(i)] == 0, "softmax", "a row of -inf");
  }
  float big[2] = {-500.0f, 500.0f};
  const float one[2] = {1, 1};
  isa().silu_mul(big, one, 2);
  check(big[0] == 0 && big[1] == 500, "silu_mul", "large arguments");
}

struct Test {
  const char* name;
  void (*run)();
};

}  // namespace

int main() {
  const Test tests[] = {{"conversions", test_conversions},
                        {"gemm", test_gemm},
                        {"gemm_regularity", test_gemm_regularity},
                        {"syrk", test_syrk},
                        {"linear", test_linear},
                        {"quant_short_group", test_quant_group_shorter_than_block},
                        {"int8", test_int8},
                        {"int8_extremes", test_int8_extremes},
                        {"int8_not_finite", test_int8_not_finite},
                        {"exp", test_exp},
                        {"helpers", test_helpers}};
  const Isa* levels[max_isas];
  const int count = available_isas(levels);
  for (int l = 0; l < count; l++) {
    set_isa(levels[l]->name);
    for (const Test& t : tests) {
      const int before = failures;
      t.run();
      if (failures == before) std::printf("ok %s %s\n", levels[l]->name, t.name);
    }
  }
  return failures ? 1 : 0;
}
