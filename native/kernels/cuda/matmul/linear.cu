// Linear layers: which kernel multiplies.
//
// METHOD      Few rows: weights are streamed (stream_linear.cu for codes, gemv.cu for dense ones); the bound is their memory. Many rows: tiles on the
//             tensor cores (tiles.cu; f32 and f16 weights on the CUDA cores, scalar.cu), the inputs split into bf16 planes before.
#include "kernels/cuda/matmul/linear.cuh"

#include <algorithm>

namespace eac::cuda {
namespace {

constexpr int64_t most_rows = 16384;  // at a time: bounds the scratch memory

__global__ void add_slices_kernel(const float* parts, int64_t slices, int64_t n, bool add, float* out) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i >= n) return;
  float sum = add ? out[i] : 0.f;
#pragma unroll 8
  for (int64_t s = 0; s < slices; s++) sum += parts[s * n + i];
  out[i] = sum;
}

// Where the parts of an output go: into scratch memory, if there are several.
struct Parts {
  const Linear& l;
  int64_t slices;
  float* out;

  Parts(Context& c, const Linear& l, int64_t slices)
      : l(l), slices(slices), out(slices > 1 ? c.scratch[2].get<float>(slices * l.n * l.weight.rows) : l.out) {}
  bool add() const { return l.add && slices == 1; }
  void add_up(Context& c) const {
    const int64_t n = l.n * l.weight.rows;
    if (slices > 1) launch<add_slices_kernel>(c, per_element(n), (const float*)out, slices, n, l.add, l.out);
  }
};

void multiply_few(Context& c, const Linear& l) {
  l.weight.storage == Storage::quantized ? multiply_few_quantized(c, l) : multiply_few_dense(c, l);
}

void multiply_many(Context& c, const Linear& l) {
  Product p{};
  p.role = Role::plain, p.path = path_of(l.weight), p.weight = l.weight;
  p.tile_rows = tile_rows_for(c, p.path != Path::scalar, l.n);
  p.n = l.n, p.cols = l.weight.cols, p.channels = l.weight.rows;
  p.bias_storage = l.bias_storage, p.bias = l.bias;
  p.slices = tile_slices(c, p, l.n);
  const Parts parts(c, l, p.slices);
  p.out = parts.out, p.slice_stride = l.n * l.weight.rows, p.add = parts.add();
  if (p.path == Path::scalar)
    p.x = l.x, p.x_stride = l.weight.cols;
  else
    p.in = split_planes(c, 0, l.x, l.n, l.weight.cols, l.precision, Order::channels);
  multiply_product(c, p, l.n);
  parts.add_up(c);
}

}  // namespace

void linear(Context& c, const Linear& all) {
  if (all.weight.rows == 0) return;
  for (int64_t first = 0; first < all.n; first += most_rows) {
    Linear l = all;
    l.n = std::min(most_rows, all.n - first);
    l.x += first * l.weight.cols, l.out += first * l.weight.rows;
    l.n <= few_rows ? multiply_few(c, l) : multiply_many(c, l);
  }
}

}  // namespace eac::cuda
