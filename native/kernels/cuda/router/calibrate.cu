// TopK-MSE router calibration by preconditioned conjugate gradients on all rows at once: kernels/router/calibrate.{h,cpp} have the algebra.
//
// An iteration is two products over the tokens, S = X P^T and (m ∘ S)^T X, in split bf16, and two with the preconditioner's factor; iterates and
// the scalars of a row are f64. Rows that are done stay in the products with a direction of zeros. The host reads once an iteration which rows go on.
// Unlike the CPU, rows with few tokens are not solved directly: an iteration for one more row costs nothing here.
//
// BOUND  bytes: X is read, split and read again by each product, 24 bytes an element and iteration: 5.4 ms for 262,144 × 4096 on an H200.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cuda/matmul/gemm.cuh"

namespace eac::cuda {
namespace {

constexpr int threads = 256;
constexpr unsigned loss_blocks = 512;
constexpr double min_preconditioner_damping = 1e-4;  // it only shapes the convergence, so it need not follow a smaller ridge
enum Finding : int32_t { bad_inputs = 1, bad_targets = 2 };

struct Row {
  double lambda, scale, rz, first, best;
};

// By token: norm (n) f64, s (n, E), mask (n, E). By expert: f64 (E, d) v, r, p, best; f32 (E, d) z, y, and p as f32.
struct State {
  double *norm, *partial;
  float* s;
  uint8_t* mask;
  double *v, *r, *p, *best;
  float *z, *y, *direction;
  Row* rows;
  int32_t* active;
  float *gram, *u, *diagonal;
  int32_t* order;
};

// m[t, e]: fewer than k targets of the token are larger, or as large with a smaller e.
__global__ void window_kernel(CalibrateRouter a, uint8_t* mask) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i >= a.n * a.experts) return;
  const float* row = a.targets + i / a.experts * a.experts;
  const int64_t own = i % a.experts;
  int64_t ahead = 0;
  for (int64_t e = 0; e < a.experts; e++) ahead += row[e] > row[own] || (row[e] == row[own] && e < own);
  mask[i] = ahead < a.k;
}

// One warp a token: |x|^2.
__global__ __launch_bounds__(threads) void norm_kernel(CalibrateRouter a, double* norm) {
  wait_for_earlier();
  const int64_t t = global_thread() / 32;
  if (t >= a.n) return;
  double sum = 0;
  for (int64_t j = threadIdx.x % 32; j < a.width; j += 32) sum += double(a.x[t * a.width + j]) * a.x[t * a.width + j];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) norm[t] = sum;
}

// s = m (s or, with targets, targets - s)
__global__ void mask_kernel(CalibrateRouter a, const uint8_t* mask, bool miss, float* s) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i < a.n * a.experts) s[i] = mask[i] ? (miss ? a.targets[i] - s[i] : s[i]) : 0.f;
}

// Sums of squares: a part a block, then one block over these.
__global__ __launch_bounds__(threads) void squares_kernel(const float* s, int64_t n, double* partial) {
  wait_for_earlier();
  __shared__ double shared[33];
  double sum = 0;
  for (int64_t i = global_thread(); i < n; i += int64_t(gridDim.x) * threads) sum += double(s[i]) * s[i];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
__global__ __launch_bounds__(threads) void add_kernel(double* partial, int64_t n) {
  wait_for_earlier();
  __shared__ double shared[33];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += threads) sum += partial[i];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partial[0] = sum;
}

// One block a row from here on. The right-hand side lies in z.
__global__ __launch_bounds__(threads) void start_kernel(CalibrateRouter a, State x) {
  wait_for_earlier();
  __shared__ double shared[33];
  const int64_t e = blockIdx.x, first = e * a.width;
  double energy = 0, squares = 0;
  for (int64_t t = threadIdx.x; t < a.n; t += threads) energy += x.mask[t * a.experts + e] ? x.norm[t] : 0.0;
  energy = block_sum(energy, shared);
  for (int64_t i = first + threadIdx.x; i < first + a.width; i += threads) {
    const double b = x.z[i];
    x.r[i] = b, x.v[i] = x.p[i] = x.best[i] = 0;
    squares += b * b;
  }
  squares = block_sum(squares, shared);
  if (threadIdx.x == 0) {
    x.rows[e] = {a.ridge * fmax(energy / double(a.width), 1e-9), sqrt(squares), 0, 0, 0};
    x.active[e] = squares > 0;
  }
}

// z = r over the norm of its right-hand side: a fixed scale that keeps f32 in range.
__global__ void scale_rows_kernel(CalibrateRouter a, State x) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i >= a.experts * a.width) return;
  const int64_t e = i / a.width;
  x.z[i] = x.active[e] ? float(x.r[i] / x.rows[e].scale) : 0.f;
}

// Keeps the best iterate, ends a row that has converged, and turns the search: p = z + (z . r) / (old z . r) p.
__global__ __launch_bounds__(threads) void direct_kernel(CalibrateRouter a, State x) {
  wait_for_earlier();
  __shared__ double shared[33];
  const int64_t e = blockIdx.x, begin = e * a.width, end = begin + a.width;
  const bool active = x.active[e];
  Row& row = x.rows[e];
  const double first = row.first, best = row.best, before = row.rz;
  double rz = 0;
  for (int64_t i = begin + threadIdx.x; active && i < end; i += threads) rz += double(x.z[i]) * x.r[i];
  rz = block_sum(rz, shared);
  const bool begins = first == 0, better = active && !begins && rz < best;
  const bool goes_on = active && rz > a.tolerance * a.tolerance * (begins ? rz : first);
  const double beta = before > 0 ? rz / before : 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += threads) {
    if (better) x.best[i] = x.v[i];
    if (goes_on) x.p[i] = x.z[i] + beta * x.p[i];
    x.direction[i] = goes_on ? float(x.p[i]) : 0.f;
  }
  if (threadIdx.x > 0 || !active) return;
  if (begins) row.first = rz;
  if (begins || better) row.best = rz;
  row.rz = rz;
  x.active[e] = goes_on;
}

// One step along p; z holds G p without its ridge. A row whose curvature is lost to rounding ends.
__global__ __launch_bounds__(threads) void step_kernel(CalibrateRouter a, State x) {
  wait_for_earlier();
  __shared__ double shared[33];
  const int64_t e = blockIdx.x, begin = e * a.width, end = begin + a.width;
  if (!x.active[e]) return;
  const Row row = x.rows[e];
  double curvature = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += threads) curvature += x.p[i] * (x.z[i] + row.lambda * x.p[i]);
  curvature = block_sum(curvature, shared);
  const double alpha = row.rz / curvature;
  if (!(curvature > 0 && is_finite(alpha))) {
    if (threadIdx.x == 0) x.active[e] = 0;
    return;
  }
  for (int64_t i = begin + threadIdx.x; i < end; i += threads) {
    x.v[i] += alpha * x.p[i];
    x.r[i] -= alpha * (x.z[i] + row.lambda * x.p[i]);
  }
}

__global__ void correct_kernel(CalibrateRouter a, const double* best) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i < a.experts * a.width) a.out[i] = float(a.w[i] + best[i]);
}

// The arrays of a struct, one after the other in one piece of scratch memory. Without memory: counts.
class Pieces {
 public:
  explicit Pieces(char* memory) : memory_(memory) {}
  template <class T> void operator()(T*& array, int64_t n) {
    array = reinterpret_cast<T*>(memory_ + size_);
    size_ += ceil_div<int64_t>(n * int64_t(sizeof(T)), 256) * 256;
  }
  int64_t size() const { return size_; }

 private:
  char* memory_;
  int64_t size_ = 0;
};
template <class F> void place(Scratch& scratch, F arrays) {
  Pieces count(nullptr);
  arrays(count);
  Pieces pieces(scratch.get<char>(count.size()));
  arrays(pieces);
}

class Solver {
 public:
  Solver(Context& c, const CalibrateRouter& a) : c_(c), a_(a) {
    const int64_t all = a.experts * a.width, pairs = a.n * a.experts, d = a.width;
    place(c.scratch[slot_tokens],
          [&](Pieces& p) { p(x_.norm, a.n), p(x_.s, pairs), p(x_.mask, pairs), p(x_.partial, loss_blocks); });
    place(c.scratch[slot_rows], [&](Pieces& p) {
      for (double** f64 : {&x_.v, &x_.r, &x_.p, &x_.best}) p(*f64, all);
      for (float** f32 : {&x_.z, &x_.y, &x_.direction}) p(*f32, all);
      p(x_.rows, a.experts), p(x_.active, a.experts);
    });
    place(c.scratch[slot_gram], [&](Pieces& p) { p(x_.gram, d * d), p(x_.u, d * d), p(x_.diagonal, d), p(x_.order, d); });
  }

  void run() {
    require_finite();
    launch<window_kernel>(c_, per_element(a_.n * a_.experts), a_, x_.mask);
    launch<norm_kernel>(c_, per_element(a_.n * 32), a_, x_.norm);
    a_.loss[0] = miss(a_.w);
    back(x_.z);
    launch<start_kernel>(c_, by_row(), a_, x_);
    factor_inputs();
    *a_.iterations = iterate();
    launch<correct_kernel>(c_, per_element(a_.experts * a_.width), a_, x_.best);
    a_.loss[1] = miss(a_.out);
  }

 private:
  Grid by_row() const { return {dim3(unsigned(a_.experts)), dim3(threads)}; }

  void require_finite() {
    clear_findings(c_);
    find_non_finite(c_, a_.x, a_.n * a_.width, bad_inputs);
    find_non_finite(c_, a_.targets, a_.n * a_.experts, bad_targets);
    const int32_t found = read_findings(c_);
    if (found & bad_inputs) throw Failure{Status::non_finite, "calibrate_router: the router inputs hold NaN or infinity"};
    if (found) throw Failure{Status::non_finite, "calibrate_router: the targets hold NaN or infinity"};
  }

  // s = X P^T, then masked
  void forward(const float* p, bool as_miss) {
    product(c_,
            {.m = a_.n, .n = a_.experts, .k = a_.width, .a = {a_.x, a_.width}, .b = {p, a_.width}, .c = x_.s, .ldc = a_.experts});
    launch<mask_kernel>(c_, per_element(a_.n * a_.experts), a_, x_.mask, as_miss, x_.s);
  }
  // out = s^T X
  void back(float* out) {
    product(c_, {.m = a_.experts,
                 .n = a_.width,
                 .k = a_.n,
                 .a = {x_.s, a_.experts, true},
                 .b = {a_.x, a_.width, true},
                 .c = out,
                 .ldc = a_.width});
  }

  // Leaves m (T - X W^T) in s and gives Eq. 5.
  double miss(const float* w) {
    forward(w, true);
    launch<squares_kernel>(c_, {dim3(loss_blocks), dim3(threads)}, x_.s, a_.n * a_.experts, x_.partial);
    launch<add_kernel>(c_, {dim3(1), dim3(threads)}, x_.partial, int64_t(loss_blocks));
    double sum = 0;
    read(&sum, x_.partial, 1);
    return sum / double(a_.n * a_.k);
  }

  void factor_inputs() {
    check(cudaMemsetAsync(x_.gram, 0, size_t(a_.width * a_.width) * sizeof(float), c_.stream), "clearing memory of the GPU");
    hessian(c_, {a_.x, a_.n, a_.width, nullptr, x_.gram});
    factor(c_, {x_.gram, a_.width, std::max(a_.ridge, min_preconditioner_damping), false, x_.order, x_.diagonal, x_.u});
  }

  // z = r U^T U, then the next direction
  void direct() {
    launch<scale_rows_kernel>(c_, per_element(a_.experts * a_.width), a_, x_);
    const auto times = [&](const float* in, bool transposed, float* out) {
      product(c_, {.m = a_.experts,
                   .n = a_.width,
                   .k = a_.width,
                   .a = {in, a_.width},
                   .b = {x_.u, a_.width, transposed},
                   .c = out,
                   .ldc = a_.width});
    };
    times(x_.z, false, x_.y);
    times(x_.y, true, x_.z);
    launch<direct_kernel>(c_, by_row(), a_, x_);
  }

  bool any_active() {
    std::vector<int32_t> active(static_cast<size_t>(a_.experts));
    read(active.data(), x_.active, active.size());
    return std::any_of(active.begin(), active.end(), [](int32_t on) { return on != 0; });
  }

  int32_t iterate() {
    int32_t iterations = 0;
    for (direct(); any_active() && iterations < a_.max_iterations; iterations++) {
      forward(x_.direction, false);
      back(x_.z);
      launch<step_kernel>(c_, by_row(), a_, x_);
      direct();
    }
    return iterations;
  }

  template <class T> void read(T* to, const T* from, size_t n) {
    check(cudaMemcpyAsync(to, from, n * sizeof(T), cudaMemcpyDeviceToHost, c_.stream), "copying from the GPU");
    check(cudaStreamSynchronize(c_.stream), "running on the GPU");
  }

  Context& c_;
  const CalibrateRouter& a_;
  State x_{};
};

}  // namespace

void calibrate_router(Context& c, const CalibrateRouter& a) {
  require(a.experts > 0 && a.width > 0, "calibrate_router: W (E, d) must not be empty");
  require(a.k >= 1 && a.k <= a.experts, "calibrate_router: k must lie between 1 and the number of experts");
  require(a.ridge >= 0 && std::isfinite(a.ridge), "calibrate_router: the ridge must be a number of at least 0");
  *a.iterations = 0, a.loss[0] = a.loss[1] = 0;
  if (a.n > 0) return Solver(c, a).run();
  check(cudaMemcpyAsync(a.out, a.w, size_t(a.experts * a.width) * sizeof(float), cudaMemcpyDeviceToDevice, c.stream),
        "copying on the GPU");
}

}  // namespace eac::cuda
