// The sequences of a batch and their key-value caches.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "core/tensor.h"

namespace eac {

// Keys and values of one sequence, layer by layer, in blocks of kv_block tokens whose layout is the attention's that uses them
// (attention.cpp; kernels/cuda/table.h). Capacity doubles when it runs out.
inline constexpr int64_t kv_block = 128;

class KvCache {
 public:
  struct Widths {
    int64_t key, value;
  };
  explicit KvCache(std::vector<Widths> widths, Device* device = nullptr)
      : device(device), widths_(std::move(widths)), keys_(widths_.size()), values_(widths_.size()) {}

  Device* const device;         // null: the host
  int64_t length = 0;           // tokens that count; those beyond are scratch of the batch in flight
  const void* frame = nullptr;  // whose batch is in flight: from its begin() to its commit(), or its next begin()

  size_t layers() const { return widths_.size(); }
  Widths widths(size_t layer) const { return widths_[layer]; }
  float* keys(size_t layer) const { return keys_[layer].f32(); }
  float* values(size_t layer) const { return values_[layer].f32(); }

  // Room for `tokens` tokens.
  void reserve(int64_t tokens) {
    if (tokens <= capacity_) return;
    const int64_t wanted = (std::max(tokens, 2 * capacity_) + kv_block - 1) / kv_block * kv_block;
    for (size_t l = 0; l < layers(); l++) {
      keys_[l] = grown(keys_[l], wanted, widths_[l].key);
      values_[l] = grown(values_[l], wanted, widths_[l].value);
    }
    capacity_ = wanted;
  }
  size_t bytes() const {
    size_t n = 0;
    for (const Widths& w : widths_) n += size_t(capacity_ * (w.key + w.value)) * sizeof(float);
    return n;
  }

 private:
  Tensor grown(const Tensor& old, int64_t tokens, int64_t width) const {
    Tensor t = Tensor::zeros(DType::f32, {tokens + kv_padding, width}, device);
    const size_t used = size_t((length + kv_block - 1) / kv_block * kv_block * width) * sizeof(float);
    if (used > 0 && device)
      device->copy(t.data, old.data, used);
    else if (used > 0)
      std::memcpy(t.data, old.data, used);
    return t;
  }
  static constexpr int64_t kv_padding = 64;  // vectors may be read from the last token on
  std::vector<Widths> widths_;
  std::vector<Tensor> keys_, values_;
  int64_t capacity_ = 0;
};

// Rows [begin, begin + length) of the batch are this sequence's tokens at positions position, position + 1, ...
struct Sequence {
  int64_t begin = 0, length = 0, position = 0;
  std::shared_ptr<KvCache> cache;  // may be null: the sequence then is its own context
};

}  // namespace eac
