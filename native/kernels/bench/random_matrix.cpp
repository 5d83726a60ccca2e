#include "kernels/bench/random_matrix.h"

#include <algorithm>
#include <cmath>

#include "core/thread_pool.h"
#include "kernels/quant/group_params.h"

namespace eac {
namespace {

// SplitMix64 (Steele, Lea, Flood 2014): number i of a seed without the ones before it.
uint64_t random_word(uint64_t seed, uint64_t i) {
  uint64_t z = seed + (i + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}

// body(begin, end) over pieces of [0, n).
template <class F> void in_pieces(int64_t n, F body) {
  constexpr int64_t piece = 1 << 16;
  parallel_for((n + piece - 1) / piece, [&](int64_t p) { body(p * piece, std::min(n, (p + 1) * piece)); });
}

void fill_bytes(Tensor& t, uint64_t seed) {
  uint8_t* bytes = t.as<uint8_t>();
  in_pieces(int64_t(t.bytes()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += 8) {
      const uint64_t word = random_word(seed, uint64_t(i / 8));
      std::memcpy(bytes + i, &word, size_t(std::min<int64_t>(8, end - i)));
    }
  });
}

double uniform(uint64_t word) { return double(word >> 11) * 0x1p-53; }  // [0, 1)

}  // namespace

QuantMatrix random_quant_matrix(int64_t rows, int64_t cols, int bits, int64_t group_size, bool symmetric, uint64_t seed) {
  require(rows > 0 && cols > 0 && cols % quant_block == 0, "a random matrix needs rows, and columns in multiples of 32");
  QuantMatrix q = make_quant_matrix(rows, cols, bits, group_size, symmetric);
  fill_bytes(q.codes, seed);  // every bit pattern is a code
  const uint8_t middle = uint8_t(1 << (bits - 1)), mask = uint8_t((1 << bits) - 1);
  const double scale = 1 / (std::sqrt(double(cols)) * middle);
  in_pieces(q.scales.size(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const uint64_t word = random_word(~seed, uint64_t(i));
      q.scales.as<uint16_t>()[i] = f32_to_f16(float(scale * (0.5 + uniform(word))));
      q.zeros.as<uint8_t>()[i] = symmetric ? middle : uint8_t(word) & mask;
    }
  });
  return q;
}

Tensor random_matrix(int64_t rows, int64_t cols, DType dtype, uint64_t seed) {
  require(rows > 0 && cols > 0, "a random matrix needs rows and columns");
  require(dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16, "a random matrix is f32, f16 or bf16");
  Tensor t = Tensor::zeros(dtype, {rows, cols});
  const double width = 2 * std::sqrt(3 / double(cols));
  in_pieces(t.size(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const float v = float(width * (uniform(random_word(seed, uint64_t(i))) - 0.5));
      if (dtype == DType::f32)
        t.f32()[i] = v;
      else
        t.as<uint16_t>()[i] = dtype == DType::f16 ? f32_to_f16(v) : f32_to_bf16(v);
    }
  });
  return t;
}

}  // namespace eac
