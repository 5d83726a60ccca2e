#include "kernels/cuda/quant/calibration.cuh"

namespace eac::cuda {
namespace {

__global__ void find_non_finite_kernel(const float* x, int64_t n, int32_t bit, int32_t* findings) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i < n && !is_finite(x[i])) atomicOr(findings, bit);
}

int32_t* findings(Context& c) { return c.scratch[slot_findings].get<int32_t>(1); }

}  // namespace

int32_t* clear_findings(Context& c) {
  check(cudaMemsetAsync(findings(c), 0, sizeof(int32_t), c.stream), "clearing memory of the GPU");
  return findings(c);
}

int32_t read_findings(Context& c) {
  int32_t found = 0;
  check(cudaMemcpyAsync(&found, findings(c), sizeof found, cudaMemcpyDeviceToHost, c.stream), "copying from the GPU");
  check(cudaStreamSynchronize(c.stream), "running on the GPU");
  return found;
}

void find_non_finite(Context& c, const float* x, int64_t n, int32_t bit) {
  launch<find_non_finite_kernel>(c, per_element(n), x, n, bit, findings(c));
}

}  // namespace eac::cuda
