#include <cmath>

#include "core/thread_pool.h"
#include "kernels/nn/attention.h"

namespace eac {

void rope(float* x, int64_t width, const std::vector<Sequence>& sequences, const Rope& r) {
  const int64_t heads = width / r.head_dim;
  for (const Sequence& s : sequences) {
    const bool use_long = r.long_from > 0 && s.position + s.length > r.long_from;
    const std::vector<float>& frequencies = use_long ? r.long_frequencies : r.frequencies;
    const float scale = use_long ? r.long_scale : r.scale;
    const int64_t half = int64_t(frequencies.size());
    const int64_t step = r.interleaved ? 2 : 1, other = r.interleaved ? 1 : half;
    parallel_for(s.length, [&](int64_t t) {
      float* row = x + (s.begin + t) * width;
      for (int64_t i = 0; i < half; i++) {
        const float angle = float(s.position + t) * frequencies[size_t(i)];
        const float c = std::cos(angle) * scale, sn = std::sin(angle) * scale;
        for (int64_t h = 0; h < heads; h++) {
          float* a = row + h * r.head_dim + r.offset + i * step;
          const float lo = a[0], hi = a[other];
          a[0] = lo * c - hi * sn;
          a[other] = lo * sn + hi * c;
        }
      }
    });
  }
}

}  // namespace eac
