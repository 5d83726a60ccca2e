// Dot products of weight rows with tokens. Weights and tokens are both contiguous along the channels, so nothing is transposed:
// a tile keeps rows x tokens vectors of lane sums in registers and reduces them once, after the last channel.

template <int R, int T> EAC_INLINE void dot_tile(const DotPanel& p, int64_t row, int64_t token, float* acc) {
  const float* w = p.w + row * p.ldw;
  const float* x = p.x + token * p.ldx;
  F s[R][T];
  EAC_UNROLL
  for (int r = 0; r < R; r++) EAC_UNROLL
  for (int t = 0; t < T; t++) s[r][t] = p.first ? F{} : load<F>(acc + (r * T + t) * L);
  const int64_t ldw = p.ldw, ldx = p.ldx, k = p.k;
  for (int64_t i = 0; i < k; i += L) {
    F xv[T];
    EAC_UNROLL
    for (int t = 0; t < T; t++) xv[t] = load<F>(x + t * ldx + i);
    EAC_UNROLL
    for (int r = 0; r < R; r++) {
      const F wv = load<F>(w + r * ldw + i);
      EAC_UNROLL
      for (int t = 0; t < T; t++) s[r][t] = wv * xv[t] + s[r][t];
    }
  }
  if (!p.last) {
    EAC_UNROLL
    for (int r = 0; r < R; r++) EAC_UNROLL
    for (int t = 0; t < T; t++) store(acc + (r * T + t) * L, s[r][t]);
    return;
  }
  EAC_UNROLL
  for (int t = 0; t < T; t++) {
    float* y = p.y + (token + t) * p.ldy + row;
    if constexpr (R == 4) {
      F4 v = sum_lanes_4(s[0][t], s[1][t], s[2][t], s[3][t]);
      if (p.bias) v = v + load<F4>(p.bias + row);
      if (p.beta) v = v + load<F4>(y);
      store(y, v);
    } else {
      EAC_UNROLL
      for (int r = 0; r < R; r++) {
        float v = sum_lanes(s[r][t]);
        if (p.bias) v += p.bias[row + r];
        if (p.beta) v += y[r];
        y[r] = v;
      }
    }
  }
}

// All rows against T tokens. noinline: one copy per T, each with its own register allocation.
template <int T> __attribute__((noinline)) void dot_rows(const DotPanel& p, int64_t token, float* acc) {
  int64_t r = 0;
  for (; r + 4 <= p.rows; r += 4, acc += 4 * T * L) dot_tile<4, T>(p, r, token, acc);
  for (; r < p.rows; r++, acc += T * L) dot_tile<1, T>(p, r, token, acc);
}

// Tokens in tiles of nearly equal size: 8 are better done as 4 + 4 than as 6 + 2.
void dot_panel(const DotPanel& p) {
  float* acc = p.acc;
  const int64_t tiles = (p.tokens + EAC_TOKEN_TILE - 1) / EAC_TOKEN_TILE;
  for (int64_t i = 0, t = 0; i < tiles; i++) {
    const int64_t n = (p.tokens - t + tiles - i - 1) / (tiles - i);
    switch (n) {
      case 1: dot_rows<1>(p, t, acc); break;
      case 2: dot_rows<2>(p, t, acc); break;
#if EAC_TOKEN_TILE > 2
      case 3: dot_rows<3>(p, t, acc); break;
#endif
#if EAC_TOKEN_TILE > 3
      case 4: dot_rows<4>(p, t, acc); break;
#endif
#if EAC_TOKEN_TILE > 4
      case 5: dot_rows<5>(p, t, acc); break;
#endif
#if EAC_TOKEN_TILE > 5
      case 6: dot_rows<6>(p, t, acc); break;
#endif
    }
    t += n;
    acc += p.rows * n * L;
  }
}

template <DType dtype> EAC_INLINE F weight_lanes(const void* w, int64_t i) {
  if constexpr (dtype == DType::f32)
    return load<F>((const float*)w + i);
  else if constexpr (dtype == DType::bf16)
    return bf16_lanes((const uint16_t*)w + i);
  else
    return f16_lanes((const uint16_t*)w + i);
}

template <DType dtype, int R>
EAC_INLINE void gemv_rows(const void* w, int64_t row, int64_t ldw, int64_t k, const float* x, float* y) {
  F s[R]{};
  for (int64_t i = 0; i < k; i += L) {
    const F xv = load<F>(x + i);
    EAC_UNROLL
    for (int r = 0; r < R; r++) s[r] = weight_lanes<dtype>(w, (row + r) * ldw + i) * xv + s[r];
  }
  EAC_UNROLL
  for (int r = 0; r < R; r++) y[row + r] = sum_lanes(s[r]);
}

template <DType dtype> void gemv_dtype(const void* w, int64_t ldw, int64_t rows, int64_t k, const float* x, float* y) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) gemv_rows<dtype, 4>(w, r, ldw, k, x, y);
  for (; r < rows; r++) gemv_rows<dtype, 1>(w, r, ldw, k, x, y);
}

void gemv(DType dtype, const void* w, int64_t ldw, int64_t rows, int64_t k, const float* x, float* y) {
  if (dtype == DType::f32)
    gemv_dtype<DType::f32>(w, ldw, rows, k, x, y);
  else if (dtype == DType::bf16)
    gemv_dtype<DType::bf16>(w, ldw, rows, k, x, y);
  else if (dtype == DType::f16)
    gemv_dtype<DType::f16>(w, ldw, rows, k, x, y);
}
