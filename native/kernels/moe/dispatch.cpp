#include "kernels/moe/dispatch.h"

#include <algorithm>

#include "core/error.h"

namespace eac {

void Dispatch::sort(const int32_t* indices, int64_t n, int64_t k, size_t experts, bool shared) {
  offsets.assign(experts + 2, 0);
  for (int64_t i = 0; i < n * k; i++) {
    if (indices[i] < 0) continue;
    require(size_t(indices[i]) < experts, "a token chose an expert that does not exist");
    offsets[size_t(indices[i]) + 1]++;
  }
  for (size_t e = 0; e < experts; e++) offsets[e + 1] += offsets[e];
  offsets[experts + 1] = offsets[experts] + (shared ? n : 0);
  token_of_pair.resize(size_t(pairs()));
  pair_of_slot.assign(size_t(n * k), -1);
  next_.assign(offsets.begin(), offsets.end() - 1);
  for (int64_t i = 0; i < n * k; i++) {
    if (indices[i] < 0) continue;
    const int64_t pair = next_[size_t(indices[i])]++;
    token_of_pair[size_t(pair)] = int32_t(i / k);
    pair_of_slot[size_t(i)] = pair;
  }
  for (int64_t t = 0; shared && t < n; t++) token_of_pair[size_t(routed() + t)] = int32_t(t);
}

void Dispatch::cut(int32_t expert, int64_t row_block, int64_t channel_block, int64_t channels) {
  const int64_t begin = offsets[size_t(expert)], end = offsets[size_t(expert) + 1];
  for (int64_t r = begin; r < end; r += row_block)
    for (int64_t c = 0; c < channels; c += channel_block)
      tiles_.push_back({expert, r, std::min(row_block, end - r), c, std::min(channel_block, channels - c)});
}

void Dispatch::order() {
  // Equal tiles keep their places: threads then walk through an expert's weights as they lie in memory.
  const auto later = [](const Tile& a, const Tile& b) {
    if (a.rows != b.rows) return a.rows > b.rows;
    if (a.row != b.row) return a.row < b.row;
    return a.channel < b.channel;
  };
  std::sort(tiles_.begin(), tiles_.end(), later);
}

}  // namespace eac
