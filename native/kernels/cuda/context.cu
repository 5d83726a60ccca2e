#include "kernels/cuda/context.cuh"

namespace eac::cuda {

void check(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  const auto kind = status == cudaErrorMemoryAllocation ? Status::out_of_memory : Status::failed;
  throw Failure{kind, std::string(doing) + ": " + cudaGetErrorString(status)};
}

void* Scratch::bytes(size_t n) {
  if (n > size_) {
    check(cudaFree(memory_), "freeing scratch memory");
    memory_ = nullptr, size_ = 0;
    const cudaError_t status = cudaMalloc(&memory_, n);
    if (status != cudaSuccess) {
      (void)cudaGetLastError();  // memory may suffice for less: the error must not stay
      check(status, ("allocating " + std::to_string(n) + " bytes of scratch memory on the GPU").c_str());
    }
    size_ = n;
    moves_++;
  }
  return memory_;
}

}  // namespace eac::cuda
