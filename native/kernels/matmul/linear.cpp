// Products of tokens with a weight matrix. Few outputs are needed of many weights (decoding), or many tokens share them (prefill):
// both are sums along contiguous channels, so weights are expanded to f32 a panel at a time, and not transposed unless many tokens
// make up for it. The order of the sums is the same either way.
#include <algorithm>

#include "core/thread_pool.h"
#include "kernels/cpu/isa.h"
#include "kernels/matmul/gemm.h"
#include "kernels/matmul/int8.h"
#include "kernels/matmul/scratch.h"

namespace eac {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int64_t panel_rows = 32;   // rows expanded at a time, to stay in L2 while the tokens pass
constexpr int64_t token_block = 96;  // tokens per expansion: their f32 rows stay in L2, too

constexpr int64_t packed_from = 96;                        // from so many tokens on, packing pays
constexpr int64_t packed_tokens_bytes = int64_t(1) << 24;  // packed at a time
constexpr int64_t packed_rows_bytes = int64_t(1) << 19;    // of W, packed by a task: they stay in its L2

struct Weights {
  const Tensor* dense;
  QuantPanels quant;
  int64_t in;

  explicit Weights(const Matrix& w) : dense(std::get_if<Tensor>(&w)), quant{}, in(in_features(w)) {
    if (!dense) quant = panels_of(std::get<QuantMatrix>(w));
  }
  const void* at(int64_t row, int64_t k) const { return dense->as<char>() + (row * in + k) * int64_t(dtype_size(dense->dtype)); }
  // f32 rows whose length suits the vectors are used where they lie.
  bool in_place() const { return dense && dense->dtype == DType::f32 && in % 32 == 0; }

  // Channels [k0, k0 + k) of some rows as f32 (rows, k), zero beyond the last channel of the matrix; k a multiple of 32.
  // Quantized: `row` begins a panel, and whole panels are written.
  void expand(int64_t row, int64_t rows, int64_t k0, int64_t k, float* out) const {
    const int64_t n = std::min(k, in - k0);
    for (int64_t r = 0; r < rows; r += dense ? 1 : quant_panel, out += k * (dense ? 1 : quant_panel)) {
      if (!dense) {
        isa().dequantize(quant, (row + r) / quant_panel, k0, n, out, k);
        for (int64_t i = 0; i < quant_panel; i++) std::fill(out + i * k + n, out + (i + 1) * k, 0.0f);
        continue;
      }
      isa().to_f32(dense->dtype, at(row + r, k0), n, out);
      std::fill(out + n, out + k, 0.0f);
    }
  }
};

// Rows of x copied to a length that suits the vectors, zero padded.
const float* pad_tokens(const float* x, int64_t ldx, int64_t n, int64_t in, int64_t padded) {
  thread_local Scratch scratch;
  float* out = scratch.get<float>(n * padded);
  for (int64_t t = 0; t < n; t++) {
    std::copy_n(x + t * ldx, in, out + t * padded);
    std::fill(out + t * padded + in, out + (t + 1) * padded, 0.0f);
  }
  return out;
}

// bias[begin, end) in f32, or null.
const float* bias_f32(const Tensor* bias, int64_t begin, int64_t end) {
  if (!bias) return nullptr;
  if (bias->dtype == DType::f32) return bias->f32() + begin;
  thread_local Scratch scratch;
  float* out = scratch.get<float>(end - begin);
  isa().to_f32(bias->dtype, bias->as<char>() + begin * int64_t(dtype_size(bias->dtype)), end - begin, out);
  return out;
}

// One token and dense weights: they go from memory to registers.
void one_token(const float* x, const Weights& w, const float* bias, int64_t begin, int64_t end, bool beta, float* y) {
  constexpr int64_t step = 64;
  float sums[step];
  for (int64_t r0 = begin; r0 < end; r0 += step) {
    const int64_t rows = std::min(step, end - r0);
    isa().gemv(w.dense->dtype, w.at(r0, 0), w.in, rows, w.in, x, sums);
    for (int64_t r = 0; r < rows; r++) {
      float v = sums[r];
      if (bias) v += bias[r0 - begin + r];
      if (beta) v += y[r0 + r];
      y[r0 + r] = v;
    }
  }
}

// Up to token_block tokens: per panel of rows, the k blocks in turn, the lane sums waiting in `acc` between them.
void some_tokens(const float* x, int64_t ldx, int64_t n, int64_t padded, const Weights& w, const float* bias, int64_t begin,
                 int64_t end, bool beta, float* y, int64_t ldy) {
  thread_local Scratch scratch;
  const Isa& kern = isa();
  // Few tokens: a panel small enough for L1.
  const bool few = n <= 2 * kern.token_tile;
  const int64_t panel = !few ? panel_rows : w.dense ? 4 : quant_panel;
  const int64_t k_block = few && !w.dense ? kern.k_block / 4 : kern.k_block;
  const int64_t block = round_up(ceil_div(padded, ceil_div(padded, k_block)), 32);
  float* acc = scratch.get<float>(panel * (n * kern.lanes + block));
  float* expanded = acc + panel * n * kern.lanes;
  for (int64_t r0 = begin; r0 < end; r0 += panel) {
    const int64_t rows = std::min(panel, end - r0);
    for (int64_t k0 = 0; k0 < padded; k0 += block) {
      const int64_t k = std::min(block, padded - k0);
      DotPanel p{.k = k,
                 .rows = rows,
                 .tokens = n,
                 .w = expanded,
                 .x = x + k0,
                 .ldw = k,
                 .ldx = ldx,
                 .ldy = ldy,
                 .acc = acc,
                 .first = k0 == 0,
                 .last = k0 + k == padded,
                 .beta = beta,
                 .bias = bias ? bias + (r0 - begin) : nullptr,
                 .y = y + r0};
      if (w.in_place()) {
        p.w = static_cast<const float*>(w.at(r0, k0));
        p.ldw = w.in;
      } else {
        w.expand(r0, rows, k0, k, expanded);
      }
      kern.dot_panel(p);
    }
  }
}

// Many tokens: operands packed once. All tasks share the packed tokens; each packs some rows of W, which stay in its L2 while the
// tokens pass. Where W has few rows, its tasks share the tokens out, too.
class ManyTokens {
  const Isa& kern_ = isa();
  const Weights& w_;
  const float* x_;
  const int64_t ldx_, n_, padded_ = round_up(w_.in, 32);
  const int64_t mr_ = kern_.gemm_f32.mr, nr_ = kern_.gemm_f32.nr, panels_ = ceil_div(n_, mr_);
  const float* tokens_ = nullptr;

  int64_t panel_size(int64_t width) const { return lane_panel_size(padded_, width); }
  int64_t panel_tokens(int64_t p) const { return std::min(mr_, n_ - p * mr_); }

  const float* pack_tokens() const {
    thread_local Scratch scratch;
    float* out = scratch.get<float>(panels_ * panel_size(mr_));
    parallel_for(panels_, [&](int64_t p) {
      const int64_t count = panel_tokens(p);
      const float* rows = x_ + p * mr_ * ldx_;
      int64_t ld = ldx_;
      if (padded_ != w_.in) {
        rows = pad_tokens(rows, ld, count, w_.in, padded_);
        ld = padded_;
      }
      kern_.pack_lanes(rows, ld, kern_.gemm_f32.height(count), count, padded_, out + p * panel_size(mr_));
    });
    return out;
  }

  // Rows [begin, end) of W; begin is a multiple of quant_panel.
  const float* pack_weights(int64_t begin, int64_t end) const {
    thread_local Scratch packed, expanded;
    const int64_t step = std::max(nr_, quant_panel);
    float* out = packed.get<float>(ceil_div(end - begin, nr_) * panel_size(nr_));
    for (int64_t r0 = begin; r0 < end; r0 += step) {
      const int64_t rows = std::min(step, end - r0);
      const float* from;
      if (w_.in_place()) {
        from = static_cast<const float*>(w_.at(r0, 0));
      } else {
        float* f32 = expanded.get<float>(step * padded_);
        w_.expand(r0, rows, 0, padded_, f32);
        from = f32;
      }
      for (int64_t r = 0; r < rows; r += nr_)
        kern_.pack_lanes(from + r * padded_, padded_, nr_, std::min(nr_, rows - r), padded_,
                         out + (r0 + r - begin) / nr_ * panel_size(nr_));
    }
    return out;
  }

 public:
  ManyTokens(const float* x, int64_t ldx, int64_t n, const Weights& w) : w_(w), x_(x), ldx_(ldx), n_(n) {
    tokens_ = pack_tokens();
  }

  void run(int64_t out, const float* bias, bool beta, float* y, int64_t ldy) const {
    const int64_t unit = std::max(nr_, quant_panel), threads = thread_count();
    const int64_t fit = std::max<int64_t>(1, packed_rows_bytes / (unit * padded_ * int64_t(sizeof(float))));
    const int64_t rows = std::min(fit, ceil_div(out, 2 * threads * unit)) * unit, row_tasks = ceil_div(out, rows);
    const int64_t shares = std::clamp(ceil_div(2 * threads, row_tasks), int64_t(1), ceil_div(n_, 2 * packed_from));
    parallel_for(row_tasks * shares, [&](int64_t task) {
      const int64_t begin = task / shares * rows, end = std::min(out, begin + rows), share = task % shares;
      const float* weights = pack_weights(begin, end);
      // Some panels of tokens at a time: they stay in L2 while the rows pass.
      const int64_t last = panels_ * (share + 1) / shares;
      for (int64_t p = panels_ * share / shares; p < last; p += lane_panels)
        for (int64_t r = begin; r < end; r += nr_)
          kern_.lane_tile({.k = padded_,
                           .tokens = std::min(n_, std::min(last, p + lane_panels) * mr_) - p * mr_,
                           .rows = std::min(nr_, end - r),
                           .a = tokens_ + p * panel_size(mr_),
                           .b = weights + (r - begin) / nr_ * panel_size(nr_),
                           .bias = bias ? bias + r : nullptr,
                           .beta = beta,
                           .y = y + p * mr_ * ldy + r,
                           .ldy = ldy});
    });
  }
};

void check(const Matrix& w, const Tensor* bias, float beta) {
  if (const Tensor* t = std::get_if<Tensor>(&w))
    require(t->dtype == DType::f32 || t->dtype == DType::f16 || t->dtype == DType::bf16,
            "linear: weights must be f32, f16 or bf16");
  require(beta == 0 || beta == 1, "linear: beta must be 0 or 1");
  if (bias) {
    require(bias->dtype == DType::f32 || bias->dtype == DType::f16 || bias->dtype == DType::bf16,
            "linear: the bias must be f32, f16 or bf16");
    require(bias->size() == out_features(w), "linear: the bias must have one element per output");
  }
}

}  // namespace

void linear_serial(const float* x, int64_t ldx, int64_t n, const Matrix& w, const Tensor* bias, int64_t begin, int64_t end,
                   float beta, float* y, int64_t ldy) {
  check(w, bias, beta);
  if (n <= 0 || begin >= end) return;
  const Weights weights(w);
  const float* b = bias_f32(bias, begin, end);
  const int64_t padded = round_up(weights.in, 32);
  require(weights.in > 0, "linear: weights without input channels");
  for (int64_t t = 0; t < n; t += token_block) {
    const int64_t tokens = std::min(token_block, n - t);
    const float* xt = x + t * ldx;
    int64_t ld = ldx;
    if (padded != weights.in) {
      xt = pad_tokens(xt, ldx, tokens, weights.in, padded);
      ld = padded;
    }
    float* yt = y + t * ldy;
    if (tokens == 1 && weights.dense && padded == weights.in)
      one_token(xt, weights, b, begin, end, beta != 0, yt);
    else
      some_tokens(xt, ld, tokens, padded, weights, b, begin, end, beta != 0, yt, ldy);
  }
}

void linear(const float* x, int64_t ldx, int64_t n, const Matrix& w, const Tensor* bias, float beta, float* y, int64_t ldy) {
  const int64_t out = out_features(w), threads = thread_count();
  if (n <= 0 || out <= 0) return;
  const bool small = double(out) * double(in_features(w)) * double(n) < 1 << 16;
  if (n >= packed_from && !small) {
    check(w, bias, beta);
    const Weights weights(w);
    const float* b = bias_f32(bias, 0, out);
    const int64_t most = std::max(4 * packed_from, packed_tokens_bytes / (weights.in * int64_t(sizeof(float))));
    const int64_t blocks = ceil_div(n, most), size = ceil_div(n, blocks);
    for (int64_t t = 0; t < n; t += size)
      ManyTokens(x + t * ldx, ldx, std::min(size, n - t), weights).run(out, b, beta != 0, y + t * ldy, ldy);
    return;
  }
  if (threads == 1 || small) {
    linear_serial(x, ldx, n, w, bias, 0, out, beta, y, ldy);
    return;
  }
  // Pieces of rows by blocks of tokens, some for each thread so that none waits long at the end.
  const int64_t token_blocks = ceil_div(n, token_block);
  const int64_t per_block = ceil_div(8 * threads, token_blocks);
  const int64_t rows =
      std::min<int64_t>(256, round_up(ceil_div(out, per_block), n == 1 && std::holds_alternative<Tensor>(w) ? 8 : panel_rows));
  parallel_for(ceil_div(out, rows) * token_blocks, [&](int64_t task) {
    const int64_t t = task % token_blocks * token_block, r = task / token_blocks * rows;
    linear_serial(x + t * ldx, ldx, std::min(token_block, n - t), w, bias, r, std::min(out, r + rows), beta, y + t * ldy, ldy);
  });
}

}  // namespace eac
