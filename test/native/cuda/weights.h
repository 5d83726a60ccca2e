// Weights of the CPU kernels on the device, for the checks.
#pragma once
#include <memory>

#include "cuda/check.h"
#include "kernels/matmul/matrix.h"

namespace eac::cuda::check {

// A matrix of the CPU kernels, and the same on the device: dense as it is, quantized packed by pack_weight.
class DeviceMatrix {
 public:
  explicit DeviceMatrix(Matrix m);
  // The same in other memory of the device.
  DeviceMatrix copy() const;
  Matrix host;
  Weight weight{};
  double bytes() const { return double(data_->size() + (params_ ? params_->size() : 0)); }

 private:
  DeviceMatrix() = default;
  std::unique_ptr<Buffer<uint8_t>> data_, params_;
};

// Random: bits 2, 3, 4: quantized, 16: bf16, 17: f16, 32: f32.
Matrix any_matrix(int64_t rows, int64_t cols, int kind, int64_t group_size, bool symmetric, unsigned seed);
std::string kind_name(int kind);
// As fast products see activations.
std::vector<float> rounded(std::vector<float> x);

}  // namespace eac::cuda::check
