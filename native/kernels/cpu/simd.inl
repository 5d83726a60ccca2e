// Vectors of EAC_LANES floats and the primitives that the kernels are written with, in GCC / Clang vector extensions.
// Included by one file per instruction set inside its own anonymous namespace. EAC_PRIMITIVES names the file with what differs:
//   bf16_lanes, f16_lanes, f16_scalar   to f32
//   fused                   a * b + c in one rounding, which a compiler may or may not make of the expression
//   fold_to_4               lanes halved until four are left: (l, l + L/2), ...
//   byte_lanes, store_int8, and the integer multiply-add of int8.inl

#define EAC_INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define EAC_UNROLL _Pragma("unroll")
#else
#define EAC_UNROLL _Pragma("GCC unroll 32")
#endif

constexpr int L = EAC_LANES;
typedef float F __attribute__((vector_size(4 * EAC_LANES)));
typedef int32_t I __attribute__((vector_size(4 * EAC_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * EAC_LANES)));
typedef uint16_t H __attribute__((vector_size(2 * EAC_LANES)));
typedef double D __attribute__((vector_size(4 * EAC_LANES)));
typedef float F4 __attribute__((vector_size(16)));

template <class V, class T> EAC_INLINE V load(const T* p) {
  typedef V Unaligned __attribute__((aligned(sizeof(T)), may_alias));
  return *(const Unaligned*)p;
}
template <class V, class T> EAC_INLINE void store(T* p, V v) {
  typedef V Unaligned __attribute__((aligned(sizeof(T)), may_alias));
  *(Unaligned*)p = v;
}
EAC_INLINE F splat(float v) { return v - F{}; }

#include EAC_PRIMITIVES

EAC_INLINE float bf16_scalar(uint16_t h) {
  union {
    uint32_t u;
    float f;
  } v{uint32_t(h) << 16};
  return v.f;
}

// Sums of lanes, always by halving: (l, l + L/2), ..., (0, 2) and (1, 3), (0, 1).
EAC_INLINE float sum_lanes(F v) {
  const F4 q = fold_to_4(v);
  return (q[0] + q[2]) + (q[1] + q[3]);
}
EAC_INLINE F4 sum_lanes_4(F a, F b, F c, F d) {
#if defined(__SSE2__)
  const F4 p = fold_to_4(a), q = fold_to_4(b), r = fold_to_4(c), s = fold_to_4(d);
  const F4 pq = (F4)_mm_movelh_ps((__m128)p, (__m128)q) + (F4)_mm_movehl_ps((__m128)q, (__m128)p);
  const F4 rs = (F4)_mm_movelh_ps((__m128)r, (__m128)s) + (F4)_mm_movehl_ps((__m128)s, (__m128)r);
  return (F4)_mm_shuffle_ps((__m128)pq, (__m128)rs, 0x88) + (F4)_mm_shuffle_ps((__m128)pq, (__m128)rs, 0xdd);
#elif defined(__aarch64__)
  const float64x2_t p = (float64x2_t)fold_to_4(a), q = (float64x2_t)fold_to_4(b);
  const float64x2_t r = (float64x2_t)fold_to_4(c), s = (float64x2_t)fold_to_4(d);
  const F4 pq = (F4)vzip1q_f64(p, q) + (F4)vzip2q_f64(p, q), rs = (F4)vzip1q_f64(r, s) + (F4)vzip2q_f64(r, s);
  return (F4)vpaddq_f32(pq, rs);
#else
  return F4{sum_lanes(a), sum_lanes(b), sum_lanes(c), sum_lanes(d)};
#endif
}
EAC_INLINE float max_lanes(F v) {
  alignas(sizeof(F)) float lanes[L];
  store(lanes, v);
  F4 m = load<F4>(lanes);
  for (int i = 4; i < L; i += 4) {
    const F4 q = load<F4>(lanes + i);
    m = q > m ? q : m;
  }
  const float a = m[0] > m[1] ? m[0] : m[1], b = m[2] > m[3] ? m[2] : m[3];
  return a > b ? a : b;
}
EAC_INLINE I lane_numbers() {
  I n;
  for (int i = 0; i < L; i++) n[i] = i;
  return n;
}

// The first n < L elements, the others 0; and their way back.
EAC_INLINE F load_part(const float* p, int64_t n) {
  F v{};
  for (int64_t i = 0; i < n; i++) v[i] = p[i];
  return v;
}
EAC_INLINE void store_part(float* p, F v, int64_t n) {
  for (int64_t i = 0; i < n; i++) p[i] = v[i];
}

// exp after Cephes' expf: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial of degree 7 in r, then two steps of 2^(n/2), so that
// overflow becomes infinity and small results become subnormal or 0 by themselves. NaN stays NaN.
EAC_INLINE F exp_lanes(F x) {
  const F low = splat(-110.0f), high = splat(100.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const F magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F t = x * 1.44269504088896341f + magic;
  const F n = t - magic;
  F r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  F y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const I e = (I)t - (I)magic, half = e >> 1;
  return y * (F)((half + 127) << 23) * (F)((e - half + 127) << 23);
}
