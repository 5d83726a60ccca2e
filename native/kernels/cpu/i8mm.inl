// Unpacked codes times many tokens at the level i8mm: vmmla adds the products of 2 rows and 2 tokens over 8 channels, twice the work of
// vdot. (Packed codes times few tokens wait for memory, and to interleave them costs what vmmla saves: there the level does as dotprod.)
// LAYOUT  A unit is 4 pairs of steps (8 channels) of 8 vectors; a vector holds the pair for one row, then for the next. A vector of sums
//         is rows x tokens: 00, 01, 10, 11.

template <int bits> EAC_INLINE void unpack_pairs(const uint8_t* codes, int64_t units, uint8_t* out) {
  for (int64_t u = 0; u < units; u++, codes += bits * 64, out += unpacked_unit) EAC_UNROLL
  for (int s = 0; s < 8; s += 2) EAC_UNROLL
  for (int v = 0; v < vectors; v++) {
    const uint32x4_t a = (uint32x4_t)step_codes<bits>(codes, s, v), b = (uint32x4_t)step_codes<bits>(codes, s + 1, v);
    store(out + s * 64 + v * 32, vzip1q_u32(a, b));
    store(out + s * 64 + v * 32 + 16, vzip2q_u32(a, b));
  }
}

// sum += codes of one panel times T tokens over some units; `codes` and x move on. An odd last token is paired with itself.
template <int T> EAC_INLINE void add_pairs(const uint8_t*& codes, int64_t units, const int8_t* (&x)[T], I (&sum)[1][vectors][T]) {
  constexpr int pairs = (T + 1) / 2;
  int32x4_t part[2 * vectors][pairs];
  EAC_UNROLL
  for (int i = 0; i < 2 * vectors; i++) EAC_UNROLL
  for (int t = 0; t < pairs; t++) part[i][t] = vdupq_n_s32(0);
  for (int64_t u = 0; u < units; u++, codes += unpacked_unit) {
    EAC_UNROLL
    for (int s = 0; s < 8; s += 2) {
      int8x16_t two[pairs];
      EAC_UNROLL
      for (int t = 0; t < T; t += 2) two[t / 2] = vcombine_s8(vld1_s8(x[t] + s * 4), vld1_s8(x[t + 1 < T ? t + 1 : t] + s * 4));
      EAC_UNROLL
      for (int i = 0; i < 2 * vectors; i++) {
        if (i % 2 == 0)
          __asm__ volatile("" ::: "memory");  // GCC would load the codes of many vectors first, and run out of registers
        const int8x16_t w = vld1q_s8((const int8_t*)codes + s * 64 + i * 16);
        EAC_UNROLL
        for (int t = 0; t < pairs; t++) part[i][t] = vmmlaq_s32(part[i][t], w, two[t]);
      }
    }
    EAC_UNROLL
    for (int t = 0; t < T; t++) x[t] += 32;
  }
  EAC_UNROLL
  for (int v = 0; v < vectors; v++) EAC_UNROLL
  for (int t = 0; t < T; t++) {
    const int32x4_t a = part[2 * v][t / 2], b = part[2 * v + 1][t / 2];
    sum[0][v][t] = sum[0][v][t] + (I)(t % 2 ? vuzp2q_s32(a, b) : vuzp1q_s32(a, b));
  }
}
