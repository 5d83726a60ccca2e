// Published weight formats: the fast versions against the definitions, at tile edges, with 1 and several threads.
#include <cstdio>

#include "core/thread_pool.h"
#include "harness.h"
#include "kernels/convert/convert.h"

using namespace eac;
using namespace eac::test;

namespace {

bool same(const Tensor& a, const Tensor& b) {
  return a.dtype == b.dtype && a.shape == b.shape && std::memcmp(a.data, b.data, a.bytes()) == 0;
}

Tensor random_bytes(DType dtype, std::vector<int64_t> shape, unsigned seed) {
  std::mt19937 gen(seed);
  Tensor t = Tensor::zeros(dtype, std::move(shape));
  for (size_t i = 0; i < t.bytes(); i++) t.as<uint8_t>()[i] = uint8_t(gen());
  return t;
}

template <class F> void with_threads(F test) {
  const int before = thread_count();
  for (int n : {1, 3}) {
    set_thread_count(n);
    test();
  }
  set_thread_count(before);
}

void parts() {
  for (DType dtype : {DType::u8, DType::bf16, DType::f32, DType::f64})
    for (int64_t a : {1, 63, 64, 65, 130})
      for (int64_t b : {1, 64, 97}) {
        const Tensor m = random_bytes(dtype, {a, b}, unsigned(a * 131 + b));
        for (bool transposed : {false, true})
          for (int64_t step : {1, 2, 3})
            for (int64_t from = 0; from < step; from++) {
              const int64_t available = transposed ? b : a, rows = from < available ? (available - 1 - from) / step + 1 : 0;
              check(same(copy_part(m, {from, step, rows}, transposed), copy_part_reference(m, {from, step, rows}, transposed)),
                    "part of " + std::to_string(a) + " x " + std::to_string(b));
            }
      }
}

// All codes but NaN, scales of every exponent, blocks that end where they like.
void fp8() {
  for (int64_t rows : {1, 15, 16, 17, 130})
    for (int64_t cols : {1, 127, 128, 129, 300})
      for (int64_t block : {32, 128}) {
        Tensor codes = random_bytes(DType::u8, {rows, cols}, unsigned(rows * 7 + cols));
        for (int64_t i = 0; i < codes.size(); i++)
          if ((codes.as<uint8_t>()[i] & 0x7f) == 0x7f) codes.as<uint8_t>()[i] = uint8_t(i & 0x80);
        const int64_t down = (rows + block - 1) / block, across = (cols + block - 1) / block;
        for (int exponent = -149; exponent < 128; exponent += 12) {
          Tensor scales = random_matrix(down, across, unsigned(exponent + 200));
          for (int64_t i = 0; i < scales.size(); i++) scales.f32()[i] = std::ldexp(1 + scales.f32()[i] / 16, exponent);
          check(same(decode_fp8(codes, scales, block, block), decode_fp8_reference(codes, scales, block, block)),
                "fp8 " + std::to_string(rows) + " x " + std::to_string(cols) + " at 2^" + std::to_string(exponent));
        }
      }
}

void mxfp4() {
  for (int64_t rows : {1, 16, 17, 40})
    for (int64_t groups : {1, 3}) {
      const Tensor blocks = random_bytes(DType::u8, {rows, 16 * groups}, unsigned(rows));
      Tensor scales = Tensor::zeros(DType::u8, {rows, groups});
      for (int first = 0; first < 255; first += 5) {
        for (int64_t i = 0; i < scales.size(); i++) scales.as<uint8_t>()[i] = uint8_t((first + i) % 255);
        for (int64_t step : {1, 2}) {
          const RowRange part{step - 1, step, rows / step};
          check(same(decode_mxfp4(blocks, scales, part), decode_mxfp4_reference(blocks, scales, part)),
                "mxfp4 with " + std::to_string(rows) + " rows from scale " + std::to_string(first));
        }
      }
    }
}

void errors() {
  Tensor codes = Tensor::zeros(DType::u8, {40, 70}), scales = Tensor::zeros(DType::f32, {2, 3});
  for (uint8_t nan : {0x7f, 0xff}) {
    codes.as<uint8_t>()[39 * 70 + 69] = nan;
    check(error_code([&] { decode_fp8(codes, scales, 32, 32); }) == "NON_FINITE", "NaN code");
  }
  codes.as<uint8_t>()[39 * 70 + 69] = 0x7e;
  check(error_code([&] { decode_fp8(codes, scales, 32, 32); }).empty(), "the largest code");
  scales.f32()[5] = INFINITY;
  check(error_code([&] { decode_fp8(codes, scales, 32, 32); }) == "NON_FINITE", "infinite scale");

  const Tensor blocks = Tensor::zeros(DType::u8, {4, 32});
  Tensor exponents = Tensor::zeros(DType::u8, {4, 2});
  exponents.as<uint8_t>()[5] = 255;  // row 2
  check(error_code([&] { decode_mxfp4(blocks, exponents, {0, 2, 2}); }) == "NON_FINITE", "NaN scale");
  check(error_code([&] { decode_mxfp4(blocks, exponents, {1, 2, 2}); }).empty(), "NaN scale of another part");
}

}  // namespace

int main() {
  with_threads([] {
    run("parts", parts);
    run("fp8", fp8);
    run("mxfp4", mxfp4);
    run("errors", errors);
  });
  return failures ? 1 : 0;
}
