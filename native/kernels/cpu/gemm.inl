// Packing and register tiles of C = A B. Panels are [k][width], zero padded, so that every tile, edges included, runs the
// same multiplications in the same order.

template <class T> struct VecOf;
template <> struct VecOf<float> {
  typedef F type;
};
template <> struct VecOf<double> {
  typedef D type;
};

template <class T> EAC_INLINE T load_scalar(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32: return T(((const float*)data)[i]);
    case DType::f64: return T(((const double*)data)[i]);
    case DType::f16: return T(f16_scalar(((const uint16_t*)data)[i]));
    case DType::bf16: return T(bf16_scalar(((const uint16_t*)data)[i]));
    default: return T(0);
  }
}

void to_f32(DType dtype, const void* in, int64_t n, float* out) {
  const uint16_t* h = (const uint16_t*)in;
  int64_t i = 0;
  if (dtype == DType::bf16) {
    for (; i + L <= n; i += L) store(out + i, bf16_lanes(h + i));
  } else if (dtype == DType::f16) {
    for (; i + L <= n; i += L) store(out + i, f16_lanes(h + i));
  } else if (dtype == DType::f32) {
    for (; i + L <= n; i += L) store(out + i, load<F>((const float*)in + i));
  }
  for (; i < n; i++) out[i] = load_scalar<float>(in, dtype, i);
}

// Four rows of four floats, transposed. `in` rows are `stride` apart, `out` rows `width`.
EAC_INLINE void transpose_4x4(const float* in, int64_t stride, float* out, int64_t width) {
#if defined(__SSE2__)
  __m128 a = _mm_loadu_ps(in), b = _mm_loadu_ps(in + stride), c = _mm_loadu_ps(in + 2 * stride),
         d = _mm_loadu_ps(in + 3 * stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(out, a);
  _mm_storeu_ps(out + width, b);
  _mm_storeu_ps(out + 2 * width, c);
  _mm_storeu_ps(out + 3 * width, d);
#elif defined(__aarch64__)
  const F a = load<F>(in), b = load<F>(in + stride), c = load<F>(in + 2 * stride), d = load<F>(in + 3 * stride);
  const float64x2_t ab_02 = (float64x2_t)vtrn1q_f32(a, b), ab_13 = (float64x2_t)vtrn2q_f32(a, b);
  const float64x2_t cd_02 = (float64x2_t)vtrn1q_f32(c, d), cd_13 = (float64x2_t)vtrn2q_f32(c, d);
  store(out, (F)vtrn1q_f64(ab_02, cd_02));
  store(out + width, (F)vtrn1q_f64(ab_13, cd_13));
  store(out + 2 * width, (F)vtrn2q_f64(ab_02, cd_02));
  store(out + 3 * width, (F)vtrn2q_f64(ab_13, cd_13));
#else
  for (int p = 0; p < 4; p++)
    for (int i = 0; i < 4; i++) out[p * width + i] = in[i * stride + p];
#endif
}

// Rows contiguous along k become panel columns. Rows in fours; the last four may overlap the ones before.
EAC_INLINE void pack_rows_f32(const float* in, int64_t stride, int64_t width, int64_t count, int64_t k, float* out) {
  int64_t p = 0;
  if (count >= 4)
    for (; p + 4 <= k; p += 4) {
      for (int64_t i = 0; i + 4 <= count; i += 4) transpose_4x4(in + i * stride + p, stride, out + p * width + i, width);
      if (count % 4) transpose_4x4(in + (count - 4) * stride + p, stride, out + p * width + count - 4, width);
    }
  for (; p < k; p++)
    for (int64_t i = 0; i < count; i++) out[p * width + i] = in[i * stride + p];
}

// 16-bit rows contiguous along k: converted a stretch at a time, then as above.
inline void pack_rows_16(const PackSource& s, int64_t width, int64_t count, int64_t k, float* out) {
  constexpr int64_t stretch = 64;
  float rows[32 * stretch];
  for (int64_t p = 0; p < k; p += stretch) {
    const int64_t n = k - p < stretch ? k - p : stretch;
    for (int64_t i = 0; i < count; i++) to_f32(s.dtype, (const uint16_t*)s.data + i * s.stride + p, n, rows + i * stretch);
    pack_rows_f32(rows, stretch, width, count, n, out + p * width);
  }
}

template <class T> void pack(PackSource s, int64_t width, int64_t count, int64_t k, const float* scale, T* out) {
  constexpr DType own = sizeof(T) == 4 ? DType::f32 : DType::f64;
  constexpr bool single = sizeof(T) == 4;
  const bool half = s.dtype == DType::f16 || s.dtype == DType::bf16;
  if (count < width) __builtin_memset(out, 0, size_t(width * k) * sizeof(T));
  if (s.stride == 1 && s.dtype == own) {
    for (int64_t p = 0; p < k; p++) {
      const T* in = (const T*)s.data + p * s.k_stride;
      T* o = out + p * width;
      if (count == width && width % L == 0)
        for (int64_t i = 0; i < width; i += L) __builtin_memcpy(o + i, in + i, sizeof(T) * L);
      else
        for (int64_t i = 0; i < count; i++) o[i] = in[i];
    }
  } else if (single && s.stride == 1 && half) {
    for (int64_t p = 0; p < k; p++) to_f32(s.dtype, (const uint16_t*)s.data + p * s.k_stride, count, (float*)out + p * width);
  } else if (single && s.k_stride == 1 && s.dtype == own) {
    pack_rows_f32((const float*)s.data, s.stride, width, count, k, (float*)out);
  } else if (single && s.k_stride == 1 && half && width <= 32) {
    pack_rows_16(s, width, count, k, (float*)out);
  } else {
    for (int64_t p = 0; p < k; p++)
      for (int64_t i = 0; i < count; i++) out[p * width + i] = load_scalar<T>(s.data, s.dtype, i * s.stride + p * s.k_stride);
  }
  if (scale)
    for (int64_t p = 0; p < k; p++)
      for (int64_t i = 0; i < count; i++) out[p * width + i] *= T(scale[p]);
}

// The lowest tile that holds `rows` rows: an element's sum is the same in each.
template <class T, int mr, int nv> constexpr int tile_height(int64_t rows) {
  for (int height = 1; height < 16; height *= 2)
    if (height < mr && rows <= height) return height;
  return mr;
}
// mr rows times nv vectors of C in registers.
template <class T, int mr, int nv> void tile_of(int64_t k, T alpha, const T* a, const T* b, int64_t ldb, const T* next,
                                                bool accumulate, T* c, int64_t ldc, int64_t rows, int64_t cols) {
  typedef typename VecOf<T>::type V;
  constexpr int lanes = sizeof(V) / sizeof(T), nr = nv * lanes;
  constexpr int ahead = mr < EAC_MR ? nr : int(tile_prefetch);  // few rows wait for B more than they compute
  for (int64_t i = 0; i < rows; i++) EAC_UNROLL
  for (int j = 0; j < nv; j++) __builtin_prefetch(c + i * ldc + j * lanes, 1);
  V acc[mr][nv];
  EAC_UNROLL
  for (int i = 0; i < mr; i++) EAC_UNROLL
  for (int j = 0; j < nv; j++) acc[i][j] = V{};
  for (int64_t p = 0; p < k; p++, a += mr, b += ldb) {
    for (int j = 0; j < ahead; j += 64 / int(sizeof(T))) __builtin_prefetch(next + p * ahead + j, 0, 2);
    V bv[nv];
    EAC_UNROLL
    for (int j = 0; j < nv; j++) bv[j] = load<V>(b + j * lanes);
#if defined(__aarch64__)  // a multiply-add takes one lane of A's vector: mr / lanes loads instead of mr
    constexpr bool by_lane = mr % lanes == 0;
#else
    constexpr bool by_lane = false;
#endif
    V av[by_lane ? mr / lanes : 1];
    if constexpr (by_lane) EAC_UNROLL
    for (int i = 0; i < mr / lanes; i++) av[i] = load<V>(a + i * lanes);
    EAC_UNROLL
    for (int i = 0; i < mr; i++) EAC_UNROLL
    for (int j = 0; j < nv; j++) acc[i][j] = (by_lane ? av[i / lanes][i % lanes] : a[i]) * bv[j] + acc[i][j];
  }
  // An edge tile goes through a copy, so that its last operation is the same as everywhere.
  T edge[mr * nr];
  const bool whole = rows == mr && cols == nr;
  T* out = whole ? c : edge;
  const int64_t ld = whole ? ldc : nr;
  if (!whole && accumulate)
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < cols; j++) edge[i * nr + j] = c[i * ldc + j];
  if (accumulate) {
    EAC_UNROLL
    for (int i = 0; i < mr; i++) EAC_UNROLL
    for (int j = 0; j < nv; j++) store(out + i * ld + j * lanes, alpha * acc[i][j] + load<V>(out + i * ld + j * lanes));
  } else {
    EAC_UNROLL
    for (int i = 0; i < mr; i++) EAC_UNROLL
    for (int j = 0; j < nv; j++) store(out + i * ld + j * lanes, alpha * acc[i][j]);
  }
  if (!whole)
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < cols; j++) c[i * ldc + j] = edge[i * nr + j];
}

template <class T, int mr, int nv> void tile(int64_t k, T alpha, const T* a, const T* b, int64_t ldb, const T* next,
                                             bool accumulate, T* c, int64_t ldc, int64_t rows, int64_t cols) {
  const auto run = [&](auto f) { f(k, alpha, a, b, ldb, next, accumulate, c, ldc, rows, cols); };
  switch (tile_height<T, mr, nv>(rows)) {
    case 1: return run(tile_of<T, 1, nv>);
    case 2: return run(tile_of<T, 2, nv>);
    case 4: return run(tile_of<T, 4, nv>);
    case 8: return run(tile_of < T, mr < 8 ? mr : 8, nv >);
    default: return run(tile_of<T, mr, nv>);
  }
}
