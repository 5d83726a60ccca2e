// Loops that only reach a limit of the machine: what kernels are measured against (kernels/bench/limits.h).
// Arithmetic runs on registers alone. There are more sums than latency times throughput asks for, and as many as fit into registers.

#if defined(__aarch64__)  // up to four multiply-adds a cycle, and 32 registers
constexpr int64_t fma_sums = 20;
#else
constexpr int64_t fma_sums = 12;
#endif

// Multiply-adds in f32; a multiplication and an addition where there is no fused instruction. x -> 0.75 x + 0.25 stays near 1.
void fma_limit(int64_t steps, float* sink) {
  F factor = splat(0.75f + sink[0]), term = splat(0.25f + sink[0]), sum[fma_sums];
  for (int i = 0; i < fma_sums; i++) sum[i] = splat(1.0f + float(i));
  for (int64_t s = 0; s < steps; s++) {
    EAC_UNROLL
    for (int i = 0; i < fma_sums; i++) sum[i] = sum[i] * factor + term;
  }
  for (int i = 1; i < fma_sums; i++) sum[0] += sum[i];
  sink[1] = sum_lanes(sum[0]);
}

// Integer multiply-adds of 8-bit operands, 3 * -2 each, in the form that this level's quantized products have. OPAQUE hides from the compiler
// that an operand stays the same, or it would multiply once.
template <class V> int32_t sum_lanes_i32(const V* v) {
  int32_t lane[sizeof(V) / 4], sum = 0;
  __builtin_memcpy(lane, v, sizeof(V));
  for (const int32_t l : lane) sum += l;
  return sum;
}
#define EAC_OPAQUE(v) asm("" : EAC_REGISTER(v))
#if defined(__AVX512VNNI__)
constexpr int64_t int8_sums = 12, int8_operations = int8_sums * 128;
void int8_limit(int64_t steps, int32_t* sink) {
  const __m512i u = _mm512_set1_epi8(char(sink[0] + 3)), w = _mm512_set1_epi8(char(sink[0] - 2));
  __m512i sum[int8_sums];
  for (int i = 0; i < int8_sums; i++) sum[i] = _mm512_set1_epi32(i);
  for (int64_t s = 0; s < steps; s++) {
    EAC_UNROLL
    for (int i = 0; i < int8_sums; i++) sum[i] = _mm512_dpbusd_epi32(sum[i], u, w);
  }
  for (int i = 1; i < int8_sums; i++) sum[0] = _mm512_add_epi32(sum[0], sum[i]);
  sink[1] = sum_lanes_i32(&sum[0]);
}
#elif defined(__AVX2__)
#define EAC_REGISTER(v) "+x"(v)
// Eight products are summed in 16 bits, then widened.
constexpr int64_t int8_sums = 4, int8_operations = int8_sums * 8 * 64;
void int8_limit(int64_t steps, int32_t* sink) {
  __m256i u = _mm256_set1_epi8(char(sink[0] + 3));
  const __m256i w = _mm256_set1_epi8(char(sink[0] - 2)), ones = _mm256_set1_epi16(1);
  __m256i sum[int8_sums];
  for (int i = 0; i < int8_sums; i++) sum[i] = _mm256_set1_epi32(i);
  for (int64_t s = 0; s < steps; s++) {
    __m256i narrow[int8_sums];
    EAC_UNROLL
    for (int j = 0; j < 8; j++) {
      EAC_UNROLL
      for (int i = 0; i < int8_sums; i++) {
        EAC_OPAQUE(u);
        const __m256i product = _mm256_maddubs_epi16(u, w);
        narrow[i] = j == 0 ? product : _mm256_add_epi16(narrow[i], product);
      }
    }
    EAC_UNROLL
    for (int i = 0; i < int8_sums; i++) sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(narrow[i], ones));
  }
  for (int i = 1; i < int8_sums; i++) sum[0] = _mm256_add_epi32(sum[0], sum[i]);
  sink[1] = sum_lanes_i32(&sum[0]);
}
#elif defined(__SSE2__)
#define EAC_REGISTER(v) "+x"(v)
// Operands widened to 16 bits: pairs of products summed in 32.
constexpr int64_t int8_sums = 8, int8_operations = int8_sums * 16;
void int8_limit(int64_t steps, int32_t* sink) {
  __m128i u = _mm_set1_epi16(short(sink[0] + 3));
  const __m128i w = _mm_set1_epi16(short(sink[0] - 2));
  __m128i sum[int8_sums];
  for (int i = 0; i < int8_sums; i++) sum[i] = _mm_set1_epi32(i);
  for (int64_t s = 0; s < steps; s++) {
    EAC_UNROLL
    for (int i = 0; i < int8_sums; i++) {
      EAC_OPAQUE(u);
      sum[i] = _mm_add_epi32(sum[i], _mm_madd_epi16(u, w));
    }
  }
  for (int i = 1; i < int8_sums; i++) sum[0] = _mm_add_epi32(sum[0], sum[i]);
  sink[1] = sum_lanes_i32(&sum[0]);
}
#elif defined(EAC_DOTPROD)
#ifdef EAC_I8MM
constexpr int64_t int8_sums = 20, int8_operations = int8_sums * 64;
EAC_INLINE int32x4_t int8_step(int32x4_t sum, int8x16_t u, int8x16_t w) { return vmmlaq_s32(sum, u, w); }
#else
constexpr int64_t int8_sums = 20, int8_operations = int8_sums * 32;
EAC_INLINE int32x4_t int8_step(int32x4_t sum, int8x16_t u, int8x16_t w) { return vdotq_s32(sum, u, w); }
#endif
void int8_limit(int64_t steps, int32_t* sink) {
  const int8x16_t u = vdupq_n_s8(int8_t(sink[0] + 3)), w = vdupq_n_s8(int8_t(sink[0] - 2));
  int32x4_t sum[int8_sums];
  for (int i = 0; i < int8_sums; i++) sum[i] = vdupq_n_s32(i);
  for (int64_t s = 0; s < steps; s++) {
    EAC_UNROLL
    for (int i = 0; i < int8_sums; i++) sum[i] = int8_step(sum[i], u, w);
  }
  for (int i = 1; i < int8_sums; i++) sum[0] = vaddq_s32(sum[0], sum[i]);
  sink[1] = sum_lanes_i32(&sum[0]);
}
#elif defined(__aarch64__)
#define EAC_REGISTER(v) "+w"(v)
// Sixteen products are summed in 16 bits, then widened.
constexpr int64_t int8_sums = 12, int8_operations = int8_sums * 16 * 16;
void int8_limit(int64_t steps, int32_t* sink) {
  int8x8_t u = vdup_n_s8(int8_t(sink[0] + 3));
  const int8x8_t w = vdup_n_s8(int8_t(sink[0] - 2));
  int32x4_t sum = vdupq_n_s32(0);
  for (int64_t s = 0; s < steps; s++) {
    int16x8_t narrow[int8_sums];
    for (int i = 0; i < int8_sums; i++) narrow[i] = vdupq_n_s16(0);
    EAC_UNROLL
    for (int j = 0; j < 16; j++) {
      EAC_UNROLL
      for (int i = 0; i < int8_sums; i++) {
        EAC_OPAQUE(u);
        narrow[i] = vmlal_s8(narrow[i], u, w);
      }
    }
    EAC_UNROLL
    for (int i = 0; i < int8_sums; i++) sum = vpadalq_s16(sum, narrow[i]);
  }
  sink[1] = sum_lanes_i32(&sum);
}
#else
#define EAC_REGISTER(v) "+m"(v)
// What the compiler makes of it.
constexpr int64_t int8_sums = 4, int8_operations = int8_sums * 2 * L;
void int8_limit(int64_t steps, int32_t* sink) {
  I u = I{} + (sink[0] + 3), sum[int8_sums];
  const I w = I{} + (sink[0] - 2);
  for (int i = 0; i < int8_sums; i++) sum[i] = I{} + i;
  for (int64_t s = 0; s < steps; s++) {
    EAC_UNROLL
    for (int i = 0; i < int8_sums; i++) {
      EAC_OPAQUE(u);
      sum[i] += u * w;
    }
  }
  for (int i = 1; i < int8_sums; i++) sum[0] += sum[i];
  sink[1] = sum_lanes_i32(&sum[0]);
}
#endif
#undef EAC_OPAQUE
#undef EAC_REGISTER

// Reads `bytes`, a multiple of 256, as four streams side by side: one stream alone does not keep enough cache lines in flight.
void read_limit(const uint8_t* data, int64_t bytes, int32_t* sink) {
  constexpr int line = 64, step = sizeof(U);
  const int64_t quarter = bytes / 4;
  U sum[4] = {};
  for (int64_t i = 0; i < quarter; i += line) {
    EAC_UNROLL
    for (int s = 0; s < 4; s++) {
      EAC_UNROLL
      for (int v = 0; v < line; v += step) sum[s] ^= load<U>((const uint32_t*)(data + s * quarter + i + v));
    }
  }
  sum[0] ^= sum[1] ^ sum[2] ^ sum[3];
  sink[1] = int32_t(sum[0][0]);
}
