// GPTQ over blocks of columns.
//
// DEFINITION  for position i in order:  q_i = quantize(w_i);  err_i = (w_i - q_i) / U_ii;  w_j -= err_i U_ij for j > i.
//             Inside a block the update runs column by column; behind it, once a block, as W[:, rest] -= Err U[block, rest].
// LAYOUT      Rows are independent, so a chunk of 32 of them is transposed for the inner loops: every operation is then one over
//             32 neighbouring floats. Scales and zeros lie by group for the same reason: (groups, rows padded to 32).
// REGULARITY  A row's result does not depend on the other rows, on the chunking or on the number of threads.
// Source: GPTQ (Frantar et al., 2023), Algorithm 1.
#include <algorithm>
#include <vector>

#include "core/thread_pool.h"
#include "kernels/matmul/gemm.h"
#include "kernels/quant/group_params.h"

namespace eac {
namespace {

constexpr int64_t chunk_rows = 32;
constexpr int64_t max_block = 128;

// Blocks hold whole groups, or groups hold whole blocks, so that a group's parameters are taken either from the transposed block
// or at a block's start from W, where every earlier update has arrived.
int64_t block_size(int64_t group_size, int64_t cols) {
  if (group_size >= cols) return max_block;
  if (group_size <= max_block) return max_block / group_size * group_size;
  int64_t block = max_block;
  while (group_size % block != 0) block -= quant_block;
  return block;
}

struct Solver {
  const HessianFactor& f;
  const QuantOptions& o;
  int64_t rows, cols, group_size, block, padded_rows;
  Tensor w;                        // f32 (rows, cols), columns in the factor's order; updated as blocks are done
  Tensor err;                      // f32 (rows, block)
  Tensor codes;                    // u8 (rows, cols), by channel
  std::vector<float> scale, zero;  // (groups, padded_rows)
  std::vector<double> row_error;   // (padded_rows)

  Solver(const Tensor& source, const HessianFactor& factor, const QuantOptions& options)
      : f(factor),
        o(options),
        rows(source.rows()),
        cols(source.cols()),
        group_size(std::min(o.group_size, cols)),
        block(std::min(block_size(group_size, cols), cols)),
        padded_rows((rows + chunk_rows - 1) / chunk_rows * chunk_rows),
        w(Tensor::zeros(DType::f32, {rows, cols})),
        err(Tensor::zeros(DType::f32, {rows, block})),
        codes(Tensor::zeros(DType::u8, {rows, cols})),
        row_error(padded_rows) {
    const int64_t groups = (cols + group_size - 1) / group_size;
    scale.assign(groups * padded_rows, 1.0f);
    zero.assign(groups * padded_rows, 0.0f);
    parallel_for(padded_rows / chunk_rows, [&](int64_t chunk) {
      std::vector<float> row(cols);
      for (int64_t r = chunk * chunk_rows; r < std::min(rows, (chunk + 1) * chunk_rows); r++) {
        load_row(source, r, row.data());
        if (f.act_order)
          for (int64_t g = 0; g < groups; g++) fit(g, r, &row[g * group_size]);
        for (int64_t i = 0; i < cols; i++) w.f32()[r * cols + i] = row[f.order[i]];
      }
    });
  }

  // values: the group's weights of row r in channel order
  void fit(int64_t g, int64_t r, const float* values) {
    const int64_t c = g * group_size;
    const GroupParams p = fit_group(values, std::min(group_size, cols - c), o, &f.diagonal[c]);
    scale[g * padded_rows + r] = p.scale();
    zero[g * padded_rows + r] = p.zero;
  }

  // The group that starts at column c of the block [b0, b1), whose transposed weights are wt.
  void fit_from_block(int64_t c, int64_t b0, int64_t b1, int64_t r0, int64_t count, const float* wt) {
    const int64_t g = c / group_size, end = std::min(cols, c + group_size);
    std::vector<float> values(group_size);
    for (int64_t r = 0; r < count; r++) {
      if (end > b1) {
        fit(g, r0 + r, w.f32() + (r0 + r) * cols + c);
        continue;
      }
      for (int64_t j = c; j < end; j++) values[j - c] = wt[(j - b0) * chunk_rows + r];
      fit(g, r0 + r, values.data());
    }
  }

  // One column of 32 rows: codes, err and the squared error. w, s, z, e, sum: (32).
  void quantize_column(const float* w32, const float* s, const float* z, float u_ii, float* e, uint8_t* code, double* sum) const {
    const float top = float((1 << o.bits) - 1);
    float q[chunk_rows];
    for (int64_t r = 0; r < chunk_rows; r++) q[r] = round_limited(w32[r], s[r], -z[r], top - z[r]);
    for (int64_t r = 0; r < chunk_rows; r++) e[r] = (w32[r] - q[r] * s[r]) / u_ii;
    for (int64_t r = 0; r < chunk_rows; r++) code[r] = uint8_t(int(q[r] + z[r]));
    for (int64_t r = 0; r < chunk_rows; r++) sum[r] += double(e[r]) * e[r];
  }

  void solve_block(int64_t b0, int64_t b1, int64_t r0) {
    const int64_t size = b1 - b0, count = std::min(chunk_rows, rows - r0);
    alignas(64) float wt[max_block * chunk_rows] = {}, e[chunk_rows];
    for (int64_t r = 0; r < count; r++)
      for (int64_t i = 0; i < size; i++) wt[i * chunk_rows + r] = w.f32()[(r0 + r) * cols + b0 + i];
    for (int64_t i = 0; i < size; i++) {
      const int64_t c = b0 + i, channel = f.order[c], g = channel / group_size;
      if (!f.act_order && c % group_size == 0) fit_from_block(c, b0, b1, r0, count, wt);
      const float* u = f.u.f32() + c * cols + b0;
      uint8_t code[chunk_rows];
      quantize_column(wt + i * chunk_rows, &scale[g * padded_rows + r0], &zero[g * padded_rows + r0], u[i], e, code,
                      &row_error[r0]);
      for (int64_t r = 0; r < count; r++) {
        codes.as<uint8_t>()[(r0 + r) * cols + channel] = code[r];
        err.f32()[(r0 + r) * block + i] = e[r];
      }
      for (int64_t j = i + 1; j < size; j++) {
        float* target = wt + j * chunk_rows;
        const float v = u[j];
        for (int64_t r = 0; r < chunk_rows; r++) target[r] -= v * e[r];
      }
    }
  }

  void solve() {
    for (int64_t b0 = 0; b0 < cols; b0 += block) {
      const int64_t b1 = std::min(cols, b0 + block);
      parallel_for(padded_rows / chunk_rows, [&](int64_t chunk) { solve_block(b0, b1, chunk * chunk_rows); });
      if (b1 == cols) break;
      gemm_f32(rows, cols - b1, b1 - b0, -1.0f, {err.data, DType::f32, block, 1},
               {f.u.f32() + b0 * cols + b1, DType::f32, cols, 1}, 1.0f, w.f32() + b1, cols);
    }
  }
};

}  // namespace

GptqResult quantize_gptq(const Tensor& w, const HessianFactor& f, const QuantOptions& o) {
  require_weight(w);
  require(w.cols() == f.n, "quantize_gptq: the weight's columns do not match the Hessian");
  GptqResult result{make_quant_matrix(w.rows(), w.cols(), o.bits, o.group_size, o.symmetric), 0.0};
  QuantMatrix& q = result.matrix;
  if (q.rows == 0) return result;
  Solver solver(w, f, o);
  solver.solve();
  parallel_for(q.panels(), [&](int64_t panel) {
    pack_panel(solver.codes.as<uint8_t>() + panel * quant_panel * q.cols, panel, q);
    for (int64_t r = panel * quant_panel; r < std::min(q.rows, (panel + 1) * quant_panel); r++)
      for (int64_t g = 0; g < q.groups(); g++) {
        q.scale(r, g) = f32_to_f16(solver.scale[g * solver.padded_rows + r]);
        q.zero(r, g) = uint8_t(solver.zero[g * solver.padded_rows + r]);
      }
  });
  for (int64_t r = 0; r < q.rows; r++) result.error += solver.row_error[r] / double(q.rows);
  return result;
}

}  // namespace eac
