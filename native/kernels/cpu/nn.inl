// Rows of kernels/nn: norms, rotary embedding, logits. Sums in f64, in lanes that are added in a fixed order.

constexpr int LD = L / 2;  // f64 lanes of a vector
typedef float HalfF __attribute__((vector_size(2 * EAC_LANES)));
typedef int64_t ID __attribute__((vector_size(4 * EAC_LANES)));

EAC_INLINE D load_f64(const float* p) { return __builtin_convertvector(load<HalfF>(p), D); }
EAC_INLINE double sum_lanes_f64(D v) {
  double s = v[0];
  for (int l = 1; l < LD; l++) s += v[l];
  return s;
}

double sum_f64(const float* x, int64_t n) {
  D s[4] = {};
  int64_t i = 0;
  for (; i + 4 * LD <= n; i += 4 * LD) EAC_UNROLL
  for (int u = 0; u < 4; u++) s[u] += load_f64(x + i + u * LD);
  double sum = sum_lanes_f64((s[0] + s[1]) + (s[2] + s[3]));
  for (; i < n; i++) sum += double(x[i]);
  return sum;
}

double squares_f64(const float* x, int64_t n, float shift) {
  D s[4] = {};
  int64_t i = 0;
  for (; i + 4 * LD <= n; i += 4 * LD) EAC_UNROLL
  for (int u = 0; u < 4; u++) {
    const D v = load_f64(x + i + u * LD) - double(shift);
    s[u] += v * v;
  }
  double sum = sum_lanes_f64((s[0] + s[1]) + (s[2] + s[3]));
  for (; i < n; i++) sum += (double(x[i]) - double(shift)) * (double(x[i]) - double(shift));
  return sum;
}

void normalize(const float* x, int64_t n, float shift, float scale, const float* weight, const float* bias, float* y) {
  const F zero{};
  int64_t i = 0;
  for (; i + L <= n; i += L)
    store(y + i, (load<F>(x + i) - shift) * scale * load<F>(weight + i) + (bias ? load<F>(bias + i) : zero));
  if (i < n)
    store_part(
        y + i,
        (load_part(x + i, n - i) - shift) * scale * load_part(weight + i, n - i) + (bias ? load_part(bias + i, n - i) : zero),
        n - i);
}

struct Turn {
  F cos, sin;
};

// Reduction to |r| <= pi/4 in f64 by pi/2 in two parts (the first of 33 bits, so that its multiples are exact), and the polynomials of
// FreeBSD's k_sinf.c and k_cosf.c (msun).
EAC_INLINE Turn turn_lanes(F angle, float scale) {
  alignas(sizeof(F)) float a[L], c[L], s[L];
  store(a, angle);
  EAC_UNROLL
  for (int h = 0; h < 2; h++) {
    const D x = load_f64(a + h * LD), magic = 6755399441055744.0 - D{};  // 1.5 * 2^52: adding it rounds to an integer
    const D t = x * 0.63661977236758134308 + magic, n = t - magic;
    const ID quadrant = (ID)t;
    const D r = (x - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11, z = r * r;
    const D sine = r + r * z *
                           (((2.7183114939898219064e-6 * z - 1.98393348360966317347e-4) * z + 8.3333293858894631756e-3) * z -
                            1.66666666416265235595e-1);
    const D cosine = (((2.43904487962774090654e-5 * z - 1.38867637746099294692e-3) * z + 4.16666233237390631894e-2) * z -
                      4.99999997251031003120e-1) *
                         z +
                     1.0;
    const ID odd = -(quadrant & 1);
    const D sin_of = odd != 0 ? cosine : sine, cos_of = odd != 0 ? sine : cosine;
    const D up = (quadrant & 2) != 0 ? -sin_of : sin_of, across = ((quadrant + 1) & 2) != 0 ? -cos_of : cos_of;
    store(s + h * LD, __builtin_convertvector(up, HalfF));
    store(c + h * LD, __builtin_convertvector(across, HalfF));
  }
  return {load<F>(c) * scale, load<F>(s) * scale};
}

// Channels (i, i + n) of all heads, L or fewer pairs.
template <bool part> EAC_INLINE void rotate_halves(float* x, int64_t heads, int64_t stride, int64_t n, Turn t, int64_t count) {
  for (int64_t h = 0; h < heads; h++, x += stride) {
    const F a = part ? load_part(x, count) : load<F>(x), b = part ? load_part(x + n, count) : load<F>(x + n);
    const F low = a * t.cos - b * t.sin, high = a * t.sin + b * t.cos;
    if (part) {
      store_part(x, low, count);
      store_part(x + n, high, count);
    } else {
      store(x, low);
      store(x + n, high);
    }
  }
}

// Channels (2i, 2i + 1) of all heads, L or fewer pairs: two vectors, to which their own with neighbours swapped are added.
EAC_INLINE void rotate_pairs(float* x, int64_t heads, int64_t stride, Turn t, int64_t count) {
  alignas(sizeof(F)) float c[2 * L], s[2 * L];
  for (int l = 0; l < L; l++) c[2 * l] = c[2 * l + 1] = t.cos[l], s[2 * l + 1] = t.sin[l], s[2 * l] = -t.sin[l];
  for (int64_t h = 0; h < heads; h++, x += stride)
    for (int64_t i = 0; i < 2 * count; i += L) {
      const int64_t left = 2 * count - i;
      const F v = left < L ? load_part(x + i, left) : load<F>(x + i);
      typedef uint64_t UD __attribute__((vector_size(4 * EAC_LANES)));
      const F swapped = (F)((UD)v >> 32 | (UD)v << 32), turned = v * load<F>(c + i) + swapped * load<F>(s + i);
      if (left < L)
        store_part(x + i, turned, left);
      else
        store(x + i, turned);
    }
}

void rotate(float* x, int64_t heads, int64_t stride, const float* frequencies, int64_t n, float position, float scale,
            bool interleaved) {
  for (int64_t i = 0; i < n; i += L) {
    const int64_t count = n - i < L ? n - i : L;
    const Turn t = turn_lanes((count < L ? load_part(frequencies + i, count) : load<F>(frequencies + i)) * position, scale);
    if (interleaved)
      rotate_pairs(x + 2 * i, heads, stride, t, count);
    else if (count < L)
      rotate_halves<true>(x + i, heads, stride, n, t, count);
    else
      rotate_halves<false>(x + i, heads, stride, n, t, L);
  }
}

float max_f32(const float* x, int64_t n) {
  const float lowest = -__builtin_inff();
  F m[4] = {splat(lowest), splat(lowest), splat(lowest), splat(lowest)};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) EAC_UNROLL
  for (int u = 0; u < 4; u++) {
    const F v = load<F>(x + i + u * L);
    m[u] = v > m[u] ? v : m[u];
  }
  const F a = m[0] > m[1] ? m[0] : m[1], b = m[2] > m[3] ? m[2] : m[3];
  float max = max_lanes(a > b ? a : b);
  for (; i < n; i++) max = x[i] > max ? x[i] : max;
  return max;
}

EAC_INLINE D sum_halves(F v) {
  alignas(sizeof(F)) float e[L];
  store(e, v);
  return load_f64(e) + load_f64(e + LD);
}

double sum_exp(const float* x, int64_t n, float shift) {
  D s{};
  int64_t i = 0;
  for (; i + L <= n; i += L) s += sum_halves(exp_lanes(load<F>(x + i) - shift));
  double sum = sum_lanes_f64(s);
  if (i < n) {
    const F e = exp_lanes(load_part(x + i, n - i) - shift);
    for (int64_t j = 0; i + j < n; j++) sum += double(e[j]);
  }
  return sum;
}

struct Weighed {
  F weight;
  I bucket;
};

EAC_INLINE Weighed weigh_lanes(F logits, float max, float inverse) {
  const F infinite = splat(__builtin_inff()), d = max - logits, distance = d < infinite ? d : infinite;
  const I low = I{} + SamplingWeights::first, high = low + (SamplingWeights::buckets - 1), key = (I)distance >> 16;
  return {exp_lanes(-distance * inverse), (key < low ? low : key > high ? high : key) - low};
}

void sampling_weights(const SamplingWeights& s, int64_t n) {
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    const Weighed w = weigh_lanes(load<F>(s.logits + i), s.max, s.inverse);
    store(s.weight + i, w.weight);
    store(s.bucket + i, w.bucket);
  }
  if (i == n) return;
  const Weighed w = weigh_lanes(load_part(s.logits + i, n - i), s.max, s.inverse);
  for (int64_t j = 0; i + j < n; j++) s.weight[i + j] = w.weight[j], s.bucket[i + j] = w.bucket[j];
}
