// H^-1 = U^T U of the damped, ordered Hessian: kernels/quant/hessian.cpp has the algebra. With J the reversal, J H J = L L^T, U = J L^-1 J.
//
// L and its inverse are computed in place, right-looking, 64 columns a step, in f64; the matrix is padded to whole tiles by an identity.
//   factor:  a diagonal block gets its L and the inverse of that (one block of threads); the panel below it is multiplied by the inverse;
//            the rest has the panel's products subtracted.
//   invert:  L X = I from above: row k of tiles is multiplied by the inverse of its diagonal block, and its products with the panel of L below
//            are subtracted from the rows that follow.
// BOUND  2/3 n^3 operations in f64 and 16 n^3 / (3 * 64) bytes: n = 14336: 2.0e12 and 0.25 TB, 0.07 s at 30 TFLOP/s beside 0.05 s at 4.8 TB/s;
//        n = 4096: 5 ms, less than the 64 steps that follow each other (about 60 us each with their launches).
// MEMORY 8 n^2 bytes of scratch: 1.6 GB at n = 14336.
#include <cmath>

#include "kernels/cuda/matmul/gemm.cuh"

namespace eac::cuda {
namespace {

constexpr int64_t tile = tile_f64;
enum Finding : int32_t { not_finite = 1, not_positive = 2 };

// One block: what is added to the diagonal.
__global__ __launch_bounds__(1024) void damping_kernel(const float* h, int64_t n, double damping, double* added) {
  wait_for_earlier();
  __shared__ double shared[33];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += double(h[i * (n + 1)]);
  const double mean = block_sum(sum, shared) / double(n);
  if (threadIdx.x == 0) *added = damping * (mean > 0 ? mean : 1.0);
}

__global__ void diagonal_kernel(const float* h, int64_t n, const double* added, float* diagonal) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i < n) diagonal[i] = float(double(h[i * (n + 1)]) + *added);
}

// order[place] = channel, by falling diagonal, the smaller channel first among equals. NaN, which fails anyway, counts as 0: places stay distinct.
__global__ __launch_bounds__(256) void order_kernel(const float* diagonal, int64_t n, bool act_order, int32_t* order) {
  wait_for_earlier();
  __shared__ float part[256];
  const int64_t i = global_thread();
  const auto key = [&](int64_t j) { return is_finite(diagonal[j]) ? diagonal[j] : 0.f; };
  const float own = i < n ? key(i) : 0.f;
  int64_t place = act_order ? 0 : i;
  for (int64_t first = 0; act_order && first < n; first += 256) {
    __syncthreads();
    if (first + threadIdx.x < n) part[threadIdx.x] = key(first + threadIdx.x);
    __syncthreads();
    const int count = int(min(int64_t(256), n - first));
    for (int j = 0; j < count; j++) place += part[j] > own || (part[j] == own && first + j < i);
  }
  if (i < n) order[place] = int32_t(i);
}

// The lower triangle of J H J with its damping, up to the end of the diagonal tile; size: padded.
__global__ void gather_kernel(Factor f, const double* added, double* a, int64_t size) {
  wait_for_earlier();
  const int64_t i = blockIdx.y, j = global_thread(), n = f.n;
  if (j >= (i / tile + 1) * tile) return;
  double v = i == j ? 1 : 0;
  if (i < n && j < n) {
    v = double(f.h[int64_t(f.order[n - 1 - i]) * n + f.order[n - 1 - j]]);
    if (i == j) v += *added;
  }
  a[i * size + j] = v;
}

// inverse (64 × 64) = L^-1 of the diagonal block a = L L^T, zeros above the diagonal. One block of 256 threads; shared: two tiles.
__global__ __launch_bounds__(256) void diagonal_block_kernel(const double* a, int64_t lda, double* inverse, int32_t* flag) {
  wait_for_earlier();
  constexpr int stride = tile + 1;
  double *l = dynamic_shared<double>(), *x = l + tile * stride;
  const int thread = threadIdx.x;
  for (int i = thread; i < tile * tile; i += 256) l[i / tile * stride + i % tile] = a[i / tile * lda + i % tile];
  __syncthreads();
  const int row = thread % tile;
  for (int j = 0; j < tile; j++) {
    const double pivot = l[j * stride + j];
    if (thread == 0 && !(pivot > 0 && is_finite(pivot))) atomicOr(flag, int32_t(not_positive));
    __syncthreads();
    if (thread >= j && thread < tile) l[thread * stride + j] = thread == j ? sqrt(pivot) : l[thread * stride + j] / sqrt(pivot);
    __syncthreads();
    for (int k = j + 1 + thread / tile; k <= row; k += 256 / tile) l[row * stride + k] -= l[row * stride + j] * l[k * stride + j];
    __syncthreads();
  }
  // Columns are independent; the four threads of one sit in one warp.
  const int column = thread / 4, part = thread % 4;
  for (int i = 0; i < tile; i++) {
    double sum = 0;
    for (int k = column + part; k < i; k += 4) sum += l[i * stride + k] * x[k * stride + column];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (part == 0) x[i * stride + column] = i < column ? 0 : (i == column ? 1.0 : -sum) / l[i * stride + i];
    __syncwarp();
  }
  __syncthreads();
  for (int i = thread; i < tile * tile; i += 256) inverse[i] = x[i / tile * stride + i % tile];
}

// panel (rows × 64) = the columns of L below a diagonal block, which itself becomes its inverse. a: at the block.
__global__ void take_panel_kernel(double* a, int64_t lda, int64_t rows, const double* inverse, double* panel) {
  wait_for_earlier();
  const int64_t i = global_thread(), r = i / tile, c = i % tile;
  if (r < tile)
    a[r * lda + c] = inverse[i];
  else if (r < tile + rows)
    panel[i - tile * tile] = a[r * lda + c];
}

// u = J L^-1 J as f32, zeros below the diagonal.
__global__ void upper_kernel(const double* l, int64_t size, int64_t n, float* u) {
  wait_for_earlier();
  const int64_t i = blockIdx.y, j = global_thread();
  if (j < n) u[i * n + j] = j >= i ? float(l[(n - 1 - i) * size + n - 1 - j]) : 0.f;
}

Grid rows_of(int64_t rows, int64_t columns) {
  return {dim3(unsigned(ceil_div<int64_t>(columns, 256)), unsigned(rows)), dim3(256)};
}

// blocks (size / 64, 64, 64): the inverses of the diagonal blocks of L. L replaces what is below them.
void factor_lower(Context& c, double* a, int64_t size, double* blocks, int32_t* flag) {
  constexpr size_t shared = 2 * tile * (tile + 1) * sizeof(double);
  for (int64_t k = 0; k < size / tile; k++) {
    double *diagonal = a + k * tile * (size + 1), *below = diagonal + tile * size, *inverse = blocks + k * tile * tile;
    const int64_t rest = size / tile - k - 1;
    launch<diagonal_block_kernel>(c, {dim3(1), dim3(256), shared}, diagonal, size, inverse, flag);
    if (rest == 0) return;
    multiply_f64(c, {.a = below,
                     .lda = size,
                     .b = inverse,
                     .ldb = tile,
                     .c = below,
                     .ldc = size,
                     .rows = rest,
                     .columns = 1,
                     .sign = 1,
                     .fresh = 0,
                     .transposed = true});
    multiply_f64(c, {.a = below,
                     .lda = size,
                     .b = below,
                     .ldb = size,
                     .c = below + tile,
                     .ldc = size,
                     .rows = rest,
                     .columns = rest,
                     .sign = -1,
                     .transposed = true,
                     .lower = true});
  }
}

void invert_lower(Context& c, double* a, int64_t size, const double* blocks, double* panel) {
  for (int64_t k = 0; k < size / tile; k++) {
    double *row = a + k * tile * size, *below = row + tile * size;
    const double* inverse = blocks + k * tile * tile;
    const int64_t rest = size / tile - k - 1;
    launch<take_panel_kernel>(c, per_element((rest + 1) * tile * tile), row + k * tile, size, rest * tile, inverse, panel);
    if (k > 0)
      multiply_f64(c, {.a = inverse,
                       .lda = tile,
                       .b = row,
                       .ldb = size,
                       .c = row,
                       .ldc = size,
                       .rows = 1,
                       .columns = k,
                       .sign = 1,
                       .fresh = 0});
    if (rest > 0)
      multiply_f64(c, {.a = panel,
                       .lda = tile,
                       .b = row,
                       .ldb = size,
                       .c = below,
                       .ldc = size,
                       .rows = rest,
                       .columns = k + 1,
                       .sign = -1,
                       .fresh = k});
  }
}

}  // namespace

void factor(Context& c, const Factor& f) {
  const int64_t n = f.n, size = ceil_div(n, tile) * tile;
  require(n > 0, "factor: H must have columns");
  require(n <= 65535 - tile, "factor: H may have at most 65,000 columns");
  require(f.damping >= 0 && std::isfinite(f.damping), "factor: the damping must be a number of at least 0");
  double* a = c.scratch[slot_matrix].get<double>(size * size);
  double* blocks = c.scratch[slot_blocks].get<double>(2 * size * tile + 1);
  double *panel = blocks + size * tile, *added = panel + size * tile;
  int32_t* flag = clear_findings(c);
  find_non_finite(c, f.h, n * n, not_finite);
  launch<damping_kernel>(c, {dim3(1), dim3(1024)}, f.h, n, f.damping, added);
  launch<diagonal_kernel>(c, per_element(n), f.h, n, added, f.diagonal);
  launch<order_kernel>(c, per_element(n), f.diagonal, n, f.act_order, f.order);
  launch<gather_kernel>(c, rows_of(size, size), f, added, a, size);
  factor_lower(c, a, size, blocks, flag);
  invert_lower(c, a, size, blocks, panel);
  launch<upper_kernel>(c, rows_of(n, n), a, size, n, f.u);
  const int32_t found = read_findings(c);
  if (found & not_finite)
    throw Failure{Status::not_positive_definite,
                  "the Hessian holds NaN or infinity: the calibration activations overflowed, which no damping cures; "
                  "check the model and the calibration data before you raise the damping"};
  if (found)
    throw Failure{Status::not_positive_definite, "the Hessian is not positive definite even with its damping: raise the damping"};
}

}  // namespace eac::cuda
