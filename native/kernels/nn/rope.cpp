#include "core/thread_pool.h"
#include "kernels/cpu/isa.h"
#include "kernels/nn/attention.h"

namespace eac {

void rope(float* x, int64_t width, const std::vector<Sequence>& sequences, const Rope& r) {
  for (const Sequence& s : sequences) {
    const bool use_long = r.long_from > 0 && s.position + s.length > r.long_from;
    const std::vector<float>& frequencies = use_long ? r.long_frequencies : r.frequencies;
    const float scale = use_long ? r.long_scale : r.scale;
    parallel_rows(s.length, 8, [&](int64_t t) {
      isa().rotate(x + (s.begin + t) * width + r.offset, width / r.head_dim, r.head_dim, frequencies.data(),
                   int64_t(frequencies.size()), float(s.position + t), scale, r.interleaved);
    });
  }
}

}  // namespace eac
