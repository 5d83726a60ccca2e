// GPTQ over blocks of columns: kernels/quant/gptq.cpp has the definition.
//
// Inside a block of up to 128 columns a warp has four rows, a lane 4 columns of each in registers: column i = 32 q + lane l in place q. Every
// lane quantizes its own place, lane l's error goes to all by a shuffle, and all subtract it times row i of U, which lies in shared memory.
// U is 0 left of its diagonal, so a place whose column is done keeps what it holds: its error. Behind the block, W[:, rest] -= Err U[block, rest]
// is a product of gemm.cuh; the errors are stored as that wants them.
//
// BOUND  14336 × 4096: 3 * 1.2e11 multiply-adds in bf16 (1.8 ms at 400 TFLOP/s) and 32 times the rest of W read and written (7.5 GB, 1.6 ms),
//        beside 3 ms of columns (about 160 instructions a column and four rows). 4096 × 14336: 26 GB, 112 blocks, about 12 ms.
//        A Mixtral layer, 8 × (2 of the first, 1 of the second) with act_order's gathers: 8 * (2 * 7 + 12) = 0.2 s. With the Hessians (3.5 s, hessian.cu)
//        and the factors (8 * (0.12 + 0.01) = 1.0 s, factor.cu) about 5 s of the 60 s.
// Source: GPTQ (Frantar et al., 2023), Algorithm 1.
#include <algorithm>

#include "kernels/cuda/quant/quantize.cuh"

namespace eac::cuda {
namespace {

constexpr int widest = 128, places = widest / 32, rows_a_warp = 4, warps = 8;

// As in kernels/quant/gptq.cpp: blocks hold whole groups, or groups whole blocks.
int64_t block_size(int64_t group_size, int64_t cols) {
  if (group_size >= cols) return widest;
  if (group_size <= widest) return widest / group_size * group_size;
  int64_t block = widest;
  while (group_size % block != 0) block -= 32;
  return block;
}

struct Block {
  Quantize q;
  const float* w;    // (rows, cols) in the factor's order
  uint16_t* errors;  // split (rows, size); null for the last block
  int64_t begin, size, groups;
  bool fits;  // groups begin inside: their parameters are taken from the block
};

struct Rows {
  float w[rows_a_warp][places], scale[rows_a_warp][places], zero[rows_a_warp][places];
  uint32_t codes[rows_a_warp];  // a byte a place
};

__device__ __forceinline__ void load_upper(const Block& b, float* u) {
#pragma unroll 8
  for (int at = threadIdx.x; at < widest * widest; at += warps * 32) {
    const int i = at / widest, j = at % widest;
    u[at] = i < b.size && j < b.size ? b.q.u[(b.begin + i) * b.q.cols + b.begin + j] : 0.f;
  }
}

__device__ __forceinline__ void load_rows(const Block& b, int64_t row0, Rows& x) {
#pragma unroll
  for (int s = 0; s < places; s++) {
    const int64_t column = 32 * s + threadIdx.x % 32;
    const int64_t channel = column < b.size ? (b.q.act_order ? b.q.order[b.begin + column] : b.begin + column) : 0;
    const int64_t g = channel / b.q.group_size;
#pragma unroll
    for (int r = 0; r < rows_a_warp; r++) {
      const int64_t row = row0 + r;
      const bool inside = row < b.q.rows && column < b.size, known = inside && !b.fits;
      x.w[r][s] = inside ? b.w[row * b.q.cols + b.begin + column] : 0.f;
      x.scale[r][s] = known ? half_to_float(b.q.scales[row * b.groups + g]) : 1.f;
      x.zero[r][s] = known ? float(b.q.zeros[row * b.groups + g]) : 0.f;
      x.codes[r] = 0;
    }
  }
}

// The group that begins at column i of the block. staged: (rows_a_warp, widest), this warp's.
__device__ __forceinline__ void fit_rows(const Block& b, int64_t row0, int i, float* staged, Rows& x) {
  const int lane = threadIdx.x % 32;
  const int64_t channel = b.begin + i, n = min(b.q.group_size, b.q.cols - channel), g = channel / b.q.group_size;
  __syncwarp();
#pragma unroll
  for (int r = 0; r < rows_a_warp; r++)
#pragma unroll
    for (int s = 0; s < places; s++) staged[r * widest + 32 * s + lane] = x.w[r][s];
  __syncwarp();
  GroupParams mine{};  // lane r: of row r
#pragma unroll 1
  for (int r = 0; r < rows_a_warp; r++) {
    const GroupParams p = fit_group(staged + r * widest + i, n, {b.q.bits, b.q.symmetric, b.q.clip_search},
                                    b.q.importance ? b.q.importance + channel : nullptr);
    if (lane == r) mine = p;
  }
  if (lane < rows_a_warp && row0 + lane < b.q.rows) {
    b.q.scales[(row0 + lane) * b.groups + g] = mine.scale_f16;
    b.q.zeros[(row0 + lane) * b.groups + g] = mine.zero;
  }
#pragma unroll
  for (int r = 0; r < rows_a_warp; r++) {
    const float scale = __shfl_sync(0xffffffffu, half_to_float(mine.scale_f16), r);
    const float zero = __shfl_sync(0xffffffffu, float(mine.zero), r);
#pragma unroll
    for (int s = 0; s < places; s++)
      if (32 * s + lane >= i && 32 * s + lane < i + n) x.scale[r][s] = scale, x.zero[r][s] = zero;
  }
}

// Columns 32 q .. 32 q + 31. pivot: 1 over U's diagonal at this lane's column. Only the division by the scale must be exact: ties hang on it.
template <int q> __device__ __forceinline__ void solve_columns(const float* u, int count, float top, float pivot, Rows& x) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int l = 0; l < count; l++) {
    float right[places];
#pragma unroll
    for (int s = q; s < places; s++) right[s] = u[(32 * q + l) * widest + 32 * s + lane];
#pragma unroll
    for (int r = 0; r < rows_a_warp; r++) {
      const float code = round_limited(x.w[r][q], x.scale[r][q], -x.zero[r][q], top - x.zero[r][q]);
      const float mine = (x.w[r][q] - code * x.scale[r][q]) * pivot;
      const float error = __shfl_sync(0xffffffffu, mine, l);
#pragma unroll
      for (int s = q; s < places; s++) x.w[r][s] -= error * right[s];
      if (lane == l) {
        x.w[r][q] = mine;
        x.codes[r] |= uint32_t(int(code + x.zero[r][q])) << (8 * q);
      }
    }
  }
}

template <int q>
__device__ __forceinline__ void solve_places(const Block& b, const float* u, float* staged, int64_t row0, Rows& x) {
  const int column = 32 * q + threadIdx.x % 32;
  if (32 * q >= b.size) return;
  if (b.fits && (b.begin + 32 * q) % b.q.group_size == 0) fit_rows(b, row0, 32 * q, staged, x);
  const float pivot = column < b.size ? 1 / u[column * widest + column] : 1.f;
  solve_columns<q>(u, int(min(int64_t(32), b.size - 32 * q)), float((1 << b.q.bits) - 1), pivot, x);
  if constexpr (q + 1 < places) solve_places<q + 1>(b, u, staged, row0, x);
}

// x.w holds the errors.
__device__ __forceinline__ void store_rows(const Block& b, int64_t row0, const Rows& x) {
  const int lane = threadIdx.x % 32;
  const int64_t steps = ceil_div(b.size, split_step);
#pragma unroll
  for (int r = 0; r < rows_a_warp; r++) {
    const int64_t row = row0 + r;
    double squares = 0;
#pragma unroll
    for (int s = 0; s < places; s++) {
      const int64_t column = 32 * s + lane;
      if (b.errors && s < steps) store_split(b.errors, steps, row, column, x.w[r][s]);
      if (row >= b.q.rows || column >= b.size) continue;
      const int64_t channel = b.q.act_order ? b.q.order[b.begin + column] : b.begin + column;
      b.q.codes[row * b.q.cols + channel] = uint8_t(x.codes[r] >> (8 * s));
      squares += double(x.w[r][s]) * double(x.w[r][s]);
    }
    squares = warp_sum(squares);
    if (lane == 0 && row < b.q.rows) b.q.row_error[row] = squares + (b.begin > 0 ? b.q.row_error[row] : 0.0);
  }
}

__global__ __launch_bounds__(warps * 32) void solve_block_kernel(Block b) {
  wait_for_earlier();
  float* u = dynamic_shared<float>();
  float* staged = u + widest * widest + threadIdx.x / 32 * rows_a_warp * widest;
  const int64_t row0 = (int64_t(blockIdx.x) * warps + threadIdx.x / 32) * rows_a_warp;
  Rows x;
  load_rows(b, row0, x);
  load_upper(b, u);
  __syncthreads();
  if (row0 < b.q.rows) solve_places<0>(b, u, staged, row0, x);  // the others only pad the errors with zeros
  store_rows(b, row0, x);
}

// out[r, i] = w[r, order[i]]
__global__ void order_weights_kernel(const float* w, Quantize q, float* out) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i < q.rows * q.cols) out[i] = w[i / q.cols * q.cols + q.order[i % q.cols]];
}

}  // namespace

void solve_gptq(Context& c, const Quantize& q, float* w) {
  const int64_t rows = q.rows, cols = q.cols, groups = ceil_div(cols, q.group_size);
  const int64_t size = std::min(block_size(q.group_size, cols), cols);
  if (q.act_order) {
    fit_groups(c, q, w, 0, groups, nullptr);
    float* ordered = c.scratch[slot_ordered].get<float>(rows * cols);
    launch<order_weights_kernel>(c, per_element(rows * cols), w, q, ordered);
    w = ordered;
  }
  const bool fits = !q.act_order && q.group_size <= size;
  uint16_t* errors = c.scratch[slot_errors].get<uint16_t>(split_size(rows, size));
  const int64_t blocks = padded_rows(rows) / (warps * rows_a_warp);
  constexpr size_t shared = (widest * widest + warps * rows_a_warp * widest) * sizeof(float);
  for (int64_t begin = 0; begin < cols; begin += size) {
    const int64_t end = std::min(cols, begin + size);
    if (!q.act_order && !fits && begin % q.group_size == 0) fit_groups(c, q, w, begin / q.group_size, 1, nullptr);
    launch<solve_block_kernel>(c, {dim3(unsigned(blocks)), dim3(warps * 32), shared},
                               Block{q, w, end < cols ? errors : nullptr, begin, end - begin, groups, fits});
    if (end == cols) break;
    product(c, {.m = rows,
                .n = cols - end,
                .k = end - begin,
                .a = {},
                .b = {q.u + begin * cols + end, cols, true},
                .c = w + end,
                .ldc = cols,
                .alpha = -1,
                .add = true,
                .split_a = errors});
  }
}

}  // namespace eac::cuda
