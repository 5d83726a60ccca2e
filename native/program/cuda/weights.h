// The weights of a program in the GPU's memory.
#pragma once
#include <map>
#include <mutex>
#include <variant>

#include "kernels/matmul/matrix.h"
#include "program/cuda/device.h"
#include "program/program.h"

namespace eac::cuda {

// A matrix on the device, in the form that the library's products take.
struct DeviceMatrix {
  Weight weight;
  std::shared_ptr<void> data, params;
};
// What an operation needs besides registers, as the library takes it; `keep` holds the memory.
struct Prepared {
  std::vector<std::shared_ptr<const void>> keep;
  Weight weight{}, output_gate{};
  Storage storage = Storage::f32, bias_storage = Storage::f32;
  const void *tensor = nullptr, *bias = nullptr;
  const float *first = nullptr, *second = nullptr;  // frequencies and long frequencies; sinks; correction
  std::vector<Expert> experts;
  const Expert* list = nullptr;
};

// Weights are copied to the device once, however many programs use them, and freed with the last.
class Weights {
 public:
  explicit Weights(Gpu& gpu) : gpu_(gpu) {}
  // One entry an operation. Throws Error("OUT_OF_MEMORY") that says how much the program needs.
  std::shared_ptr<const std::vector<Prepared>> prepare(const Program& program);

 private:
  struct Key {
    const void* data;
    int64_t rows, cols;
    int32_t form;
    auto operator<=>(const Key&) const = default;
  };
  struct Entry {
    std::weak_ptr<const void> source;  // the host's memory: an address may be used again
    std::weak_ptr<const DeviceMatrix> matrix;
  };
  friend struct Preparer;
  std::shared_ptr<const DeviceMatrix> matrix(const Matrix& m);
  std::shared_ptr<const DeviceMatrix> cached(const Key& key, const std::shared_ptr<void>& source, const Matrix& m);
  DeviceMatrix dense(const Tensor& t);
  DeviceMatrix quantized(const QuantMatrix& q);

  Gpu& gpu_;
  std::mutex mutex_;
  std::map<Key, Entry> entries_;
};

}  // namespace eac::cuda
