// Who computes what in a MoE layer: (token, slot) pairs sorted by expert, and their tiles.
#pragma once
#include <cstdint>
#include <vector>

#include "core/thread_pool.h"

namespace eac {

// Pairs [row, row + rows) of one expert times output channels [channel, channel + channels).
struct Tile {
  int32_t expert;
  int64_t row, rows, channel, channels;
};

class Dispatch {
 public:
  std::vector<int64_t>
      offsets;  // (experts + 2): expert e has the pairs [offsets[e], offsets[e + 1]); the last one is the shared expert
  std::vector<int32_t> token_of_pair;
  std::vector<int64_t> pair_of_slot;  // (n × k); -1: no expert

  // Throws Error("INVALID_ARGUMENT") for an index beyond the experts.
  void sort(const int32_t* indices, int64_t n, int64_t k, size_t experts, bool shared);
  int64_t pairs() const { return offsets.back(); }
  int64_t routed() const { return offsets[offsets.size() - 2]; }

  // Calls body(tile, next) for all tiles of at most row_block × channel_block on the pool; experts with many pairs first, so that no thread
  // ends on a big one. channels(expert): the outputs of the product. `next`: the tile that the thread
  // will probably do after this one, or null.
  template <class Channels, class Body> void for_tiles(int64_t row_block, int64_t channel_block, Channels channels, Body body) {
    tiles_.clear();
    for (size_t e = 0; e + 1 < offsets.size(); e++)
      if (offsets[e] < offsets[e + 1]) cut(int32_t(e), row_block, channel_block, channels(e));
    order();
    const Tile* list = tiles_.data();
    const int64_t count = int64_t(tiles_.size()), threads = thread_count();
    parallel_for(count, [&](int64_t i) { body(list[i], i + threads < count ? &list[i + threads] : nullptr); });
  }

 private:
  std::vector<Tile> tiles_;
  std::vector<int64_t> next_;
  void cut(int32_t expert, int64_t row_block, int64_t channel_block, int64_t channels);
  void order();
};

}  // namespace eac
