// The primitives of simd.inl for four lanes on aarch64. Shared by the levels baseline, dotprod (EAC_DOTPROD) and i8mm.

EAC_INLINE F bf16_lanes(const uint16_t* p) { return (F)vshll_n_u16(vld1_u16(p), 16); }
EAC_INLINE F f16_lanes(const uint16_t* p) { return (F)vcvt_f32_f16((float16x4_t)vld1_u16(p)); }
EAC_INLINE float f16_scalar(uint16_t h) {
  __fp16 v;
  __builtin_memcpy(&v, &h, 2);
  return float(v);
}

EAC_INLINE F fused(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
EAC_INLINE F4 fold_to_4(F v) { return v; }

// L bytes, one a lane.
EAC_INLINE I byte_lanes(const uint8_t* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, 4);
  return (I)vmovl_u16(vget_low_u16(vmovl_u8((uint8x8_t)vdup_n_u32(word))));
}
EAC_INLINE void store_int8(int8_t* p, I v) {
  const int16x4_t words = vmovn_s32((int32x4_t)v);
  const uint32x2_t bytes = (uint32x2_t)vmovn_s16(vcombine_s16(words, words));
  vst1_lane_u32((uint32_t*)p, bytes, 0);
}
EAC_INLINE void store_fours(float* p, int64_t, F v) { store(p, v); }
EAC_INLINE I times_int16(I v, int32_t s) { return v * s; }

#ifdef EAC_DOTPROD
// Four products and their sum go into 32 bits at once; the activations of four steps are one vector, of which each step takes a lane.
typedef int8x16_t Quads;
typedef I Narrow;
template <int bits> constexpr int64_t narrow_units = 4;
EAC_INLINE Narrow multiply_add(Narrow sum, U w, Quads x, int lane) {
  switch (lane) {  // the instruction wants a constant; `lane` is one after unrolling
    case 0: return (I)vdotq_laneq_s32((int32x4_t)sum, (int8x16_t)w, x, 0);
    case 1: return (I)vdotq_laneq_s32((int32x4_t)sum, (int8x16_t)w, x, 1);
    case 2: return (I)vdotq_laneq_s32((int32x4_t)sum, (int8x16_t)w, x, 2);
    default: return (I)vdotq_laneq_s32((int32x4_t)sum, (int8x16_t)w, x, 3);
  }
}
EAC_INLINE I widen(I sum, Narrow n) { return sum + n; }
#else
// Each product is added to a sum of its own in 16 bits, at most 127 * code a step.
typedef int32_t Quads;
struct Narrow {
  int16x8_t low, high;
};
template <int bits> constexpr int64_t narrow_units = bits == 4 ? 2 : 4;
EAC_INLINE Narrow multiply_add(Narrow sum, U w, Quads x, int) {
  const int8x16_t codes = (int8x16_t)w, four = (int8x16_t)vdupq_n_s32(x);
  return {vmlal_s8(sum.low, vget_low_s8(codes), vget_low_s8(four)), vmlal_high_s8(sum.high, codes, four)};
}
EAC_INLINE I widen(I sum, Narrow n) { return sum + (I)vpaddq_s32(vpaddlq_s16(n.low), vpaddlq_s16(n.high)); }
#endif
