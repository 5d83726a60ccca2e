// C = sign A B + C in f64 on tensor cores: see gemm.cuh.
//
// A block of four warps computes a tile of 64 × 64, a warp 32 × 32 of it. The inner dimension is one tile, so all of A and B is under way at
// once, and C besides; three blocks an SM (Hopper) overlap each other's waiting. Rows of shared memory are padded by 4 doubles: the 4 × 4
// doubles that half a warp reads meet all banks.
// BOUND  16 bytes of C an element and launch, for 128 operations: memory allows 38 TFLOP/s on an H200, beside about 30 that this mma gives.
#include "kernels/cuda/matmul/gemm.cuh"

namespace eac::cuda {
namespace {

constexpr int tile = int(tile_f64), stride = tile + 4, threads = 128;

__device__ __forceinline__ void load_tile(double* shared, const double* from, int64_t ld) {
#pragma unroll 4
  for (int i = 0; i < tile * tile / 2 / threads; i++) {
    const int at = int(threadIdx.x) + threads * i, r = at / (tile / 2), c = at % (tile / 2) * 2;
    copy_async(shared + r * stride + c, from + r * ld + c);
  }
}

template <bool transposed>
__device__ __forceinline__ void multiply(double (&sum)[4][4][2], const double* a, const double* b, int row0, int column0) {
  const int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int k = 0; k < tile; k += 4) {
    double x[4], y[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      x[i] = a[(row0 + 8 * i + r) * stride + k + c];
      y[i] = transposed ? b[(column0 + 8 * i + r) * stride + k + c] : b[(k + c) * stride + column0 + 8 * i + r];
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) mma_f64(sum[i][j], x[i], y[j]);
  }
}

template <bool transposed> __global__ __launch_bounds__(threads, 3) void multiply_f64_kernel(MultiplyF64 p) {
  wait_for_earlier();
  double *a = dynamic_shared<double>(), *b = a + tile * stride;
  int64_t row = blockIdx.x / p.columns, column = blockIdx.x % p.columns;
  if (p.lower) lower_tile(blockIdx.x, row, column);
  load_tile(a, p.a + row * tile * p.lda, p.lda);
  load_tile(b, p.b + column * tile * (transposed ? p.ldb : 1), p.ldb);
  copy_commit();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row0 = warp / 2 * 32, column0 = warp % 2 * 32;
  double* c = p.c + (row * tile + row0 + lane / 4) * p.ldc + column * tile + column0 + 2 * (lane % 4);
  double sum[4][4][2] = {};  // sign (C + sign A B), so that C is on its way with A and B
  if (column < p.fresh) {
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const double2 v = *reinterpret_cast<const double2*>(c + 8 * i * p.ldc + 8 * j);
        sum[i][j][0] = p.sign * v.x, sum[i][j][1] = p.sign * v.y;
      }
  }
  copy_wait<0>();
  __syncthreads();
  multiply<transposed>(sum, a, b, row0, column0);
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      *reinterpret_cast<double2*>(c + 8 * i * p.ldc + 8 * j) = make_double2(p.sign * sum[i][j][0], p.sign * sum[i][j][1]);
}

}  // namespace

void multiply_f64(Context& c, const MultiplyF64& p) {
  const int64_t tiles = p.lower ? p.rows * (p.rows + 1) / 2 : p.rows * p.columns;
  const Grid grid{dim3(unsigned(tiles)), dim3(threads), 2 * tile * stride * sizeof(double)};
  if (p.transposed)
    launch<multiply_f64_kernel<true>>(c, grid, p);
  else
    launch<multiply_f64_kernel<false>>(c, grid, p);
}

}  // namespace eac::cuda
