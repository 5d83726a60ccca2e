// The primitives of simd.inl for eight lanes: AVX2, FMA, F16C.

EAC_INLINE F bf16_lanes(const uint16_t* p) {
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
EAC_INLINE F f16_lanes(const uint16_t* p) { return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
EAC_INLINE float f16_scalar(uint16_t h) { return _cvtsh_ss(h); }

EAC_INLINE F4 fold_to_4(F v) { return (F4)_mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1)); }

// 4 bit. A byte shuffle puts code bytes where both nibbles lie inside a float's mantissa; with the exponent of 1 they read
// 1 + c / 128 (low nibble, bits 16-19) and 1 + c / 2048 (high nibble, bits 12-15). One exact multiply-add removes the 1, the zero
// point and the factor: (128 + c) s - (128 + z) s.
// 2 and 3 bit. A permutation looks the value up in a table of eight; it reads only the low three bits of a lane.
template <int bits> struct Lut {
  F table;
  EAC_INLINE void set(float s, int z) {
    const int top = bits == 2 ? 3 : 7;  // 2 bit: bit 2 of the index belongs to the next code, so the table repeats
    const I index = I{0, 1, 2, 3, 4, 5, 6, 7} & top;
    table = __builtin_convertvector(index - z, F) * s;
  }
  EAC_INLINE F operator()(U index) const { return (F)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index); }
};
template <> struct Lut<4> {
  F low_scale, low_offset, high_scale, high_offset;
  EAC_INLINE void set(float s, int z) {
    low_scale = splat(s * 128.0f);
    low_offset = splat(-s * float(128 + z));
    high_scale = splat(s * 2048.0f);
    high_offset = splat(-s * float(2048 + z));
  }
};

EAC_INLINE U byte_lanes(const uint8_t* p) { return (U)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }

EAC_INLINE void decode(const uint8_t* block, const Lut<4>& lut, F* w) {
  const __m256i b = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)block));
  const __m256i pick = _mm256_setr_epi8(-1, 0, 0, -1, -1, 1, 1, -1, -1, 2, 2, -1, -1, 3, 3, -1, -1, 4, 4, -1, -1, 5, 5, -1, -1, 6,
                                        6, -1, -1, 7, 7, -1);
  const __m256i pick_8 = _mm256_setr_epi8(-1, 8, 8, -1, -1, 9, 9, -1, -1, 10, 10, -1, -1, 11, 11, -1, -1, 12, 12, -1, -1, 13, 13,
                                          -1, -1, 14, 14, -1, -1, 15, 15, -1);
  const U first = (U)_mm256_shuffle_epi8(b, pick), second = (U)_mm256_shuffle_epi8(b, pick_8);
  const U one = (U)splat(1.0f);
  w[0] = (F)((first & 0xf0000u) | one) * lut.low_scale + lut.low_offset;
  w[1] = (F)((second & 0xf0000u) | one) * lut.low_scale + lut.low_offset;
  w[2] = (F)((first & 0xf000u) | one) * lut.high_scale + lut.high_offset;
  w[3] = (F)((second & 0xf000u) | one) * lut.high_scale + lut.high_offset;
}

EAC_INLINE void decode(const uint8_t* block, const Lut<2>& lut, F* w) {
  const U b = byte_lanes(block);
  w[0] = lut(b);
  w[1] = lut(b >> 2);
  w[2] = lut(b >> 4);
  w[3] = lut(b >> 6);
}

// The low bits spread to one code a byte, bit 2 of each from the last word: lane l finds its four at the bits l, l + 8, ...
EAC_INLINE void decode(const uint8_t* block, const Lut<3>& lut, F* w) {
  const U b = byte_lanes(block);
  int32_t word;
  __builtin_memcpy(&word, block + 8, 4);
  const U high = (U)_mm256_set1_epi32(word) >> U{0, 1, 2, 3, 4, 5, 6, 7};
  const U pair = b | (b << 6);
  const U low = pair | (pair << 12);
  const U index = (low & 0x03030303u) | ((high & 0x01010101u) << 2);
  w[0] = lut(index);
  w[1] = lut(index >> 8);
  w[2] = lut(index >> 16);
  w[3] = lut(index >> 24);
}
