#include "kernels/matmul/int8.h"

#include <algorithm>

#include "core/thread_pool.h"

namespace eac {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t token_block = 64;  // tokens that pass over a chunk of unpacked weights while all of it stays in L1
constexpr int64_t panel_block = 8;   // panels of one task

// y = beta * y + sums + bias, over the rows of some panels.
void write_rows(const Int8Dot& d, const Tensor* bias, float beta, int64_t rows, float* y, int64_t ldy) {
  const int64_t begin = d.panel * quant_panel, count = std::min(rows - begin, d.panels * quant_panel);
  float b[panel_block * quant_panel];
  if (bias) isa().to_f32(bias->dtype, bias->as<char>() + begin * int64_t(dtype_size(bias->dtype)), count, b);
  for (int64_t t = 0; t < d.n; t++) {
    const float* in = d.out + t * d.ldout;
    float* out = y + t * ldy + begin;
    for (int64_t r = 0; r < count; r++) {
      float v = in[r];
      if (bias) v += b[r];
      out[r] = beta != 0 ? v + out[r] : v;
    }
  }
}

}  // namespace

QuantPanels panels_of(const QuantMatrix& q) {
  return {q.bits,     q.codes.as<uint8_t>(), q.scales.as<uint16_t>(), q.zeros.as<uint8_t>(), q.panel_bytes(),
          q.groups(), q.group_size};
}

int64_t int8_block(const QuantMatrix& q) {
  if (q.group_size >= q.cols) return 128;
  return q.group_size % 128 == 0 ? 128 : q.group_size % 64 == 0 ? 64 : 32;
}

void Int8Rows::reset(int64_t n, int64_t width, int64_t block) {
  const int64_t blocks = ceil_div(width, block);
  // Rows of an odd number of cache lines: many rows' equal channels do not fall into one set of the cache.
  const int64_t stride = (ceil_div(width, 64) | 1) * 64;
  view_ = {q_.get<int8_t>(n * stride), scale_.get<float>(n * blocks), sum_.get<int32_t>(n * blocks), stride, blocks, block};
}

void Int8Rows::set(int64_t token, int64_t begin, const float* x, int64_t count) {
  const int64_t first = token * view_.blocks + begin / view_.block;
  isa().quantize_int8(x, count, view_.block, const_cast<int8_t*>(view_.q) + token * view_.stride + begin,
                      const_cast<float*>(view_.scale) + first, const_cast<int32_t*>(view_.sum) + first);
}

void Int8Rows::quantize(const float* x, int64_t ldx, int64_t n, int64_t width, int64_t block) {
  reset(n, width, block);
  const int64_t step = std::max<int64_t>(1, 8192 / width);
  parallel_for(ceil_div(n, step), [&](int64_t task) {
    for (int64_t t = task * step; t < std::min(n, (task + 1) * step); t++) set(t, 0, x + t * ldx, width);
  });
}

void linear_int8(const float* x, int64_t ldx, int64_t n, const QuantMatrix& w, const Tensor* bias, float beta, float* y,
                 int64_t ldy) {
  if (n <= 0 || w.rows <= 0) return;
  thread_local Int8Rows rows;
  rows.quantize(x, ldx, n, w.cols, int8_block(w));
  const Int8Tokens& tokens = rows.view();
  const QuantPanels panels = panels_of(w);
  // One token: pieces small enough that no thread waits long at the end.
  const int64_t pieces = ceil_div(n, token_block);
  const int64_t step =
      std::clamp<int64_t>(ceil_div(w.panels() * pieces, 8 * thread_count()), std::min<int64_t>(4, panel_block), panel_block);
  parallel_for(ceil_div(w.panels(), step) * pieces, [&](int64_t task) {
    thread_local Scratch scratch;
    const int64_t t = task % pieces * token_block, p = task / pieces * step, count = std::min(step, w.panels() - p);
    Int8Dot d{.w = panels,
              .panel = p,
              .panels = count,
              .units = w.blocks(),
              .x = tokens,
              .rows = nullptr,
              .n = std::min(token_block, n - t),
              .out = scratch.get<float>(token_block * panel_block * quant_panel),
              .ldout = count * quant_panel};
    d.x.q += t * tokens.stride, d.x.scale += t * tokens.blocks, d.x.sum += t * tokens.blocks;
    isa().dot_int8(d);
    write_rows(d, bias, beta, w.rows, y + t * ldy, ldy);
  });
}

void linear(const float* x, int64_t ldx, int64_t n, const Matrix& w, const Tensor* bias, float beta, float* y, int64_t ldy,
            Activations activations) {
  const QuantMatrix* q = std::get_if<QuantMatrix>(&w);
  if (q && activations == Activations::int8)
    linear_int8(x, ldx, n, *q, bias, beta, y, ldy);
  else
    linear(x, ldx, n, w, bias, beta, y, ldy);
}

}  // namespace eac
