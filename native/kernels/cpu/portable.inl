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

EAC_INLINE F4 fold_to_4(F v) { return v; }

template <int bits> struct Lut {
  F scale, offset;
  EAC_INLINE void set(float s, int z) {
    scale = splat(s);
    offset = splat(-s * float(z));
  }
};

// Four bytes, one a lane.
EAC_INLINE U byte_lanes(const uint8_t* p) {
#if defined(__SSE2__)
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  const __m128i zero = _mm_setzero_si128();
  return (U)_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(word), zero), zero);
#else
  typedef uint8_t B4 __attribute__((vector_size(4)));
  return __builtin_convertvector(load<B4>(p), U);
#endif
}

template <int bits> EAC_INLINE void decode(const uint8_t* block, const Lut<bits>& lut, F* w) {
  constexpr int period = bits == 4 ? 16 : 8, step = bits == 4 ? 4 : 2;
  uint32_t high = 0;
  if constexpr (bits == 3) __builtin_memcpy(&high, block + 8, 4);
  const U lane_bit = U{1, 2, 4, 8};
  EAC_UNROLL
  for (int j = 0; j < 32; j += L) {
    U c = (byte_lanes(block + j % period) >> (j / period * step)) & ((1u << step) - 1u);
    if constexpr (bits == 3) c |= (U)((((high >> j) + U{}) & lane_bit) != U{}) & 4u;
    w[j / L] = __builtin_convertvector((I)c, F) * lut.scale + lut.offset;
  }
}
