#include "kernels/cuda/context.cuh"

#include <cstdlib>
#include <string_view>

namespace eac::cuda {
namespace {

__global__ void on_hopper_kernel(int32_t* answer) {
  wait_for_earlier();
  *answer = on_hopper;
}

bool wanted(const char* variable) {
  const char* value = std::getenv(variable);
  return !value || std::string_view(value) != "0";
}

}  // namespace

void find_features(Context& c) {
  int32_t* answer = c.scratch[0].get<int32_t>(1);
  int32_t hopper = 0;
  launch<on_hopper_kernel>(c, {dim3(1), dim3(1)}, answer);
  check(cudaMemcpyAsync(&hopper, answer, sizeof hopper, cudaMemcpyDeviceToHost, c.stream), "opening the GPU");
  check(cudaStreamSynchronize(c.stream), "opening the GPU");
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "opening the GPU");
  c.wgmma = hopper && wanted("EAC_MOE_CUDA_WGMMA");
  c.overlap = hopper && driver >= 12030 && wanted("EAC_MOE_CUDA_OVERLAP");  // before 12.3 graphs could not hold such launches
}

void check(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  const auto kind = status == cudaErrorMemoryAllocation ? Status::out_of_memory : Status::failed;
  throw Failure{kind, std::string(doing) + ": " + cudaGetErrorString(status)};
}

void check_allocation(cudaError_t status, size_t bytes, const char* where) {
  check(status, ("allocating " + std::to_string(bytes) + " bytes " + where).c_str());
}

void Scratch::release() {
  if (!memory_) return;
  check(cudaFree(memory_), "freeing scratch memory");
  memory_ = nullptr, size_ = 0;
  moves_++;
}

void* Scratch::bytes(size_t n) {
  if (n > size_) {
    release();
    check_allocation(cudaMalloc(&memory_, n), n, "of scratch memory on the GPU");
    size_ = n;
    moves_++;
  }
  return memory_;
}

}  // namespace eac::cuda
