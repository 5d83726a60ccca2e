// Splitting activations. Bound: memory, 4 bytes in and 2 or 4 out an element.
#include "kernels/cuda/matmul/planes.cuh"

namespace eac::cuda {
namespace {

__global__ void split_kernel(const float* x, int64_t rows, int64_t cols, Planes p) {
  wait_for_earlier();
  const int64_t i = global_thread(), quads = p.stride / 4;
  if (i < rows * quads) split_quad(x + i / quads * cols, cols, i % quads, p, i / quads);
}

}  // namespace

Planes allocate_planes(Context& c, int scratch, int64_t rows, int64_t cols, Precision precision, Order order) {
  const int64_t stride = plane_stride(cols, order);
  uint16_t* high = c.scratch[scratch].get<uint16_t>(rows * stride);
  uint16_t* low = precision == Precision::exact ? c.scratch[scratch + 1].get<uint16_t>(rows * stride) : nullptr;
  return {high, low, stride, order};
}

Planes split_planes(Context& c, int scratch, const float* x, int64_t rows, int64_t cols, Precision precision, Order order) {
  const Planes p = allocate_planes(c, scratch, rows, cols, precision, order);
  launch<split_kernel>(c, per_element(rows * (p.stride / 4)), x, rows, cols, p);
  return p;
}

}  // namespace eac::cuda
