// Rotary embedding, in place. Bound: memory, each turning channel read and written once. A thread turns one pair of channels in some heads, which
// share its angle.
#include "kernels/cuda/context.cuh"

namespace eac::cuda {
namespace {

__global__ void rope_kernel(Rope r, int64_t heads, int64_t heads_per_thread) {
  wait_for_earlier();
  const int64_t thread = global_thread(), row = thread / r.pairs, i = thread % r.pairs;
  if (row >= r.batch.rows) return;
  const int64_t first = int64_t(blockIdx.y) * heads_per_thread, s = r.batch.sequence[row], begin = r.batch.begin[s];
  const int64_t end = r.batch.position[begin] + r.batch.length[s];
  const bool use_long = r.long_from > 0 && end > r.long_from;
  const float angle = float(r.batch.position[row]) * (use_long ? r.long_frequencies : r.frequencies)[i];
  const float scale = use_long ? r.long_scale : r.scale;
  float sine, cosine;
  sincosf(angle, &sine, &cosine);
  sine *= scale, cosine *= scale;
  float* x = r.x + row * r.width + r.offset + (r.interleaved ? 2 * i : i);
  const int64_t other = r.interleaved ? 1 : r.pairs;
  for (int64_t h = first; h < heads && h < first + heads_per_thread; h++) {
    float* a = x + h * r.head_dim;
    const float low = a[0], high = a[other];
    a[0] = low * cosine - high * sine;
    a[other] = low * sine + high * cosine;
  }
}

}  // namespace

void rope(Context& c, const Rope& r) {
  require(r.head_dim > 0 && r.width % r.head_dim == 0, "the width is no multiple of a head's");
  require(r.offset + 2 * r.pairs <= r.head_dim, "a head has fewer channels than turn");
  require(r.long_from <= 0 || r.long_frequencies, "long sequences need frequencies of their own");
  if (r.pairs == 0 || r.batch.rows == 0) return;
  const int64_t heads = r.width / r.head_dim, heads_per_thread = r.batch.rows < 64 ? 1 : 8;
  Grid grid = per_element(r.batch.rows * r.pairs);
  grid.blocks.y = unsigned(ceil_div(heads, heads_per_thread));
  launch<rope_kernel>(c, grid, r, heads, heads_per_thread);
}

}  // namespace eac::cuda
