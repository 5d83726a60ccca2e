// Dense products on tensor cores, for calibration.
//
// DEFINITION  product:      C (m × n, f32) = alpha A B^T + (add ? C : 0), A (m × k), B (n × k), each element split in two bf16, x = hi + lo:
//                           A B^T = hi hi^T + hi lo^T + lo hi^T, summed in f32.
//             multiply_f64: C = sign A B + C in f64, on tiles of 64 × 64 with an inner dimension of 64.
// LIMITS      product: hi keeps 8 significant bits and lo the next 8, so that a term a b is off by at most 3 * 2^-18 |a b|, 2^-16 in round
//             figures. Tensor cores cut sums off instead of rounding them, which shows where all terms are positive; a sum therefore runs
//             over at most 4096 terms before it is added to the others with rounding: about 2e-5, at worst 9e-5. A Hessian is damped by
//             1e-2 of its mean diagonal and comes from a sample of tokens; GPTQ's updates move weights by less than a quantization step:
//             both are far coarser.
// BOUND       3 m n k multiply-adds in bf16 (half of them if `lower`), where m and n are at least a few hundred; else the operands' bytes:
//             they are read once, written split and read again by each row or column of tiles.
#pragma once
#include "kernels/cuda/quant/calibration.cuh"

namespace eac::cuda {

// X (rows × k): element (i, j) = data[i * ld + j], or data[j * ld + i] if transposed; minus f32 `minus` of the same layout; times weights[j].
struct Operand {
  const void* data;
  int64_t ld;
  bool transposed = false;
  Storage storage = Storage::f32;
  const float* minus = nullptr;
  const float* weights = nullptr;
};

struct Product {
  int64_t m, n, k;
  Operand a, b;
  float* c;
  int64_t ldc;
  float alpha = 1;
  bool add = false;
  bool lower = false;  // m = n: only what lies on and below the diagonal; the rest of C keeps its values or gets any
  const uint16_t* split_a = nullptr;  // instead of a: split already
};
void product(Context&, const Product&);

// LAYOUT  A split matrix has its rows padded to 128 and k to 32 with zeros: (rows, steps of 32, hi and lo, 32) bf16, 128 bytes a row and step.
inline constexpr int64_t split_rows = 128, split_step = 32;
inline int64_t padded_rows(int64_t n) { return ceil_div(n, split_rows) * split_rows; }
inline int64_t split_steps(int64_t k) { return ceil_div(k, split_step); }
inline int64_t split_size(int64_t rows, int64_t k) { return padded_rows(rows) * split_steps(k) * 2 * split_step; }
__device__ __forceinline__ void store_split(uint16_t* split, int64_t steps, int64_t row, int64_t column, float v) {
  const uint32_t hi = pack_bf16(v, 0.f);
  uint16_t* at = split + (row * steps + column / split_step) * (2 * split_step) + column % split_step;
  at[0] = uint16_t(hi);
  at[split_step] = uint16_t(pack_bf16(v - bf16_low(hi), 0.f));
}

// SHAPES  A (64 rows × 64), B (64 × 64 columns), C (64 rows × 64 columns), `rows` and `columns` counted in tiles.
//         C may lie over A if columns = 1, and over B if rows = 1.
struct MultiplyF64 {
  const double* a;
  int64_t lda;
  const double* b;
  int64_t ldb;
  double* c;
  int64_t ldc;
  int64_t rows, columns;
  double sign;                       // 1 or -1
  int64_t fresh = int64_t(1) << 40;  // from this column of tiles on, C counts as 0
  bool transposed = false;           // b holds B^T
  bool lower = false;                // rows = columns: only tiles on and below the diagonal
};
inline constexpr int64_t tile_f64 = 64;
void multiply_f64(Context&, const MultiplyF64&);

// The tile of a lower triangle that comes at place t by rows.
__device__ __forceinline__ void lower_tile(int64_t t, int64_t& row, int64_t& column) {
  row = int64_t((sqrt(8.0 * double(t) + 1) - 1) / 2);
  while (row * (row + 1) / 2 > t) row--;
  while ((row + 1) * (row + 2) / 2 <= t) row++;
  column = t - row * (row + 1) / 2;
}

}  // namespace eac::cuda
