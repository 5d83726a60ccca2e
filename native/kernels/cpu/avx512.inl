// The primitives of simd.inl for sixteen lanes: AVX-512 F, BW, DQ, VL.

EAC_INLINE F bf16_lanes(const uint16_t* p) {
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
EAC_INLINE F f16_lanes(const uint16_t* p) { return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
EAC_INLINE float f16_scalar(uint16_t h) { return _cvtsh_ss(h); }

EAC_INLINE F4 fold_to_4(F v) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  return (F4)_mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}

// A permutation looks values up in a table of sixteen. It reads only the low four bits of a lane: what a shift left above them
// does no harm, and for 2 and 3 bit the table repeats.
template <int bits> struct Lut {
  F table;
  EAC_INLINE void set(float s, int z) {
    const I index = I{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} & ((1 << bits) - 1);
    table = __builtin_convertvector(index - z, F) * s;
  }
  EAC_INLINE F operator()(U index) const { return (F)_mm512_permutexvar_ps((__m512i)index, (__m512)table); }
};

// Eight bytes in the lanes 0-7 and again in 8-15.
EAC_INLINE U byte_lanes_twice(const uint8_t* p) {
  int64_t eight;
  __builtin_memcpy(&eight, p, 8);
  return (U)_mm512_cvtepu8_epi32(_mm_set1_epi64x(eight));
}

EAC_INLINE void decode(const uint8_t* block, const Lut<4>& lut, F* w) {
  const U b = (U)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)block));
  w[0] = lut(b);
  w[1] = lut(b >> 4);
}

EAC_INLINE void decode(const uint8_t* block, const Lut<2>& lut, F* w) {
  const U b = byte_lanes_twice(block) >> U{0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2};
  w[0] = lut(b);
  w[1] = lut(b >> 4);
}

// Bit 2 of code l is bit l of the last word: rotated to bit 2 of lane l, and for the codes 16-31 after a shift by 16.
EAC_INLINE void decode(const uint8_t* block, const Lut<3>& lut, F* w) {
  const U b = byte_lanes_twice(block) >> U{0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2};
  int32_t word;
  __builtin_memcpy(&word, block + 8, 4);
  const __m512i turn = _mm512_setr_epi32(2, 1, 0, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19);
  const __m512i high = _mm512_rolv_epi32(_mm512_set1_epi32(word), turn);
  const __m512i high_16 = _mm512_rolv_epi32(_mm512_set1_epi32(word), _mm512_add_epi32(turn, _mm512_set1_epi32(16)));
  const __m512i two = _mm512_set1_epi32(3);
  w[0] = lut((U)_mm512_ternarylogic_epi32(two, (__m512i)b, high, 0xca));  // two ? b : high
  w[1] = lut((U)_mm512_ternarylogic_epi32(two, (__m512i)(b >> 4), high_16, 0xca));
}
