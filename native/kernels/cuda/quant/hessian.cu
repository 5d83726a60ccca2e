// Calibration statistics and two-stream targets: products of gemm.cuh.
//
// BOUND  Hessian of 262,144 tokens: 3 m n^2 / 2 multiply-adds in bf16, 6.6e12 at n = 4096 and 8.1e13 at 14336; with 400 TFLOP/s of mma.sync
//        33 ms and 0.40 s. All of a Mixtral layer (each expert's input and hidden channels, as if every token went through it): 3.5 s.
#include "kernels/cuda/matmul/gemm.cuh"

namespace eac::cuda {
namespace {

// The upper triangle from the lower one, 32 × 32 at a time.
__global__ __launch_bounds__(256) void mirror_kernel(float* h, int64_t n) {
  wait_for_earlier();
  __shared__ float part[32][33];
  int64_t row, column;
  lower_tile(blockIdx.x, row, column);
  row *= 32, column *= 32;
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
  for (int i = y; i < 32; i += 8)
    if (row + i < n && column + x < n) part[i][x] = h[(row + i) * n + column + x];
  __syncthreads();
  for (int i = y; i < 32; i += 8)
    if (column + i < row + x && row + x < n) h[(column + i) * n + row + x] = part[x][i];
}

// out[r, i] = x[r, order[i]]
__global__ void order_columns_kernel(const float* x, const int32_t* order, int64_t rows, int64_t n, float* out) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i < rows * n) out[i] = x[i / n * n + order[i % n]];
}

// out[r, order[i]] = w + beta z[r, i]
__global__ void target_kernel(TwoStream t, const float* z) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i >= t.rows * t.n) return;
  const int64_t at = i / t.n * t.n + t.order[i % t.n];
  t.out[at] = load_float(t.storage, t.w, at) + t.beta * z[i];
}

}  // namespace

void hessian(Context& c, const Hessian& h) {
  if (h.m == 0 || h.n == 0) return;
  Operand x{h.x, h.n, true}, weighted = x;
  weighted.weights = h.weights;
  product(c, {.m = h.n, .n = h.n, .k = h.m, .a = weighted, .b = x, .c = h.h, .ldc = h.n, .add = true, .lower = true});
  const int64_t tiles = ceil_div<int64_t>(h.n, 32);
  launch<mirror_kernel>(c, {dim3(unsigned(tiles * (tiles + 1) / 2)), dim3(256)}, h.h, h.n);
}

void cross(Context& c, const Cross& x) {
  if (x.m == 0 || x.n == 0) return;
  const Operand difference{x.x_full, x.n, true, Storage::f32, x.x, x.weights};
  product(c, {.m = x.n, .n = x.n, .k = x.m, .a = difference, .b = {x.x, x.n, true}, .c = x.d, .ldc = x.n, .add = true});
}

// W D H^-1 = (((W D) U^T) U) in the factor's order: three products, no inverse formed. U's zeros are multiplied, too: 12 ms at most.
void two_stream(Context& c, const TwoStream& t) {
  const int64_t n = t.n;
  require(n > 0, "two_stream: W must have columns");
  if (t.rows == 0) return;
  float* wd = c.scratch[slot_weights].get<float>(t.rows * n);
  float* p = c.scratch[slot_ordered].get<float>(t.rows * n);
  const auto times = [&](const Operand& a, const Operand& b, float* out) {
    product(c, {.m = t.rows, .n = n, .k = n, .a = a, .b = b, .c = out, .ldc = n});
  };
  times({t.w, n, false, t.storage}, {t.d, n, true}, wd);
  launch<order_columns_kernel>(c, per_element(t.rows * n), wd, t.order, t.rows, n, p);
  times({p, n}, {t.u, n}, wd);
  times({wd, n}, {t.u, n, true}, p);
  launch<target_kernel>(c, per_element(t.rows * n), t, p);
}

}  // namespace eac::cuda
