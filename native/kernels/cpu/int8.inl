// Products of int8 activations with quantized weights (LAYOUT: kernels/quant/quant_matrix.h).
//
// DEFINITION  out[t, r] = sum over activation blocks b of  scale_x[t, b] * scale_w[r, g] * (sum of code * q - zero[r, g] * sum_x[t, b])
//             with g the group that holds the block. The inner sums are exact integers and the blocks are added in rising order, each as
//             fma(float(sum) * scale_x, scale_w, out): an output is the same bits for one token or many, and on every instruction set with
//             a fused multiply-add.
// METHOD      A step's codes are bytes as the instruction wants them; four activations are broadcast to all rows, so nothing is reduced
//             across lanes. Few tokens: codes go from memory to registers. Many: 256 channels of some panels are unpacked to bytes once
//             and stay in L1 while the tokens pass.
// LIMITS      |q| <= 127, codes <= 15: a block of 128 sums to less than 2^18. Where the instruction adds pairs in 16 bits, a step adds at
//             most 2 * 127 * code: `narrow_units` units of 8 steps stay below 2^15 (4 bit: 1, 30480; 3 bit: 2, 28448; 2 bit: 4, 24384).
// The primitives' file defines: Quads (activations loaded at once: four channels of one or more steps), Narrow (accumulator of the
// multiply-adds), narrow_units<bits>, multiply_add, widen, times_int16, store_int8, store_fours (lanes 4 i .. to p + i * stride).

constexpr int vectors = 16 / L;  // of a panel's step
constexpr int quads = sizeof(Quads) / 4;
constexpr int64_t chunk_units = 8;      // unpacked at a time: 256 channels
constexpr int64_t unpacked_unit = 512;  // bytes

template <int bits> EAC_INLINE U step_codes(const uint8_t* unit, int step, int vector) {
  const uint8_t* p = unit + vector * 4 * L;
  if constexpr (bits == 8) return load<U>(p + step * 64);
  if (bits == 3 && step >= 6)
    return (load<U>(p + (step - 6) * 64) >> 6 & 0x03030303u) | (load<U>(p + 128) >> (step - 2) & 0x04040404u);
  constexpr int steps = 8 / bits;  // of a byte
  constexpr uint32_t mask = 0x01010101u * ((1u << bits) - 1);
  const U c = load<U>(p + step / steps * 64);
  return (step % steps ? c >> (step % steps * bits) : c) & mask;
}

#ifdef EAC_INT8_IN_PLACE
// sum += codes of P panels times one token over a unit. The codes stay where they lie in their bytes, masked but not shifted: place[k] sums
// products that are 2^k too large. For multiply_adds of unsigned bytes in 32 bits.
constexpr int places = 7;
template <int bits, int P>
EAC_INLINE void add_in_place(const uint8_t* codes, int64_t stride, const int8_t* x, Narrow (&place)[P][places]) {
  static_assert(vectors == 1);
  EAC_UNROLL
  for (int s = 0; s < 8; s++) {
    const Quads four = load<Quads>(x + s * 4);
    const auto add = [&](int line, int bit, uint32_t mask, int scale) {
      EAC_UNROLL
      for (int p = 0; p < P; p++) {
        const U c = load<U>(codes + p * stride + line * 64) & (mask << bit) * 0x01010101u;
        place[p][scale] = multiply_add(place[p][scale], c, four, 0);
      }
    };
    constexpr int steps = 8 / bits;
    if (bits == 3 && s >= 6) {
      add(s - 6, 6, 3, 6);
      add(2, s, 1, s - 2);
    } else {
      add(s / steps, s % steps * bits, (1 << bits) - 1, s % steps * bits);
    }
  }
}
#endif

// Panels' units from some block on: `stride` bytes from panel to panel; `after`: the panels that come next. Packed codes are asked for some
// way ahead, scales and zero points (short streams that no hardware foresees) a group of panels ahead, or each new group would begin with stalls.
struct PanelCodes {
  const uint8_t* data;
  int64_t stride;
  PanelStart after;
};

#ifdef EAC_I8MM
#include "kernels/cpu/i8mm.inl"
#endif

// P panels times T tokens over the activation blocks [begin, end), the codes packed as `bits` says or (8) one a byte. `limit`: the bits that
// bound the codes.
template <int bits, int limit, int P, int T>
EAC_INLINE void int8_tile(const Int8Dot& d, int64_t panel, PanelCodes w, int64_t begin, int64_t end, int64_t token) {
  const uint8_t* codes = w.data;
  constexpr int64_t unit_bytes = bits == 8 ? unpacked_unit : bits * 64;
  const int64_t units_per_block = d.x.block / 32;
  const int8_t* x[T];
  const float* x_scale[T];
  const int32_t* x_sum[T];
  EAC_UNROLL
  for (int t = 0; t < T; t++) {
    const int64_t row = d.rows ? d.rows[token + t] : token + t;
    x[t] = d.x.q + row * d.x.stride + begin * d.x.block;
    x_scale[t] = d.x.scale + row * d.x.blocks;
    x_sum[t] = d.x.sum + row * d.x.blocks;
  }
  float* out = d.out + token * d.ldout + (panel - d.panel) * 16;
  const int64_t distance = EAC_INT8_PREFETCH / unit_bytes * unit_bytes;
  const uint8_t *panel_end = codes + d.w.panel_bytes, *ahead = distance < d.w.panel_bytes ? codes + distance : w.after.codes;
  for (int64_t b = begin; b < end; b++) {
    const int64_t left = d.units - b * units_per_block, units = left < units_per_block ? left : units_per_block;
    const int64_t params = (panel * d.w.groups + b * d.x.block / d.w.group_size) * 16, next_panel = d.w.groups * 16;
    if constexpr (bits != 8) {
      const int64_t group = b * d.x.block / d.w.group_size * 16;
      EAC_UNROLL
      for (int p = 0; p < P; p++) {
        __builtin_prefetch(w.after.scales + group + p * next_panel);
        __builtin_prefetch(w.after.zeros + group + p * next_panel);
      }
    }
    I sum[P][vectors][T];
    EAC_UNROLL
    for (int p = 0; p < P; p++) EAC_UNROLL
    for (int v = 0; v < vectors; v++) {
      const I zero = byte_lanes(d.w.zeros + params + p * next_panel + v * L);
      EAC_UNROLL
      for (int t = 0; t < T; t++) sum[p][v][t] = -times_int16(zero, x_sum[t][b]);
    }
    int64_t done = 0;
#ifdef EAC_I8MM
    if constexpr (bits == 8) add_pairs(codes, units, x, sum), done = units;
#endif
    const auto ask_ahead = [&] {
      if constexpr (bits == 8) return;
      EAC_UNROLL
      for (int p = 0; p < P; p++) EAC_UNROLL
      for (int line = 0; line < bits; line++) __builtin_prefetch(ahead + p * w.stride + line * 64);
      ahead += unit_bytes;
      if (ahead == panel_end) ahead = w.after.codes;
    };
#ifdef EAC_INT8_IN_PLACE
    if constexpr (bits != 8 && T == 1) {
      Narrow place[P][places] = {};
      for (; done < units; done++, codes += unit_bytes, x[0] += 32) {
        ask_ahead();
        add_in_place<bits>(codes, w.stride, x[0], place);
      }
      EAC_UNROLL
      for (int p = 0; p < P; p++) EAC_UNROLL
      for (int k = 0; k < places; k++) sum[p][0][0] += widen(I{}, place[p][k]) >> k;
    }
#endif
    while (done < units) {
      Narrow narrow[P][vectors][T];
      EAC_UNROLL
      for (int p = 0; p < P; p++) EAC_UNROLL
      for (int v = 0; v < vectors; v++) EAC_UNROLL
      for (int t = 0; t < T; t++) narrow[p][v][t] = Narrow{};
      for (int64_t n = 0; n < narrow_units<limit> && done < units; n++, done++, codes += unit_bytes) {
        ask_ahead();
        Quads four[T];
        EAC_UNROLL
        for (int s = 0; s < 8; s++) {
          // The codes of a step stay in registers while the tokens pass.
          U c[P][vectors];
          EAC_UNROLL
          for (int p = 0; p < P; p++) EAC_UNROLL
          for (int v = 0; v < vectors; v++) c[p][v] = step_codes<bits>(codes + p * w.stride, s, v);
          EAC_UNROLL
          for (int t = 0; t < T; t++) {
            if (s % quads == 0) four[t] = load<Quads>(x[t] + s * 4);
            EAC_UNROLL
            for (int p = 0; p < P; p++) EAC_UNROLL
            for (int v = 0; v < vectors; v++) narrow[p][v][t] = multiply_add(narrow[p][v][t], c[p][v], four[t], s % quads);
          }
        }
        EAC_UNROLL
        for (int t = 0; t < T; t++) x[t] += 32;
      }
      EAC_UNROLL
      for (int p = 0; p < P; p++) EAC_UNROLL
      for (int v = 0; v < vectors; v++) EAC_UNROLL
      for (int t = 0; t < T; t++) sum[p][v][t] = widen(sum[p][v][t], narrow[p][v][t]);
    }
    EAC_UNROLL
    for (int p = 0; p < P; p++) EAC_UNROLL
    for (int v = 0; v < vectors; v++) {
      const F scale = f16_lanes(d.w.scales + params + p * next_panel + v * L);
      EAC_UNROLL
      for (int t = 0; t < T; t++) {
        float* o = out + t * d.ldout + p * 16 + v * L;
        const F before = b == 0 ? F{} : load<F>(o);
        store(o, fused(__builtin_convertvector(sum[p][v][t], F) * x_scale[t][b], scale, before));
      }
    }
  }
}

// One copy per tile size, each with its own register allocation.
template <int bits, int limit, int P, int T> __attribute__((noinline)) void int8_tile_of(const Int8Dot& d, int64_t panel,
                                                                                         PanelCodes w, int64_t begin, int64_t end,
                                                                                         int64_t token) {
  int8_tile<bits, limit, P, T>(d, panel, w, begin, end, token);
}

// Packed codes of P panels that are unpacked next: `lines` cache lines of each.
struct NextChunk {
  const uint8_t* codes = nullptr;
  int64_t stride = 0, lines = 0;
};

// Tokens [0, n) in tiles of nearly equal size; each tile asks for its part of `next`.
template <int bits, int limit, int P>
EAC_INLINE void int8_tokens(const Int8Dot& d, int64_t panel, PanelCodes w, int64_t begin, int64_t end, NextChunk next = {}) {
  const int64_t tiles = (d.n + EAC_INT8_TOKENS - 1) / EAC_INT8_TOKENS;
  for (int64_t i = 0, t = 0; i < tiles; i++) {
    for (int64_t line = i * next.lines / tiles; line < (i + 1) * next.lines / tiles; line++) EAC_UNROLL
    for (int p = 0; p < P; p++) __builtin_prefetch(next.codes + p * next.stride + line * 64, 0, 2);
    const int64_t n = (d.n - t + tiles - i - 1) / (tiles - i);
    switch (n) {
      case 1: int8_tile_of<bits, limit, P, 1>(d, panel, w, begin, end, t); break;
      case 2: int8_tile_of<bits, limit, P, 2>(d, panel, w, begin, end, t); break;
#if EAC_INT8_TOKENS > 2
      case 3: int8_tile_of<bits, limit, P, 3>(d, panel, w, begin, end, t); break;
      case 4: int8_tile_of<bits, limit, P, 4>(d, panel, w, begin, end, t); break;
#endif
#if EAC_INT8_TOKENS > 4
      case 5: int8_tile_of<bits, limit, P, 5>(d, panel, w, begin, end, t); break;
#endif
#if EAC_INT8_TOKENS > 5
      case 6: int8_tile_of<bits, limit, P, 6>(d, panel, w, begin, end, t); break;
#endif
    }
    t += n;
  }
}

template <int bits> EAC_INLINE void unpack_units(const uint8_t* codes, int64_t units, uint8_t* out) {
  for (int64_t u = 0; u < units; u++, codes += bits * 64, out += unpacked_unit) EAC_UNROLL
  for (int s = 0; s < 8; s++) EAC_UNROLL
  for (int v = 0; v < vectors; v++) store(out + s * 64 + v * 4 * L, step_codes<bits>(codes, s, v));
}

template <int bits, int P> void int8_many_tokens(const Int8Dot& d, int64_t panel, PanelCodes w) {
  alignas(64) uint8_t unpacked[P * chunk_units * unpacked_unit];
  constexpr int64_t unit_bytes = bits * 64;
  const int64_t blocks_per_chunk = chunk_units * 32 / d.x.block;
  for (int64_t unit = 0, b = 0; unit < d.units; unit += chunk_units, b += blocks_per_chunk) {
    const int64_t units = d.units - unit < chunk_units ? d.units - unit : chunk_units;
    for (int p = 0; p < P; p++)
#ifdef EAC_I8MM
      unpack_pairs<bits>(w.data + p * w.stride + unit * unit_bytes, units, unpacked + p * chunk_units * unpacked_unit);
#else
      unpack_units<bits>(w.data + p * w.stride + unit * unit_bytes, units, unpacked + p * chunk_units * unpacked_unit);
#endif
    const int64_t end = b + blocks_per_chunk < d.x.blocks ? b + blocks_per_chunk : d.x.blocks;
    const int64_t after = unit + chunk_units;
    const NextChunk next{after < d.units ? w.data + after * unit_bytes : w.after.codes, w.stride, chunk_units * bits};
    int8_tokens<8, bits, P>(d, panel, {unpacked, chunk_units * unpacked_unit, {}}, b, end, next);
  }
}

EAC_INLINE PanelStart panel_start(const QuantPanels& w, int64_t panel) {
  const int64_t params = panel * w.groups * 16;
  return {w.codes + panel * w.panel_bytes, w.scales + params, w.zeros + params};
}

template <int bits> void dot_int8_bits(const Int8Dot& d) {
  constexpr int few = EAC_INT8_PANELS_ONE, many = EAC_INT8_PANELS;
  const int wanted = d.n == 1 ? few : many;
  const bool narrow = d.panels < wanted;
  const int64_t width = narrow ? 1 : wanted;
  for (int64_t i = 0; i < d.panels; i += width) {
    // A last group that is not full reaches back over panels that are done: it writes the same values again.
    if (i + width > d.panels) i = d.panels - width;
    const int64_t panel = d.panel + i;
    const bool last = i + width == d.panels;
    const PanelCodes w{panel_start(d.w, panel).codes, d.w.panel_bytes,
                       !last          ? panel_start(d.w, panel + width)
                       : d.next.codes ? d.next
                                      : panel_start(d.w, panel)};
    if (narrow)
      for (int64_t t = 0; t < d.n; t++) int8_tile_of<bits, bits, 1, 1>(d, panel, w, 0, d.x.blocks, t);
    else if (d.n == 1)
      int8_tile_of<bits, bits, few, 1>(d, panel, w, 0, d.x.blocks, 0);
    else if (d.n <= EAC_INT8_TOKENS)
      int8_tokens<bits, bits, many>(d, panel, w, 0, d.x.blocks);
    else
      int8_many_tokens<bits, many>(d, panel, w);
  }
}

void dot_int8(const Int8Dot& d) {
  if (d.w.bits == 4)
    dot_int8_bits<4>(d);
  else if (d.w.bits == 3)
    dot_int8_bits<3>(d);
  else if (d.w.bits == 2)
    dot_int8_bits<2>(d);
}

// q = round(x * 127 / max|x|), half to even, per block. 0 * x is NaN for NaN and infinity: their block becomes 0 times NaN, and every
// output that used it NaN. Values below 1e-30 count as 0.
void quantize_int8(const float* x, int64_t n, int64_t block, int8_t* q, float* scale, int32_t* sum) {
  for (int64_t c = 0, b = 0; c < n; c += block, b++) {
    const int64_t count = n - c < block ? n - c : block;
    F max{}, bad{};
    for (int64_t i = 0; i < count; i += L) {
      const F v = count - i < L ? load_part(x + c + i, count - i) : load<F>(x + c + i), magnitude = v < 0.0f ? -v : v;
      max = magnitude > max ? magnitude : max;
      bad = bad + v * 0.0f;
    }
    const float largest = max_lanes(max), poison = sum_lanes(bad);
    const bool empty = !(largest > 1e-30f) || poison != 0.0f;
    const float inverse = empty ? 0.0f : 127.0f / largest;
    const F magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    I total{};
    for (int64_t i = 0; i < (count + 31) / 32 * 32; i += L) {
      const F v = empty || i >= count ? F{} : count - i < L ? load_part(x + c + i, count - i) : load<F>(x + c + i);
      const I rounded = (I)fused(v, splat(inverse), magic) - (I)magic;
      total = total + rounded;
      store_int8(q + c + i, rounded);
    }
    int32_t s = 0;
    for (int l = 0; l < L; l++) s += total[l];
    sum[b] = s;
    scale[b] = empty ? poison : largest / 127.0f;
  }
}

// 16 rows x [k0, k0 + n) of panel `panel` as f32, k0 a multiple of 32; out rows are ldout apart and written up to the next multiple of
// 32. The product of an 11-bit scale and a 5-bit difference is exact in f32, so every instruction set gives the same bits.
template <int bits> void dequantize_bits(const QuantPanels& w, int64_t panel, int64_t k0, int64_t n, float* out, int64_t ldout) {
  const uint8_t* unit = w.codes + panel * w.panel_bytes + k0 / 32 * (bits * 64);
  alignas(64) uint8_t codes[unpacked_unit];
  alignas(64) float scale[64], offset[64];  // four times each, as the codes of a step lie
  int64_t group = -1;
  for (int64_t c = 0; c < n; c += 32, unit += bits * 64) {
    if ((k0 + c) / w.group_size != group) {
      group = (k0 + c) / w.group_size;
      const int64_t params = (panel * w.groups + group) * 16;
      for (int i = 0; i < 64; i++) {
        scale[i] = f16_scalar(w.scales[params + i / 4]);
        offset[i] = -scale[i] * float(w.zeros[params + i / 4]);
      }
    }
    unpack_units<bits>(unit, 1, codes);
    for (int i = 0; i < 64; i += L) {  // the codes of L / 4 rows
      const F s = load<F>(scale + i), o = load<F>(offset + i);
      float* rows = out + i / 4 * ldout + c;
      EAC_UNROLL
      for (int step = 0; step < 8; step++)
        store_fours(rows + step * 4, ldout, __builtin_convertvector(byte_lanes(codes + step * 64 + i), F) * s + o);
    }
  }
}

void dequantize(const QuantPanels& w, int64_t panel, int64_t k0, int64_t n, float* out, int64_t ldout) {
  if (w.bits == 4)
    dequantize_bits<4>(w, panel, k0, n, out, ldout);
  else if (w.bits == 3)
    dequantize_bits<3>(w, panel, k0, n, out, ldout);
  else if (w.bits == 2)
    dequantize_bits<2>(w, panel, k0, n, out, ldout);
}
