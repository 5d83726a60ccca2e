// Working memory that a thread keeps between calls, so that kernels allocate nothing in the steady state.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#include "core/error.h"

namespace eac {

class Scratch {
  void* raw_ = nullptr;
  size_t size_ = 0;

  // Packed operands are read from end to end again and again: in large pages that costs no page walks.
  void grow(size_t bytes) {
    constexpr size_t large_page = size_t(1) << 21;
    std::free(raw_);
    size_ = 0;
    if (bytes >= large_page) bytes = (bytes + large_page - 1) / large_page * large_page;
    raw_ = bytes >= large_page ? std::aligned_alloc(large_page, bytes) : std::malloc(bytes);
    if (!raw_) throw Error("OUT_OF_MEMORY", "cannot allocate " + std::to_string(bytes) + " bytes");
#ifdef MADV_HUGEPAGE
    if (bytes >= large_page) madvise(raw_, bytes, MADV_HUGEPAGE);
#endif
    size_ = bytes;
  }

 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(raw_); }

  // At least n elements of T, aligned to a cache line. The contents of an earlier call are lost.
  template <class T> T* get(int64_t n) {
    const size_t bytes = size_t(n) * sizeof(T) + 64;
    if (bytes > size_) grow(bytes);
    return (T*)((uintptr_t(raw_) + 63) / 64 * 64);
  }
};

}  // namespace eac
