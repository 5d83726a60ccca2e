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

// Four rows of four floats, `stride` apart, transposed into four rows that lie anywhere.
EAC_INLINE void transpose_4x4(const float* in, int64_t stride, float* out0, float* out1, float* out2, float* out3) {
#if defined(__SSE2__)
  __m128 a = _mm_loadu_ps(in), b = _mm_loadu_ps(in + stride), c = _mm_loadu_ps(in + 2 * stride),
         d = _mm_loadu_ps(in + 3 * stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(out0, a);
  _mm_storeu_ps(out1, b);
  _mm_storeu_ps(out2, c);
  _mm_storeu_ps(out3, d);
#elif defined(__aarch64__)
  const F a = load<F>(in), b = load<F>(in + stride), c = load<F>(in + 2 * stride), d = load<F>(in + 3 * stride);
  const float64x2_t ab_02 = (float64x2_t)vtrn1q_f32(a, b), ab_13 = (float64x2_t)vtrn2q_f32(a, b);
  const float64x2_t cd_02 = (float64x2_t)vtrn1q_f32(c, d), cd_13 = (float64x2_t)vtrn2q_f32(c, d);
  store(out0, (F)vtrn1q_f64(ab_02, cd_02));
  store(out1, (F)vtrn1q_f64(ab_13, cd_13));
  store(out2, (F)vtrn2q_f64(ab_02, cd_02));
  store(out3, (F)vtrn2q_f64(ab_13, cd_13));
#else
  for (int i = 0; i < 4; i++) {
    out0[i] = in[i * stride];
    out1[i] = in[i * stride + 1];
    out2[i] = in[i * stride + 2];
    out3[i] = in[i * stride + 3];
  }
#endif
}

// Rows contiguous along k become panel columns, what belongs to k at place(k) of the panel: a cache line of four rows at a time; the
// last four rows may overlap the ones before.
template <class Place>
EAC_INLINE void pack_rows(const float* in, int64_t stride, int64_t count, int64_t k, float* out, Place place) {
  constexpr int64_t line = 16;
  int64_t p = 0;
  if (count >= 4)
    for (; p + line <= k; p += line)
      for (int64_t i = 0; i < count; i += 4) {
        const int64_t row = i + 4 <= count ? i : count - 4;
        EAC_UNROLL
        for (int64_t q = p; q < p + line; q += 4) {
          const auto to = [&](int64_t at) { return out + place(at) + row; };
          transpose_4x4(in + row * stride + q, stride, to(q), to(q + 1), to(q + 2), to(q + 3));
        }
      }
  for (; p < k; p++)
    for (int64_t i = 0; i < count; i++) out[place(p) + i] = in[i * stride + p];
}
EAC_INLINE void pack_rows_f32(const float* in, int64_t stride, int64_t width, int64_t count, int64_t k, float* out) {
  pack_rows(in, stride, count, k, out, [=](int64_t p) { return p * width; });
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
      if (count == width && width % L == 0) {
        for (int64_t i = 0; i < width; i += L) __builtin_memcpy(o + i, in + i, sizeof(T) * L);
      } else if (count >= 4) {  // the last four may overlap the ones before
        for (int64_t i = 0; i < count - 4; i += 4) __builtin_memcpy(o + i, in + i, sizeof(T) * 4);
        __builtin_memcpy(o + count - 4, in + count - 4, sizeof(T) * 4);
      } else {
        for (int64_t i = 0; i < count; i++) o[i] = in[i];
      }
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
// acc += A panel [k][mr] · B [k][nv vectors], row stride ldb. `next` is asked for meanwhile, `ahead` elements for each k.
template <class T, int mr, int nv, int ahead, class V>
EAC_INLINE void add_products(V (&acc)[mr][nv], int64_t k, const T* a, const T* b, int64_t ldb, const T* next) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  for (int64_t p = 0; p < k; p++, a += mr, b += ldb) {
    for (int j = 0; j < ahead; j += 64 / int(sizeof(T))) __builtin_prefetch(next + p * ahead + j, 0, 2);
    if (mr == EAC_MR) __builtin_prefetch(a + 24 * mr);  // too slow a stream for the processor to run ahead of
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
}

// mr rows times nv vectors of C in registers.
template <class T, int mr, int nv> void tile_of(int64_t k, T alpha, const T* a, const T* b, int64_t ldb, const T* next,
                                                bool accumulate, T* c, int64_t ldc, int64_t rows, int64_t cols) {
  typedef typename VecOf<T>::type V;
  constexpr int lanes = sizeof(V) / sizeof(T), nr = nv * lanes;
  constexpr int ahead = mr < EAC_MR ? nr : int(tile_prefetch);  // few rows wait for B more than they compute
  for (int64_t i = 0; i < rows; i++) EAC_UNROLL
  for (int j = 0; j < nv; j++) __builtin_prefetch(c + i * ldc + j * lanes, 1);
  V acc[mr][nv]{};
  add_products<T, mr, nv, ahead>(acc, k, a, b, ldb, next);
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

// Sums in the order of dot_panel (lane l takes the channels l, l + L, ...; then the lanes are halved) from packed panels.
// A panel holds the channels of one lane after the other's, the lanes in the order in which the halving meets them, that is by
// their numbers with the bits reversed. So lane sums come one at a time, and a binary counter's worth of partial sums waits.
// A cache line between lanes keeps those of a power of two apart in the cache.
constexpr int64_t lane_place(int64_t lane) {
  int64_t place = 0;
  for (int b = 1; b < L; b *= 2) place = 2 * place + (lane & b ? 1 : 0);
  return place;
}
constexpr int64_t lane_size(int64_t k, int64_t width) { return k / L * width + 16; }
void pack_lanes(const float* in, int64_t stride, int64_t width, int64_t count, int64_t k, float* out) {
  const int64_t lane = lane_size(k, width);
  if (count < width) __builtin_memset(out, 0, size_t(L * lane) * sizeof(float));
  pack_rows(in, stride, count, k, out, [=](int64_t p) { return lane_place(p % L) * lane + p / L * width; });
}

// Some panels of tokens, `tokens` in the last, with one of rows: a lane's part of that one stays in L1 while the tokens pass.
template <int mr, int nv> void lane_tiles(const LaneTile& t, int64_t panels) {
  constexpr int nr = nv * L, levels = L == 16 ? 4 : L == 8 ? 3 : 2;
  const int64_t lane_a = lane_size(t.k, mr), lane_b = lane_size(t.k, nr), panel = lane_panel_size(t.k, mr);
  F waiting[lane_panels][levels][mr][nv];
  for (int n = 0; n < L; n++)
    for (int64_t p = 0; p < panels; p++) {
      F acc[mr][nv];
      EAC_UNROLL
      for (int i = 0; i < mr; i++) EAC_UNROLL
      for (int j = 0; j < nv; j++) acc[i][j] = F{};
      add_products<float, mr, nv, 0>(acc, t.k / L, t.a + p * panel + n * lane_a, t.b + n * lane_b, nr, nullptr);
      int level = 0;
      for (; n >> level & 1; level++) EAC_UNROLL
      for (int i = 0; i < mr; i++) EAC_UNROLL
      for (int j = 0; j < nv; j++) acc[i][j] = waiting[p][level][i][j] + acc[i][j];
      if (level < levels) {
        EAC_UNROLL
        for (int i = 0; i < mr; i++) EAC_UNROLL
        for (int j = 0; j < nv; j++) waiting[p][level][i][j] = acc[i][j];
        continue;
      }
      const int64_t tokens = t.tokens - p * mr < mr ? t.tokens - p * mr : mr;
      for (int i = 0; i < mr; i++)
        for (int j = 0; j < nv; j++) {
          const int64_t count = i < tokens ? t.rows - j * L : 0;
          float* y = t.y + (p * mr + i) * t.ldy + j * L;
          F v = acc[i][j];
          if (t.bias) v = v + (count >= L ? load<F>(t.bias + j * L) : load_part(t.bias + j * L, count));
          if (t.beta) v = v + (count >= L ? load<F>(y) : load_part(y, count));
          if (count >= L)
            store(y, v);
          else
            store_part(y, v, count);
        }
    }
}

void lane_tile(const LaneTile& all) {
  constexpr int mr = EAC_MR, nv = EAC_NV;
  LaneTile t = all;
  const int64_t whole = t.tokens / mr;
  if (whole > 0) lane_tiles<mr, nv>(t, whole);
  t.tokens -= whole * mr, t.a += whole * lane_panel_size(t.k, mr), t.y += whole * mr * t.ldy;
  if (t.tokens == 0) return;
  switch (tile_height<float, mr, nv>(t.tokens)) {
    case 1: return lane_tiles<1, nv>(t, 1);
    case 2: return lane_tiles<2, nv>(t, 1);
    case 4: return lane_tiles<4, nv>(t, 1);
    case 8: return lane_tiles < mr < 8 ? mr : 8, nv > (t, 1);
    default: return lane_tiles<mr, nv>(t, 1);
  }
}
