// Dot products of weight rows with tokens. Weights and tokens are both contiguous along the channels, so nothing is transposed:
// a tile keeps rows x tokens vectors of lane sums in registers and reduces them once, after the last channel.

template <int bits> EAC_INLINE Lut<bits> group_lut(const QuantRows& w, int64_t row, int64_t group) {
  const int64_t i = row * w.groups + group;
  Lut<bits> lut;
  lut.set(f16_scalar(w.scales[i]), w.zeros[i]);
  return lut;
}

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

template <int bits, int R> EAC_INLINE void gemv_quant_rows(const QuantRows& w, int64_t row, int64_t k, const float* x, float* y) {
  constexpr int64_t block_bytes = bits * 4;
  F s[R]{};
  const uint8_t* codes = w.codes + row * w.row_bytes;
  const int64_t blocks = (k + 31) / 32;
  // Rows are short streams, over before the processor's own prefetching has caught on: ask for the next rows' codes ourselves.
  const int64_t ahead = w.row_bytes <= 4096 ? R * w.row_bytes : 1024;
  const int64_t per_group = w.group_size >= k ? blocks : w.group_size / 32;
  for (int64_t b = 0, g = 0; b < blocks; g++) {
    Lut<bits> lut[R];
    EAC_UNROLL
    for (int r = 0; r < R; r++) lut[r] = group_lut<bits>(w, row + r, g);
    const int64_t stop = b + per_group < blocks ? b + per_group : blocks;
    for (int64_t o = b * block_bytes; o < stop * block_bytes; o += 64) EAC_UNROLL
    for (int r = 0; r < R; r++) __builtin_prefetch(codes + r * w.row_bytes + o + ahead);
    for (; b < stop; b++) {
      EAC_UNROLL
      for (int r = 0; r < R; r++) {
        F v[32 / L];
        decode(codes + r * w.row_bytes + b * block_bytes, lut[r], v);
        EAC_UNROLL
        for (int i = 0; i < 32 / L; i++) s[r] = v[i] * load<F>(x + b * 32 + i * L) + s[r];
      }
    }
  }
  EAC_UNROLL
  for (int r = 0; r < R; r++) y[r] = sum_lanes(s[r]);
}

template <int bits> void gemv_quant_bits(const QuantRows& w, int64_t begin, int64_t end, int64_t k, const float* x, float* y) {
  int64_t r = begin;
  for (; r + 4 <= end; r += 4) gemv_quant_rows<bits, 4>(w, r, k, x, y + (r - begin));
  for (; r < end; r++) gemv_quant_rows<bits, 1>(w, r, k, x, y + (r - begin));
}

void gemv_quant(const QuantRows& w, int64_t begin, int64_t end, int64_t k, const float* x, float* y) {
  if (w.bits == 4)
    gemv_quant_bits<4>(w, begin, end, k, x, y);
  else if (w.bits == 3)
    gemv_quant_bits<3>(w, begin, end, k, x, y);
  else if (w.bits == 2)
    gemv_quant_bits<2>(w, begin, end, k, x, y);
}

template <int bits> void dequantize_bits(const QuantRows& w, int64_t row, int64_t k0, int64_t n, float* out) {
  const uint8_t* codes = w.codes + row * w.row_bytes + k0 / 32 * (bits * 4);
  for (int64_t done = 0; done < n;) {
    const int64_t c = k0 + done, g = c / w.group_size;
    const int64_t left = (g + 1) * w.group_size - c;
    const int64_t stop = left < n - done ? done + left : n;
    const Lut<bits> lut = group_lut<bits>(w, row, g);
    for (; done < stop; done += 32, codes += bits * 4) {
      F v[32 / L];
      decode(codes, lut, v);
      EAC_UNROLL
      for (int i = 0; i < 32 / L; i++) store(out + done + i * L, v[i]);
    }
  }
}

void dequantize(const QuantRows& w, int64_t row, int64_t k0, int64_t n, float* out) {
  if (w.bits == 4)
    dequantize_bits<4>(w, row, k0, n, out);
  else if (w.bits == 3)
    dequantize_bits<3>(w, row, k0, n, out);
  else if (w.bits == 2)
    dequantize_bits<2>(w, row, k0, n, out);
}
