// Working memory that a thread keeps between calls, so that kernels allocate nothing in the steady state.
#pragma once
#include <cstdint>
#include <cstdlib>

#include "core/error.h"

namespace eac {

class Scratch {
  void* raw_ = nullptr;
  size_t size_ = 0;

 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(raw_); }

  // At least n elements of T, aligned to a cache line. The contents of an earlier call are lost.
  template <class T> T* get(int64_t n) {
    const size_t bytes = size_t(n) * sizeof(T) + 64;
    if (bytes > size_) {
      std::free(raw_);
      size_ = 0;
      raw_ = std::malloc(bytes);
      if (!raw_) throw Error("OUT_OF_MEMORY", "cannot allocate " + std::to_string(bytes) + " bytes");
      size_ = bytes;
    }
    return (T*)((uintptr_t(raw_) + 63) / 64 * 64);
  }
};

}  // namespace eac
