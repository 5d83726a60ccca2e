// The primitives of simd.inl for eight lanes: AVX2, FMA, F16C.

EAC_INLINE F bf16_lanes(const uint16_t* p) {
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
EAC_INLINE F f16_lanes(const uint16_t* p) { return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
EAC_INLINE float f16_scalar(uint16_t h) { return _cvtsh_ss(h); }

EAC_INLINE F fused(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
EAC_INLINE F4 fold_to_4(F v) { return (F4)_mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1)); }

// L bytes, one a lane.
EAC_INLINE I byte_lanes(const uint8_t* p) { return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
EAC_INLINE void store_int8(int8_t* p, I v) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}
EAC_INLINE void store_fours(float* p, int64_t stride, F v) {
  _mm_storeu_ps(p, _mm256_castps256_ps128((__m256)v));
  _mm_storeu_ps(p + stride, _mm256_extractf128_ps((__m256)v, 1));
}
// The upper halves of v are 0, so what lies above bit 15 of s adds nothing.
EAC_INLINE I times_int16(I v, int32_t s) { return (I)_mm256_madd_epi16((__m256i)v, _mm256_set1_epi32(s)); }

// Sums of two products in 16 bits, widened to sums of four in 32.
typedef int32_t Quads;
typedef __m256i Narrow;
template <int bits> constexpr int64_t narrow_units = bits == 4 ? 1 : bits == 3 ? 2 : 4;
EAC_INLINE Narrow multiply_add(Narrow sum, U w, Quads x, int) {
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(x)));
  __asm__("" : "+x"(sum));  // GCC would collect the products of all steps and add them as a tree, and run out of registers
  return sum;
}
EAC_INLINE I widen(I sum, Narrow n) { return sum + (I)_mm256_madd_epi16(n, _mm256_set1_epi16(1)); }
