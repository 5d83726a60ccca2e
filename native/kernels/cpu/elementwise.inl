// Loops over one row. The last, shorter vector goes through the same operations as the others.

void exp_f32(const float* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + L <= n; i += L) store(out + i, exp_lanes(load<F>(in + i)));
  if (i < n) store_part(out + i, exp_lanes(load_part(in + i, n - i)), n - i);
}

// gate = lanes(gate, up)
template <F (*lanes)(F, F)> void gated(float* gate, const float* up, int64_t n) {
  int64_t i = 0;
  for (; i + L <= n; i += L) store(gate + i, lanes(load<F>(gate + i), load<F>(up + i)));
  if (i < n) store_part(gate + i, lanes(load_part(gate + i, n - i), load_part(up + i, n - i)), n - i);
}

EAC_INLINE F silu_mul(F g, F u) { return g / (1.0f + exp_lanes(-g)) * u; }

EAC_INLINE F clamped_swiglu(F g, F u) {
  const F high = splat(7.0f), low = splat(-7.0f);
  g = g > high ? high : g;  // keeps NaN
  u = u > high ? high : u < low ? low : u;
  return g / (1.0f + exp_lanes(-1.702f * g)) * (u + 1.0f);
}

EAC_INLINE F relu_mul(F g, F u) { return (g < 0.0f ? F{} : g) * u; }  // keeps NaN

// g Phi(g), Phi(g) = erfc(-g / sqrt 2) / 2. erfc(z), z >= 0, as the Chebyshev fit `erfcc` of Press et al., Numerical Recipes: its relative error
// is below 1.2e-7, so that the left tail has no cancellation.
EAC_INLINE F gelu_mul(F g, F u) {
  const F z = (g < 0.0f ? -g : g) * 0.70710678f, t = 1.0f / (1.0f + 0.5f * z);
  F p = t * 0.17087277f - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const F tail = 0.5f * t * exp_lanes(p - z * z);  // Phi(-|g|)
  return g * (g < 0.0f ? tail : 1.0f - tail) * u;
}

// (1 + tanh y) / 2 = 1 / (1 + exp(-2 y))
EAC_INLINE F gelu_tanh_mul(F g, F u) {
  const F y = 1.59576912f * (g + 0.044715f * (g * g * g));
  return g / (1.0f + exp_lanes(-y)) * u;
}

SoftmaxInfo softmax_row(float* x, int64_t n) {
  const float lowest = -__builtin_inff();
  F m = splat(lowest);
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    const F v = load<F>(x + i);
    m = v > m ? v : m;
  }
  float max = max_lanes(m);
  for (; i < n; i++) max = x[i] > max ? x[i] : max;
  const float shift = max == lowest ? 0.0f : max;  // -inf minus -inf would be NaN
  F s{};
  for (i = 0; i + L <= n; i += L) {
    const F e = exp_lanes(load<F>(x + i) - shift);
    store(x + i, e);
    s = s + e;
  }
  float sum = sum_lanes(s);
  if (i < n) {
    const F e = exp_lanes(load_part(x + i, n - i) - shift);
    store_part(x + i, e, n - i);
    for (int64_t j = 0; i + j < n; j++) sum += e[j];
  }
  if (sum != 0.0f) {
    const float inverse = 1.0f / sum;
    for (i = 0; i + L <= n; i += L) store(x + i, load<F>(x + i) * inverse);
    for (; i < n; i++) x[i] *= inverse;
  }
  return {max, sum};
}

float softmax_block(float* s, int64_t n, int64_t lo, int64_t hi, float* max, float* shrink) {
  const float lowest = -__builtin_inff();
  if (lo < 0) lo = 0;
  const int64_t begin = lo / L * L, end = hi > lo ? (hi + L - 1) / L * L : begin;
  for (int64_t i = 0; i < begin; i += L) store(s + i, F{});
  for (int64_t i = end; i < n; i += L) store(s + i, F{});
  F m = splat(*max);
  for (int64_t i = begin; i < end; i += L) {
    F v = load<F>(s + i);
    if (i < lo || i + L > hi) {  // from here on these lanes are -inf: exp makes zeros of them
      const I at = lane_numbers() + int32_t(i);
      v = ((at >= int32_t(lo)) & (at < int32_t(hi))) ? v : splat(lowest);
      store(s + i, v);
    }
    m = v > m ? v : m;
  }
  const float top = max_lanes(m), shift = top == lowest ? 0.0f : top;  // -inf minus -inf would be NaN
  F sum{};
  for (int64_t i = begin; i < end; i += L) {
    const F e = exp_lanes(load<F>(s + i) - shift);
    store(s + i, e);
    sum = sum + e;
  }
  *shrink = *max == top ? 1.0f : exp_lanes(splat(*max - shift))[0];
  *max = top;
  return sum_lanes(sum);
}

void blend_f32(float a, float* y, float b, const float* x, int64_t n) {
  int64_t i = 0;
  for (; i + L <= n; i += L) store(y + i, a * load<F>(y + i) + b * load<F>(x + i));
  if (i < n) store_part(y + i, a * load_part(y + i, n - i) + b * load_part(x + i, n - i), n - i);
}

float dot_f32(const float* a, const float* b, int64_t n) {
  F s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    s0 = load<F>(a + i) * load<F>(b + i) + s0;
    s1 = load<F>(a + i + L) * load<F>(b + i + L) + s1;
    s2 = load<F>(a + i + 2 * L) * load<F>(b + i + 2 * L) + s2;
    s3 = load<F>(a + i + 3 * L) * load<F>(b + i + 3 * L) + s3;
  }
  for (; i + L <= n; i += L) s0 = load<F>(a + i) * load<F>(b + i) + s0;
  if (i < n) s1 = load_part(a + i, n - i) * load_part(b + i, n - i) + s1;
  return sum_lanes((s0 + s1) + (s2 + s3));
}

void axpy_f32(float alpha, const float* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + L <= n; i += L) store(y + i, alpha * load<F>(x + i) + load<F>(y + i));
  if (i < n) store_part(y + i, alpha * load_part(x + i, n - i) + load_part(y + i, n - i), n - i);
}

void scale_f32(float alpha, float* x, int64_t n) {
  int64_t i = 0;
  for (; i + L <= n; i += L) store(x + i, alpha * load<F>(x + i));
  for (; i < n; i++) x[i] *= alpha;
}
