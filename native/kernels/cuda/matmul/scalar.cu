// Products in f32 on the CUDA cores: f32 and f16 weights, and bf16 rows that copies of 16 bytes cannot read. Tiles of 64 channels × 64 rows.
//
// METHOD      256 threads of 4 channels × 4 rows each; slabs of 16 inputs go through shared memory, the next one waits in registers meanwhile.
// BOUND       Operations on the CUDA cores: 2 channels cols rows (67 TFLOP/s on an H200); half of what is issued loads operands.
#include "kernels/cuda/matmul/product.cuh"

namespace eac::cuda {
namespace {

constexpr int slab = scalar_slab, depth = 16, stride = slab + 4;

// Four neighbouring elements of a row; zeros beyond `cols`.
__device__ __forceinline__ float4 four(Storage storage, const void* data, int64_t row, int64_t cols, int64_t k) {
  float v[4];
  for (int i = 0; i < 4; i++) v[i] = k + i < cols ? load_float(storage, data, row + k + i) : 0.f;
  return make_float4(v[0], v[1], v[2], v[3]);
}

// A slab of a matrix on its way: thread t has row t / 4, inputs 4 (t % 4) .. + 3.
struct Loader {
  Storage storage;
  const void* data;
  int64_t row, cols;  // row: its first element; cols: 0 for a row that is not there
  float4 v;

  __device__ __forceinline__ void fetch(int64_t k) { v = four(storage, data, row, cols, k + threadIdx.x % 4 * 4); }
  __device__ __forceinline__ void put(float (&to)[depth][stride]) const {
    const int k = threadIdx.x % 4 * 4, at = threadIdx.x / 4;
    to[k][at] = v.x, to[k + 1][at] = v.y, to[k + 2][at] = v.z, to[k + 3][at] = v.w;
  }
};

// pair: gate_up, two matrices at once.
template <bool pair> __global__ __launch_bounds__(256) void scalar_kernel(Product p) {
  wait_for_earlier();
  __align__(16) __shared__ float xs[depth][stride];  // read four at a time
  __shared__ float ws[1 + pair][depth][stride];
  Tile t;
  if (!find_tile(p, slab, t)) return;
  const int at = threadIdx.x / 4;
  const int64_t cols = matrix_of(p, t, false).cols, slabs = (cols + depth - 1) / depth;
  Loader w[1 + pair];
  for (int m = 0; m < 1 + pair; m++) {
    const Weight from = matrix_of(p, t, m == 1);
    w[m] = {from.storage, from.data, (t.channel + at) * cols, t.channel + at < from.rows ? cols : 0, {}};
  }
  Loader x{Storage::f32, p.x, at < t.rows ? input_row(p, t.pair + at) * p.x_stride : 0, at < t.rows ? cols : 0, {}};
  const int64_t begin = slabs * blockIdx.y / p.slices * depth, end = slabs * (blockIdx.y + 1) / p.slices * depth;
  const int c = threadIdx.x % 16, r = threadIdx.x / 16 * 4;
  float sums[1 + pair][4][4] = {};
  const auto fetch = [&](int64_t k) {
    x.fetch(k);
    for (auto& m : w) m.fetch(k);
  };
  if (begin < end) fetch(begin);
  for (int64_t k = begin; k < end; k += depth) {
    x.put(xs);
    for (int m = 0; m < 1 + pair; m++) w[m].put(ws[m]);
    __syncthreads();
    if (k + depth < end) fetch(k + depth);
#pragma unroll
    for (int i = 0; i < depth; i++) {
      const float4 v = *reinterpret_cast<const float4*>(&xs[i][r]);
#pragma unroll
      for (int m = 0; m < 1 + pair; m++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float weight = ws[m][i][c + 16 * j];
          sums[m][0][j] += v.x * weight, sums[m][1][j] += v.y * weight, sums[m][2][j] += v.z * weight,
              sums[m][3][j] += v.w * weight;
        }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int64_t channel = t.channel + c + 16 * j;
      if (r + i >= t.rows) continue;
      if constexpr (pair)
        store_hidden(p, t, r + i, channel, sums[0][i][j], sums[1][i][j]);
      else if (channel < t.channels)
        store_out(p, t, r + i, channel, sums[0][i][j]);
    }
}

}  // namespace

void multiply_scalar(Context& c, const Product& p, int64_t pairs) {
  const Grid grid{dim3(unsigned(most_tiles(p, pairs, slab)), unsigned(p.slices)), dim3(256)};
  if (p.role == Role::gate_up)
    launch<scalar_kernel<true>>(c, grid, p);
  else
    launch<scalar_kernel<false>>(c, grid, p);
}

}  // namespace eac::cuda
