// The weights of a program in the GPU's memory.
#pragma once
#include <map>
#include <mutex>

#include "kernels/matmul/matrix.h"
#include "program/cuda/staging.h"
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
  const Expert* list = nullptr;  // null: staged
};
struct PreparedProgram {
  std::vector<Prepared> ops;
  std::unique_ptr<Staging> staging;  // null: all weights lie on the device
};

// Weights are copied to the device once, however many programs use them, and freed with the last.
class Weights {
 public:
  explicit Weights(Gpu& gpu) : gpu_(gpu) {}
  // limit: bytes that weights may take of the device's memory; 0: what is free, but for a twentieth of all. Experts beyond it are staged, the last
  // layers' first. Throws Error("OUT_OF_MEMORY") that says how much the program needs at least. A program is prepared once: the first call decides.
  std::shared_ptr<const PreparedProgram> prepare(const Program& program, size_t limit = 0);

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
  static Key key_of(const Matrix& m);
  std::shared_ptr<const DeviceMatrix> matrix(const Matrix& m);
  // The device's copy, if there is one.
  std::shared_ptr<const DeviceMatrix> find(const Matrix& m) const;
  DeviceMatrix copy(const Matrix& m);
  // Which operations' experts do not fit. `first`: see first_with.
  std::vector<bool> choose_staged(const Program& program, const std::vector<size_t>& first, size_t limit) const;
  // By operation, the first one that has the same experts; its own number where it has none.
  static std::vector<size_t> first_with(const Program& program);
  HostExperts to_host(const eac::Experts& e, size_t op);

  Gpu& gpu_;
  std::mutex mutex_;
  std::map<Key, Entry> entries_;
};

}  // namespace eac::cuda
