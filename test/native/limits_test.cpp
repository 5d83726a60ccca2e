// What benchmarks measure with: the loops at the machine's limits do the operations that they are credited with, and random weights.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/thread_pool.h"
#include "harness.h"
#include "kernels/bench/limits.h"
#include "kernels/bench/random_matrix.h"
#include "kernels/cpu/isa.h"
#include "kernels/quant/quantize.h"

using namespace eac;
using test::check;

namespace {

// body() under each instruction set of this machine.
template <class F> void on_every_level(F body) {
  const Isa* levels[8];
  const int n = available_isas(levels);
  const char* before = isa().name;
  for (int i = 0; i < n; i++) {
    set_isa(levels[i]->name);
    body(isa());
  }
  set_isa(before);
}

// The lanes of all sums together: operations / 2 products a step, 3 * -2 each.
void int8_loop() {
  on_every_level([](const Isa& level) {
    const auto result = [&](int64_t steps) {
      int32_t sink[2] = {};
      level.limits.int8(steps, sink);
      return int64_t(sink[1]);
    };
    const int64_t products = level.limits.int8_operations / 2;
    check(result(1000) - result(0) == 1000 * products * 3 * -2, std::string("int8 operations of ") + level.name);
  });
}

// Each lane of each sum does one multiply-add a step: x -> 0.75 x + 0.25 from 1 + i. The lanes of all sums are added up.
void fma_loop() {
  on_every_level([](const Isa& level) {
    float sink[2] = {};
    level.limits.fma(3, sink);
    const int64_t sums = level.limits.fma_operations / 2 / level.lanes;
    double want = 0;
    for (int64_t i = 0; i < sums; i++) {
      double x = 1 + double(i);
      for (int step = 0; step < 3; step++) x = 0.75 * x + 0.25;
      want += x * level.lanes;
    }
    check(std::fabs(double(sink[1]) - want) < 1e-4 * want, std::string("float operations of ") + level.name);
  });
}

// Every byte is read: one that differs changes the result (the lane that is returned holds every lanes-th word).
void read_loop() {
  on_every_level([](const Isa& level) {
    const int64_t bytes = 4096, word = 4;
    Tensor buffer = Tensor::zeros(DType::u8, {bytes});
    const auto result = [&] {
      int32_t sink[2] = {};
      level.limits.read(buffer.as<uint8_t>(), bytes, sink);
      return sink[1];
    };
    int64_t seen = 0;
    for (int64_t i = 0; i < bytes; i += word * level.lanes) {
      buffer.as<uint8_t>()[i] = 1;
      seen += result() == 1;
      buffer.as<uint8_t>()[i] = 0;
    }
    check(seen == bytes / (word * level.lanes), std::string("bytes read by ") + level.name);
  });
}

void limits_are_finite() {
  const Tensor buffer = limit_buffer(size_t(1) << 24);
  check(buffer.bytes() == size_t(1) << 24 && limit_buffer(1).bytes() == size_t(1) << 22, "size of the buffer");
  on_every_level([&](const Isa& level) {
    for (int64_t pass = 0; pass < 2; pass++) {
      const MachineRates m = limit_pass(buffer, pass);
      for (double v : {m.read_bandwidth, m.fma_peak, m.int8_peak})
        check(std::isfinite(v) && v > 0, std::string("a limit of ") + level.name + " is " + std::to_string(v));
    }
  });
}

bool same(const Tensor& a, const Tensor& b) { return a.bytes() == b.bytes() && std::memcmp(a.data, b.data, a.bytes()) == 0; }

void random_quant() {
  for (int bits = 2; bits <= 4; bits++)
    for (bool symmetric : {false, true}) {
      const int before = thread_count();
      set_thread_count(1);
      const QuantMatrix one = random_quant_matrix(70, 416, bits, 128, symmetric, 5);
      set_thread_count(3);
      const QuantMatrix three = random_quant_matrix(70, 416, bits, 128, symmetric, 5);
      set_thread_count(before);
      check(same(one.codes, three.codes) && same(one.scales, three.scales) && same(one.zeros, three.zeros), "same by threads");
      check(!same(one.codes, random_quant_matrix(70, 416, bits, 128, symmetric, 6).codes), "another seed");

      const Tensor codes = unpack_codes(one);
      std::vector<int64_t> counts(16);
      for (int64_t i = 0; i < codes.size(); i++) counts[codes.as<uint8_t>()[i]]++;
      const int64_t mean = codes.size() >> bits;
      for (int v = 0; v < 16; v++)
        check(v >> bits ? counts[size_t(v)] == 0 : std::abs(counts[size_t(v)] - mean) < mean / 5, "codes are uniform");

      const Tensor w = dequantize(one);
      double squares = 0;
      for (int64_t i = 0; i < w.size(); i++) squares += double(w.f32()[i]) * w.f32()[i];
      const double variance = squares / double(w.size()) * 416;  // of an output of unit inputs
      check(variance > 0.1 && variance < 4, "outputs of about unit size: " + std::to_string(variance));
    }
  check(test::error_code([] { random_quant_matrix(4, 40, 4, 128, false, 0); }) == "INVALID_ARGUMENT", "ragged columns");
}

void random_dense() {
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    const Tensor w = random_matrix(300, 64, dtype, 9);
    check(same(w, random_matrix(300, 64, dtype, 9)) && !same(w, random_matrix(300, 64, dtype, 10)), "seeds");
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < w.size(); i++) sum += element(w, i), squares += element(w, i) * element(w, i);
    check(std::fabs(sum / double(w.size())) < 0.01, "mean 0");
    check(std::fabs(squares / double(w.size()) * 64 - 1) < 0.05, "variance 1 / cols");
  }
  check(test::error_code([] { random_matrix(2, 2, DType::i32, 0); }) == "INVALID_ARGUMENT", "dtype");
}

}  // namespace

int main() {
  test::run("int8 loop", int8_loop);
  test::run("float loop", fma_loop);
  test::run("read loop", read_loop);
  test::run("limits", limits_are_finite);
  test::run("random quantized matrix", random_quant);
  test::run("random dense matrix", random_dense);
  return test::failures != 0;
}
