// The primitives of simd.inl for sixteen lanes: AVX-512 F, BW, DQ, VL, VNNI.

EAC_INLINE F bf16_lanes(const uint16_t* p) {
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
EAC_INLINE F f16_lanes(const uint16_t* p) { return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
EAC_INLINE float f16_scalar(uint16_t h) { return _cvtsh_ss(h); }

EAC_INLINE F fused(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
EAC_INLINE F4 fold_to_4(F v) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  return (F4)_mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}

// L bytes, one a lane.
EAC_INLINE I byte_lanes(const uint8_t* p) { return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
EAC_INLINE void store_int8(int8_t* p, I v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v)); }
EAC_INLINE void store_fours(float* p, int64_t stride, F v) {
  _mm_storeu_ps(p, _mm512_castps512_ps128((__m512)v));
  _mm_storeu_ps(p + stride, _mm512_extractf32x4_ps((__m512)v, 1));
  _mm_storeu_ps(p + 2 * stride, _mm512_extractf32x4_ps((__m512)v, 2));
  _mm_storeu_ps(p + 3 * stride, _mm512_extractf32x4_ps((__m512)v, 3));
}
EAC_INLINE I times_int16(I v, int32_t s) { return (I)_mm512_madd_epi16((__m512i)v, _mm512_set1_epi32(s)); }

// VNNI: four products and their sum go into 32 bits at once.
typedef int32_t Quads;
typedef I Narrow;
template <int bits> constexpr int64_t narrow_units = 4;
EAC_INLINE Narrow multiply_add(Narrow sum, U w, Quads x, int) {
  return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
}
EAC_INLINE I widen(I sum, Narrow n) { return sum + n; }
