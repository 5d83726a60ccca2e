// The primitives of simd.inl for four lanes: any machine with 16-byte vectors, with SSE2 spellings where GCC's own are poor.

EAC_INLINE F bf16_lanes(const uint16_t* p) {
#if defined(__SSE2__)
  return (F)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i*)p));
#else
  return (F)(__builtin_convertvector(load<H>(p), U) << 16);
#endif
}

// The half's bits moved into a float's place and scaled by 2^112 are right for subnormals too; infinities and NaNs need the mask.
EAC_INLINE F f16_lanes(const uint16_t* p) {
#if defined(__SSE2__)
  const U h = (U)_mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i*)p), _mm_setzero_si128());
#else
  const U h = __builtin_convertvector(load<H>(p), U);
#endif
  const U magnitude = (h & 0x7fffu) << 13;
  const U special = (U)(magnitude >= 0x0f800000u) & 0x7f800000u;
  const F scaled = (F)magnitude * 0x1p112f;
  return (F)((U)scaled | special | ((h & 0x8000u) << 16));
}
EAC_INLINE float f16_scalar(uint16_t h) {
  union {
    uint32_t u;
    float f;
  } v{uint32_t(h & 0x7fffu) << 13};
  const uint32_t special = v.u >= 0x0f800000u ? 0x7f800000u : 0u;
  v.f *= 0x1p112f;
  v.u |= special | uint32_t(h & 0x8000u) << 16;
  return v.f;
}

EAC_INLINE F fused(F a, F b, F c) { return a * b + c; }  // in two roundings where the machine has no such instruction
EAC_INLINE F4 fold_to_4(F v) { return v; }

// L bytes, one a lane.
EAC_INLINE I byte_lanes(const uint8_t* p) {
#if defined(__SSE2__)
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  const __m128i zero = _mm_setzero_si128();
  return (I)_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(word), zero), zero);
#else
  typedef uint8_t B4 __attribute__((vector_size(4)));
  return __builtin_convertvector(load<B4>(p), I);
#endif
}
EAC_INLINE void store_int8(int8_t* p, I v) {
  for (int l = 0; l < L; l++) p[l] = int8_t(v[l]);
}
EAC_INLINE void store_fours(float* p, int64_t, F v) { store(p, v); }
EAC_INLINE I times_int16(I v, int32_t s) { return v * s; }

// Sums of four products in 32 bits.
typedef int32_t Quads;
typedef I Narrow;
template <int bits> constexpr int64_t narrow_units = 4;
EAC_INLINE Narrow multiply_add(Narrow sum, U w, Quads x, int) {
#if defined(__SSE2__)
  const __m128i zero = _mm_setzero_si128(), bytes = _mm_set1_epi32(x);
  const __m128i x16 = _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
  const __m128 low = (__m128)_mm_madd_epi16(_mm_unpacklo_epi8((__m128i)w, zero), x16);
  const __m128 high = (__m128)_mm_madd_epi16(_mm_unpackhi_epi8((__m128i)w, zero), x16);
  return sum + (I)_mm_shuffle_ps(low, high, 0x88) + (I)_mm_shuffle_ps(low, high, 0xdd);
#else
  for (int i = 0; i < 4; i++) sum = sum + (I)((w >> (8 * i)) & 255u) * int32_t(int8_t(x >> (8 * i)));
  return sum;
#endif
}
EAC_INLINE I widen(I sum, Narrow n) { return sum + n; }
