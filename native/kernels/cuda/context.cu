#include "kernels/cuda/context.cuh"

namespace eac::cuda {

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
