// Normalisations of rows. Bound: memory, x read once (again from the caches) and written once; sums in f64.
// Short rows, as of a norm on every head, take a warp each, others a block.
#include <algorithm>

#include "kernels/cuda/context.cuh"

namespace eac::cuda {
namespace {

constexpr int64_t warp_width = 512;  // the longest row of a warp

// V elements from i on; V = 4: at an address aligned to all of them.
template <int V> __device__ __forceinline__ void load(Storage storage, const void* data, int64_t i, float (&v)[V]) {
  if constexpr (V == 4) {
    if (storage == Storage::f32) {
      const float4 f = *reinterpret_cast<const float4*>(static_cast<const float*>(data) + i);
      v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
      return;
    }
  }
  for (int j = 0; j < V; j++) v[j] = load_float(storage, data, i + j);
}

template <bool warp> __device__ __forceinline__ double row_sum(double v, double* shared) {
  if constexpr (warp) return warp_sum(v);
  return block_sum(v, shared);
}

template <bool layer, bool warp, int V> __global__ void norm_kernel(Norm a) {
  wait_for_earlier();
  __shared__ double shared[33];
  const int lanes = warp ? 32 : int(blockDim.x), lane = int(threadIdx.x) % lanes;
  const int64_t row = warp ? global_thread() / 32 : int64_t(blockIdx.x), step = int64_t(lanes) * V;
  if (row >= a.rows) return;
  const float* x = a.x + row * a.width;
  float *y = a.out + row * a.width, v[V], w[V], b[V];
  double mean = 0, sum = 0;
  if constexpr (layer) {
    for (int64_t i = int64_t(lane) * V; i < a.width; i += step) {
      load<V>(Storage::f32, x, i, v);
      for (int j = 0; j < V; j++) mean += v[j];
    }
    mean = row_sum<warp>(mean, shared) / double(a.width);
  }
  for (int64_t i = int64_t(lane) * V; i < a.width; i += step) {
    load<V>(Storage::f32, x, i, v);
    for (int j = 0; j < V; j++) sum += (v[j] - mean) * (v[j] - mean);
  }
  const float r = float(1 / sqrt(row_sum<warp>(sum, shared) / double(a.width) + double(a.eps))), m = float(mean);
  for (int64_t i = int64_t(lane) * V; i < a.width; i += step) {
    load<V>(Storage::f32, x, i, v);
    load<V>(a.storage, a.weight, i, w);
    if constexpr (layer) load<V>(a.storage, a.bias, i, b);
    for (int j = 0; j < V; j++) v[j] = layer ? (v[j] - m) * r * w[j] + b[j] : v[j] * r * w[j];
    if constexpr (V == 4)
      *reinterpret_cast<float4*>(y + i) = make_float4(v[0], v[1], v[2], v[3]);
    else
      y[i] = v[0];
  }
}

template <bool layer, bool warp> void run(Context& c, const Norm& a, const Grid& grid) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool vectors = a.width % 4 == 0 && aligned(a.x) && aligned(a.out) && aligned(a.weight) && (!layer || aligned(a.bias));
  if (vectors)
    launch<norm_kernel<layer, warp, 4>>(c, grid, a);
  else
    launch<norm_kernel<layer, warp, 1>>(c, grid, a);
}

}  // namespace

void norm(Context& c, const Norm& a) {
  require(a.width > 0, "a norm needs channels");
  if (a.width <= warp_width) {
    const Grid grid{dim3(unsigned(ceil_div<int64_t>(a.rows, 8))), dim3(256)};
    return a.bias ? run<true, true>(c, a, grid) : run<false, true>(c, a, grid);
  }
  // Few rows: each as fast as it can be.
  const int64_t most = a.rows < 4 * c.multiprocessors ? 1024 : 256;
  const int64_t threads = std::min(most, ceil_div<int64_t>(a.width, 4 * 32) * 32);
  const Grid grid{dim3(unsigned(a.rows)), dim3(unsigned(threads))};
  a.bias ? run<true, false>(c, a, grid) : run<false, false>(c, a, grid);
}

}  // namespace eac::cuda
