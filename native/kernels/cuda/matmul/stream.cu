// See stream.cuh.
//
// METHOD      stream_warp.cuh. A block has 64 channels (32 of gate and up each), half of its warps each half of them; four warps share the units
//             of two panels.
// BOUND       Memory: codes and params once. Under way are 4 to 6 KB a warp, 24 warps an SM.
#include "kernels/cuda/matmul/stream_warp.cuh"

#include <algorithm>

namespace eac::cuda {
namespace {

// Blocks of gate_up: up to the end of the last pair of units, whose padding they write.
int hidden_blocks(int64_t channels) { return int(plane_stride(channels, Order::lanes) / (Wide::channels / 2)); }

// What a block computes: slice `part` of `parts` of the channels behind `channel`.
struct Spot {
  int place, channel, slice, part, parts;
};
template <Role role> __device__ __forceinline__ Spot spot_of(const Stream& s) {
  const uint32_t b = blockIdx.x, slice = blockIdx.y;
  if (role == Role::gate_up) {
    // The shared expert is first: which it is, is known.
    const uint32_t behind = b - s.shared_blocks, place = behind / uint32_t(s.blocks);
    if (b < uint32_t(s.shared_blocks)) return {s.places, int(b) * (Wide::channels / 2), 0, 0, 1};
    return {int(place), int(behind - place * s.blocks) * (Wide::channels / 2), 0, 0, 1};
  }
  const int place = min(int(slice / uint32_t(s.slices)), s.places);
  return {place, int(b) * Wide::channels, int(slice), int(slice) - place * s.slices,
          place == s.places ? s.shared_slices : s.slices};
}
// Null: none is there. All lanes of a warp must call.
__device__ __forceinline__ const Expert* expert_of(const Stream& s, const Spot& at) {
  const int expert = at.place == s.places ? s.choice.experts : expert_at(s.choice, at.place);
  return expert < 0 ? nullptr : s.list + expert;
}
template <Role role> __device__ __forceinline__ Job job_of(const Spot& at, const Expert* e) {
  const int half = Wide::half();
  const Weight& w = role == Role::down ? e->down : half ? e->up : e->gate;
  const int units = int((uint32_t(w.cols) + unit_cols - 1) / unit_cols);
  if (role == Role::gate_up) return {w, at.channel / unit_rows, 0, units};
  const uint32_t pairs = (units + pair_units - 1) / pair_units, parts = at.parts;
  return {w, at.channel / unit_rows + half * Wide::panels, int(pairs * at.part / parts) * pair_units,
          min(int(pairs * (at.part + 1) / parts) * pair_units, units)};
}

// factors: of the place, a token each.
__device__ __forceinline__ void store_hidden(const Stream& s, const Spot& at, const Results<Wide>& r, const float* factors) {
  constexpr int width = Wide::channels / 2;
  const Expert* expert = s.biases ? expert_of(s, at) : nullptr;
  const int channels = at.place < s.places ? s.channels : s.shared_channels;
  for (int i = threadIdx.x; i < width * s.n; i += stream_threads) {
    const int row = i / width, k = i % width;
    const int channel = at.channel + k;
    const float factor = factors[row];
    float v = 0;  // also the padding, and what no token chose
    if (channel < channels && factor != 0) {
      const float gate = r.get(0, k, row) + (expert && expert->gate_bias ? expert->gate_bias[channel] : 0.f);
      const float up = r.get(1, k, row) + (expert && expert->up_bias ? expert->up_bias[channel] : 0.f);
      v = glu_value(s.activation, gate, up) * factor;
    }
    store_split(s.hidden, int64_t(at.place) * s.n + row, channel, v);
  }
}

__device__ __forceinline__ void store_out(const Stream& s, const Spot& at, const Results<Wide>& r) {
  for (int i = threadIdx.x; i < Wide::channels * s.n; i += stream_threads) {
    const int row = i / Wide::channels, k = i % Wide::channels;
    const int channel = at.channel + k;
    if (channel >= s.channels) continue;
    s.out[int64_t(at.slice * s.n + row) * s.channels + channel] = r.get(k / (Wide::channels / 2), k % (Wide::channels / 2), row);
  }
}

template <Role role, int tiles, bool exact>
__global__ __launch_bounds__(stream_threads, tiles == 1 ? 3 : 2) void stream_kernel(Stream s) {
  __shared__ float factors[few_rows];
  float totals[Wide::panels][tiles][4] = {};
  {
    const Spot at = spot_of<role>(s);
    if (role == Role::gate_up && s.shared && at.place < s.places) wait_for_earlier();  // the choice may not have been made yet
    const Expert* expert = expert_of(s, at);
    if (!expert) return wait_for_earlier();
    const int64_t row = role == Role::down ? int64_t(at.place) * s.n : 0;
    multiply<Wide>(job_of<role>(at, expert), PlaneInputs<tiles, exact>(s.in, row, s.n, threadIdx.x % 32), totals, [&] {
      if (role == Role::gate_up && int(threadIdx.x) < s.n) factors[threadIdx.x] = s.factor[at.place * s.n + threadIdx.x];
    });
  }
  const Results<Wide>& results = results_of<Wide, exact>(totals);
  const Spot at = spot_of<role>(s);  // once more, rather than in registers meanwhile
  if (role == Role::gate_up)
    store_hidden(s, at, results, factors);
  else
    store_out(s, at, results);
}

template <Role role> void launch_role(Context& c, const Grid& grid, const Stream& s) {
  with_tiles(s.in.low, s.n, [&]<int tiles, bool exact>() { launch<stream_kernel<role, tiles, exact>>(c, grid, s); });
}

}  // namespace

int stream_slices(const Context& c, int64_t products, int64_t channels, int64_t cols) {
  const int64_t blocks = products * ceil_div<int64_t>(channels, Wide::channels), wanted = 3 * c.multiprocessors / blocks;
  return int(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, units_of(cols) / Wide::step)));
}

void multiply_stream(Context& c, const Stream& stream) {
  Stream s = stream;
  s.blocks = hidden_blocks(s.channels), s.shared_blocks = s.shared ? hidden_blocks(s.shared_channels) : 0;
  if (s.role == Role::gate_up)
    return launch_role<Role::gate_up>(c, Wide::grid(dim3(unsigned(s.places * s.blocks + s.shared_blocks))), s);
  const unsigned slices = unsigned(s.places * s.slices + (s.shared ? s.shared_slices : 0));
  launch_role<Role::down>(c, Wide::grid(dim3(unsigned(ceil_div(s.channels, Wide::channels)), slices)), s);
}

}  // namespace eac::cuda
