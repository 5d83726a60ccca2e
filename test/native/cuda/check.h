// What the checks of the CUDA library share: memory on the device, comparison with a reference, and a table of the results.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/cuda/table.h"

namespace eac::cuda::check {

// The device under test.
class Device {
 public:
  Device();
  ~Device();
  const Table& table;
  Context* context = nullptr;
  DeviceInfo info{};
  // Runs f, and on Hopper once more as GPUs before it would: without wgmma, each launch after the last. `path` is for names.
  void each_path(const std::function<void(const std::string& path)>& f);
  bool emulated() const { return std::string(info.name) == "emulation"; }
  // Leave out what takes long: under emulation or compute-sanitizer.
  bool slow() const { return emulated() || std::getenv("EAC_MOE_TEST_SMALL"); }

  // Throws std::runtime_error with the library's message.
  void operator()(Status status) const;
  void synchronize() const { (*this)(table.synchronize(context)); }

 private:
  Context* before_hopper_ = nullptr;
};
Device& device();

// An array on the device: from the host, or filled with NaN (every byte 0xff), so that what a kernel does not write shows.
template <class T> class Buffer {
 public:
  explicit Buffer(size_t n) : n_(n) {
    allocate();
    const std::vector<unsigned char> poison(n * sizeof(T), 0xff);
    device()(device().table.upload(device().context, memory_, poison.data(), poison.size()));
  }
  explicit Buffer(const std::vector<T>& v) : n_(v.size()) {
    allocate();
    device()(device().table.upload(device().context, memory_, v.data(), v.size() * sizeof(T)));
  }
  Buffer(const Buffer&) = delete;
  Buffer(Buffer&& o) noexcept : memory_(o.memory_), n_(o.n_) { o.memory_ = nullptr; }
  ~Buffer() {
    if (memory_) device().table.free(memory_);
  }
  T* data() const { return static_cast<T*>(memory_); }
  operator T*() const { return data(); }
  size_t size() const { return n_; }
  // The same values in other memory.
  Buffer copy() const {
    Buffer b(n_, Unfilled{});
    device()(device().table.copy(device().context, b.memory_, memory_, n_ * sizeof(T)));
    return b;
  }
  std::vector<T> read() const {
    std::vector<T> v(n_);
    device()(device().table.download(device().context, v.data(), memory_, n_ * sizeof(T)));
    return v;
  }

 private:
  struct Unfilled {};
  Buffer(size_t n, Unfilled) : n_(n) { allocate(); }
  void allocate() { device()(device().table.allocate(device().context, (n_ + 1) * sizeof(T), &memory_)); }
  void* memory_ = nullptr;
  size_t n_;
};

// A Batch on the device from the lengths of its sequences and the position of each one's first row.
class Sequences {
 public:
  Sequences(const std::vector<int32_t>& lengths, const std::vector<int32_t>& starts);
  Batch batch{};
  std::vector<int32_t> row_sequence, row_position, begin, length;

 private:
  std::vector<Buffer<int32_t>> memory_;
};

std::vector<float> normal(size_t n, unsigned seed, float scale = 1);
// The same million over and over: for arrays that are only timed.
std::vector<float> repeated_normal(int64_t n, unsigned seed);

// |got - want| <= tolerance * (1 + |want|) for every element, none NaN. Adds a line to the table.
void close(const std::string& name, const std::vector<float>& got, const std::vector<double>& want, double tolerance);
template <class T> void equal(const std::string& name, const std::vector<T>& got, const std::vector<T>& want);
void report(const std::string& name, bool ok, const std::string& what);
template <class T> void equal(const std::string& name, const std::vector<T>& got, const std::vector<T>& want) {
  size_t i = 0;
  while (i < want.size() && i < got.size() && got[i] == want[i]) i++;
  const bool ok = i == want.size() && got.size() == want.size();
  report(name, ok, ok ? "equal" : "element " + std::to_string(i) + " differs");
}

// A file's checks: correctness on random shapes, and figures on a real device. `const Group group("name", check, time);` at its end.
struct Group {
  Group(const char* name, void (*check)(), void (*time)());
};

}  // namespace eac::cuda::check
