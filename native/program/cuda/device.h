// The first GPU: its memory, and streams to work on.
#pragma once
#include <mutex>

#include "core/tensor.h"
#include "program/cuda/library.h"

namespace eac::cuda {

// As which the library knows stored floats.
inline Storage storage_of(DType dtype) {
  return dtype == DType::f16 ? Storage::f16 : dtype == DType::bf16 ? Storage::bf16 : Storage::f32;
}

// A context of the library; its functions as methods that throw.
class Stream {
 public:
  explicit Stream(const Table& table);
  ~Stream();
  Stream(const Stream&) = delete;
  const Table& table() const { return table_; }
  Context* context() const { return context_; }
  void operator()(Status status) const { check(table_, context_, status); }
  void synchronize() const { (*this)(table_.synchronize(context_)); }
  void upload(void* to, const void* from, size_t bytes) const { (*this)(table_.upload(context_, to, from, bytes)); }

 private:
  const Table& table_;
  Context* context_ = nullptr;
};

class Gpu : public Device {
 public:
  explicit Gpu(const Table& table) : stream_(table) {}
  const char* name() const override { return "cuda"; }
  std::shared_ptr<void> allocate(size_t bytes) override;
  // The same with any contents: for what is written before it is read.
  std::shared_ptr<void> room(size_t bytes);
  void to_host(void* host, const void* device, size_t bytes) override;
  void from_host(void* device, const void* host, size_t bytes) override;
  void copy(void* to, const void* from, size_t bytes) override;

  const Table& table() const { return stream_.table(); }
  // Throws what the driver says, where an error has made the GPU useless to this process.
  DeviceInfo info();
  // Gives back what the operations of calibration worked with. Done by itself where memory runs out.
  void trim();
  // Runs body(stream) alone on the device's own stream, and waits, also where it throws.
  template <class F> void run(F&& body) {
    const std::lock_guard lock(mutex_);
    try {
      body(static_cast<const Stream&>(stream_));
    } catch (...) {
      table().synchronize(stream_.context());
      throw;
    }
    stream_.synchronize();
  }
  // A copy in the device's memory of any tensor, or the tensor itself if it lies there.
  Tensor take(const Tensor& t);
  template <class T> std::shared_ptr<T> upload(const std::vector<T>& v) {
    auto memory = room(v.size() * sizeof(T));
    from_host(memory.get(), v.data(), v.size() * sizeof(T));
    return std::static_pointer_cast<T>(memory);
  }

 private:
  Stream stream_;
  std::mutex mutex_;
};

// Opened on the first call that can. Throws as library() does, and DEVICE or OUT_OF_MEMORY where the GPU cannot be opened now: the next call tries again.
Gpu& gpu();

}  // namespace eac::cuda
