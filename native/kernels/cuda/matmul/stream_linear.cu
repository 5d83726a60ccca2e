// Quantized weights times at most 8 rows: one launch, inputs as they are, where rows of weights are whole pairs of units.
//
// METHOD      stream_warp.cuh. Where channels are few a block has only 16 of them and all of its warps share their units: a matrix of 2048 channels
//             is 128 blocks, whose codes are all under way at once. Else 64, with inputs split before.
// BOUND       Memory: codes and params once; below some megabytes the latency of one access.
#include "kernels/cuda/matmul/linear.cuh"
#include "kernels/cuda/matmul/stream_warp.cuh"

namespace eac::cuda {
namespace {

// in: of Wide.
template <class Layout, int tiles, bool exact>
__global__ __launch_bounds__(stream_threads, tiles == 1 ? 3 : 2) void linear_kernel(Linear l, Planes in) {
  constexpr bool narrow = std::is_same_v<Layout, Narrow>;
  const int64_t cols = l.weight.cols, first = int64_t(blockIdx.x) * Layout::channels;
  const int lane = threadIdx.x % 32;
  const Job j{l.weight, int(first / unit_rows) + Layout::half() * Layout::panels, 0, int(units_of(int(cols)))};
  float totals[Layout::panels][tiles][4] = {};
  // A thread's results: what is added to them is read ahead.
  constexpr int each = int(ceil_div<int64_t>(Layout::channels * few_rows, stream_threads)),
                half_channels = Layout::channels / Layout::halves;
  float before[each] = {};
  const auto for_results = [&](auto f) {
#pragma unroll
    for (int r = 0; r < each; r++) {
      const int i = int(threadIdx.x) + r * stream_threads, row = i / Layout::channels, k = i % Layout::channels;
      const int64_t channel = first + k;
      if (row < l.n && channel < l.weight.rows) f(row, k, channel, l.out[row * l.weight.rows + channel], before[r]);
    }
  };
  const auto begin = [&] {
    for_results([&](int, int, int64_t channel, float& out, float& v) {
      if (l.bias) v = load_float(l.bias_storage, l.bias, channel);
      if (l.add) v += out;
    });
  };
  if constexpr (narrow)
    multiply<Layout>(j, FloatInputs<tiles, exact>(l.x, cols, l.n, lane), totals, begin);
  else
    multiply<Layout>(j, PlaneInputs<tiles, exact>(in, 0, l.n, lane), totals, begin);
  const Results<Layout>& results = results_of<Layout, exact>(totals);
  for_results(
      [&](int row, int k, int64_t, float& out, float v) { out = v + results.get(k / half_channels, k % half_channels, row); });
}

template <class Layout> void launch_layout(Context& c, const Linear& l, const Planes& in) {
  const Grid grid = Layout::grid(dim3(unsigned(ceil_div<int64_t>(l.weight.rows, Layout::channels))));
  with_tiles(l.precision == Precision::exact, l.n,
             [&]<int tiles, bool exact>() { launch<linear_kernel<Layout, tiles, exact>>(c, grid, l, in); });
}

}  // namespace

void multiply_few_quantized(Context& c, const Linear& l) {
  const bool floats = l.weight.cols % (pair_units * unit_cols) == 0 && uintptr_t(l.x) % sizeof(float2) == 0;
  if (floats && l.weight.rows < 2 * c.multiprocessors * Wide::channels)
    launch_layout<Narrow>(c, l, {});
  else
    launch_layout<Wide>(c, l, split_planes(c, 0, l.x, l.n, l.weight.cols, l.precision, Order::lanes));
}

}  // namespace eac::cuda
