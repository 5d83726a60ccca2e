#include "kernels/moe/experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/thread_pool.h"
#include "kernels/matmul/gemm.h"

namespace eac {
namespace {

constexpr int64_t row_block = 256;      // rows of an expert in one tile: weights are unpacked once for that many
constexpr int64_t channel_block = 128;  // output channels of one tile

struct Tile {
  int32_t expert;
  int64_t row, rows;  // pairs [row, row + rows)
  int64_t channel, channels;
};

void sort_pairs(const int32_t* indices, int64_t slots, size_t experts, ExpertsScratch& s) {
  s.offsets.assign(experts + 1, 0);
  for (int64_t i = 0; i < slots; i++) {
    if (indices[i] < 0) continue;
    require(size_t(indices[i]) < experts, "a token chose an expert that does not exist");
    s.offsets[size_t(indices[i]) + 1]++;
  }
  for (size_t e = 0; e < experts; e++) s.offsets[e + 1] += s.offsets[e];
  s.slot_of_pair.resize(size_t(s.offsets[experts]));
  s.pair_of_slot.assign(size_t(slots), -1);
  static thread_local std::vector<int64_t> next;
  next.assign(s.offsets.begin(), s.offsets.end() - 1);
  for (int64_t i = 0; i < slots; i++) {
    if (indices[i] < 0) continue;
    const int64_t pair = next[size_t(indices[i])]++;
    s.slot_of_pair[size_t(pair)] = int32_t(i);
    s.pair_of_slot[size_t(i)] = pair;
  }
}

// All tiles of all experts for a product with `channels` outputs; experts with many rows first, so that no thread ends on a big one.
const std::vector<Tile>& tiles_for(const std::vector<int64_t>& offsets, int64_t channels) {
  static thread_local std::vector<Tile> tiles;
  tiles.clear();
  for (size_t e = 0; e + 1 < offsets.size(); e++)
    for (int64_t r = offsets[e]; r < offsets[e + 1]; r += row_block)
      for (int64_t c = 0; c < channels; c += channel_block)
        tiles.push_back({int32_t(e), r, std::min(row_block, offsets[e + 1] - r), c, std::min(channel_block, channels - c)});
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) { return a.rows > b.rows; });
  return tiles;
}

template <class F> void for_tiles(const std::vector<Tile>& tiles, F body) {
  const Tile* list = tiles.data();
  parallel_for(int64_t(tiles.size()), [&](int64_t i) { body(list[i]); });
}

}  // namespace

void run_experts(const float* x, int64_t n, int64_t d, const float* weights, const int32_t* indices, int64_t k,
                 const Experts& experts, float beta, float* out, ExpertsScratch& s) {
  const int64_t f = out_features(experts.gate[0]);
  sort_pairs(indices, n * k, experts.gate.size(), s);
  const int64_t pairs = int64_t(s.slot_of_pair.size());
  s.rows.resize(size_t(pairs * d));
  s.hidden.resize(size_t(pairs * f));
  s.up.resize(size_t(pairs * f));

  parallel_for((pairs + 63) / 64, [&](int64_t task) {
    for (int64_t p = task * 64; p < std::min(pairs, task * 64 + 64); p++)
      std::memcpy(s.rows.data() + p * d, x + s.slot_of_pair[size_t(p)] / k * d, size_t(d) * sizeof(float));
  });
  for_tiles(tiles_for(s.offsets, f), [&](const Tile& t) {
    const float* rows = s.rows.data() + t.row * d;
    float *hidden = s.hidden.data() + t.row * f, *up = s.up.data() + t.row * f;
    linear_serial(rows, d, t.rows, experts.gate[size_t(t.expert)], nullptr, t.channel, t.channel + t.channels, 0, hidden, f);
    linear_serial(rows, d, t.rows, experts.up[size_t(t.expert)], nullptr, t.channel, t.channel + t.channels, 0, up, f);
    for (int64_t r = 0; r < t.rows; r++) glu(experts.activation, hidden + r * f + t.channel, up + r * f + t.channel, t.channels);
  });
  for_tiles(tiles_for(s.offsets, d), [&](const Tile& t) {  // the gathered rows are used up: their memory takes the results
    linear_serial(s.hidden.data() + t.row * f, f, t.rows, experts.down[size_t(t.expert)], nullptr, t.channel,
                  t.channel + t.channels, 0, s.rows.data() + t.row * d, d);
  });
  parallel_for((n + 15) / 16, [&](int64_t task) {
    for (int64_t t = task * 16; t < std::min(n, task * 16 + 16); t++) {
      float* o = out + t * d;
      if (beta == 0) std::memset(o, 0, size_t(d) * sizeof(float));
      for (int64_t slot = t * k; slot < (t + 1) * k; slot++) {
        if (s.pair_of_slot[size_t(slot)] < 0) continue;
        const float* y = s.rows.data() + s.pair_of_slot[size_t(slot)] * d;
        for (int64_t j = 0; j < d; j++) o[j] += weights[slot] * y[j];
      }
    }
  });
}

void run_experts_reference(const float* x, int64_t n, int64_t d, const float* weights, const int32_t* indices, int64_t k,
                           const Experts& experts, float beta, float* out) {
  const int64_t f = out_features(experts.gate[0]);
  std::vector<float> gate(static_cast<size_t>(f)), up(static_cast<size_t>(f)), y(static_cast<size_t>(d));
  for (int64_t t = 0; t < n; t++) {
    std::vector<double> sum(static_cast<size_t>(d), 0);
    for (int64_t slot = t * k; slot < (t + 1) * k; slot++) {
      if (indices[slot] < 0) continue;
      const size_t e = size_t(indices[slot]);
      linear_reference(x + t * d, d, 1, experts.gate[e], nullptr, 0, gate.data(), f);
      linear_reference(x + t * d, d, 1, experts.up[e], nullptr, 0, up.data(), f);
      glu(experts.activation, gate.data(), up.data(), f);
      linear_reference(gate.data(), f, 1, experts.down[e], nullptr, 0, y.data(), d);
      for (int64_t j = 0; j < d; j++) sum[size_t(j)] += double(weights[slot]) * y[size_t(j)];
    }
    for (int64_t j = 0; j < d; j++) out[t * d + j] = float((beta == 0 ? 0.0 : double(out[t * d + j])) + sum[size_t(j)]);
  }
}

}  // namespace eac
