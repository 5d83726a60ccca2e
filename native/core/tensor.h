// A row-major array in native memory. Copies share the data: `owner` keeps the buffer or the mapped file alive.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "core/device.h"
#include "core/dtype.h"
#include "core/error.h"

namespace eac {

// Zero-filled memory aligned to a cache line. Large buffers are pages of their own: zeroing costs nothing until they are touched, and
// they go back to the system when they are freed, where the heap would keep many (a layer's leftovers while the next is at work).
inline std::shared_ptr<void> allocate_bytes(size_t bytes) {
  constexpr size_t align = 64, large = size_t(1) << 18;
  if (bytes >= large) {
    void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages != MAP_FAILED) return std::shared_ptr<void>(pages, [bytes](void* p) { munmap(p, bytes); });
  }
  const size_t size = (bytes + align - 1) / align * align + align;
  void* raw = std::calloc(1, size);
  if (!raw) throw Error("OUT_OF_MEMORY", "cannot allocate " + std::to_string(bytes) + " bytes");
  void* aligned = (void*)((uintptr_t(raw) + align - 1) / align * align);
  return std::shared_ptr<void>(aligned, [raw](void*) { std::free(raw); });
}

struct Tensor {
  DType dtype = DType::f32;
  std::vector<int64_t> shape;
  void* data = nullptr;
  std::shared_ptr<void> owner;
  Device* device = nullptr;  // null: the host

  static Tensor zeros(DType dtype, std::vector<int64_t> shape, Device* device = nullptr) {
    Tensor t{dtype, std::move(shape), nullptr, nullptr, device};
    t.owner = device ? device->allocate(t.bytes()) : allocate_bytes(t.bytes());
    t.data = t.owner.get();
    return t;
  }
  // The same values in the host's memory: this tensor, or a copy.
  Tensor on_host() const {
    if (!device) return *this;
    Tensor t = zeros(dtype, shape);
    device->to_host(t.data, data, bytes());
    return t;
  }

  int64_t size() const {
    int64_t n = 1;
    for (int64_t d : shape) n *= d;
    return n;
  }
  size_t bytes() const { return size_t(size()) * dtype_size(dtype); }
  // As a matrix: the last dimension is the row, the others count rows.
  int64_t cols() const { return shape.empty() ? 1 : shape.back(); }
  int64_t rows() const { return cols() ? size() / cols() : 0; }

  template <class T> T* as() const { return static_cast<T*>(data); }
  float* f32() const { return as<float>(); }
  int32_t* i32() const { return as<int32_t>(); }

  // Rows [begin, end) of the matrix view, sharing the data.
  Tensor row_range(int64_t begin, int64_t end) const {
    return {dtype, {end - begin, cols()}, as<char>() + size_t(begin * cols()) * dtype_size(dtype), owner, device};
  }
};

// Element i of a float tensor as f32 / f64, whatever its storage. For edges and references, not for inner loops.
inline double element(const Tensor& t, int64_t i) {
  switch (t.dtype) {
    case DType::f32: return t.f32()[i];
    case DType::f64: return t.as<double>()[i];
    case DType::f16: return f16_to_f32(t.as<uint16_t>()[i]);
    case DType::bf16: return bf16_to_f32(t.as<uint16_t>()[i]);
    case DType::i32: return t.i32()[i];
    case DType::u8: return t.as<uint8_t>()[i];
  }
  return 0;
}
// All of them.
inline std::vector<float> elements(const Tensor& t) {
  std::vector<float> v(size_t(t.size()));
  for (size_t i = 0; i < v.size(); i++) v[i] = float(element(t, int64_t(i)));
  return v;
}

}  // namespace eac
