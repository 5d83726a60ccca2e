// Element types and their conversions. f16 and bf16 are storage types only: arithmetic is f32 (or f64).
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>

namespace eac {

enum class DType : uint8_t { f32, f16, bf16, f64, i32, u8 };

constexpr size_t dtype_size(DType t) {
  switch (t) {
    case DType::f64: return 8;
    case DType::f32:
    case DType::i32: return 4;
    case DType::f16:
    case DType::bf16: return 2;
    case DType::u8: return 1;
  }
  return 0;
}

inline float bf16_to_f32(uint16_t v) { return std::bit_cast<float>(uint32_t(v) << 16); }

// Round to nearest even; NaN stays NaN.
inline uint16_t f32_to_bf16(float f) {
  uint32_t u = std::bit_cast<uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40u);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline float f16_to_f32(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  uint32_t exp = (h >> 10) & 0x1fu, man = h & 0x3ffu;
  if (exp == 31) return std::bit_cast<float>(sign | 0x7f800000u | (man << 13));
  if (exp != 0) return std::bit_cast<float>(sign | ((exp + 112u) << 23) | (man << 13));
  const float subnormal = float(man) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

// Round to nearest even; overflow becomes infinity.
inline uint16_t f32_to_f16(float f) {
  const uint32_t u = std::bit_cast<uint32_t>(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (a >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 65536 or more
  if (a < 0x38800000u) {                                  // subnormal half: the addition rounds for us
    const float r = std::bit_cast<float>(a) + 0.5f;       // ulp(0.5) = 2^-24
    return uint16_t(sign | (std::bit_cast<uint32_t>(r) - 0x3f000000u));
  }
  const uint32_t v = a - 0x38000000u;
  return uint16_t(sign | ((v + 0xfffu + ((v >> 13) & 1u)) >> 13));
}

}  // namespace eac
