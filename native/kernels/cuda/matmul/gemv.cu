// Dense weights times at most 8 rows, in f32: decoding, the router's logits, the head of the vocabulary.
//
// METHOD      A warp has 4 channels (2 of 8 rows): every lane reads 16 bytes of each, and the rows' inputs, which stay in the L1, serve all. A sum over
//             the lanes ends it. Where channels are few a block's warps share one instead.
// BOUND       Memory: the weights once. At least 64 bytes a lane are under way at a time, 32 KB an SM at 16 warps.
#include "kernels/cuda/matmul/linear.cuh"

namespace eac::cuda {
namespace {

constexpr int warps = 4;

// 16 bytes of weights as floats.
template <Storage s> struct Vector {
  static constexpr int size = s == Storage::f32 ? 4 : 8;
  __device__ __forceinline__ static void expand(uint4 v, float (&w)[size]) {
    const uint32_t word[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 4; i++) {
      if constexpr (s == Storage::f32)
        w[i] = __uint_as_float(word[i]);
      else if constexpr (s == Storage::bf16)
        w[2 * i] = bf16_low(word[i]), w[2 * i + 1] = bf16_high(word[i]);
      else
        w[2 * i] = half_to_float(uint16_t(word[i])), w[2 * i + 1] = half_to_float(uint16_t(word[i] >> 16));
    }
  }
};

__device__ __forceinline__ void store(const Linear& l, int64_t row, int64_t channel, float v) {
  if (l.bias) v += load_float(l.bias_storage, l.bias, channel);
  float* to = l.out + row * l.weight.rows + channel;
  *to = l.add ? *to + v : v;
}

// rows: as many as l.n or more. channels: of a warp, or (1) of a block. aligned: rows of x and of the weight begin at multiples of 16 bytes.
// Blocks that must fit an SM: few, which leaves registers for all loads of an iteration. Left alone, ptxas waits for the first of them to save some.
template <Storage s, int rows, int channels, bool aligned>
__global__ __launch_bounds__(warps * 32, rows == 8 ? 5 : 4) void gemv_kernel(Linear l) {
  wait_for_earlier();
  using V = Vector<s>;
  constexpr int element = s == Storage::f32 ? 4 : 2;
  constexpr bool split = channels == 1;
  __shared__ float parts[warps][rows];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, thread = split ? int(threadIdx.x) : lane;
  const int64_t cols = l.weight.cols, first = split ? blockIdx.x : (int64_t(blockIdx.x) * warps + warp) * channels;
  if (first >= l.weight.rows) return;
  const unsigned char* w[channels];  // channels and rows beyond the last repeat it, in vain
  for (int i = 0; i < channels; i++)
    w[i] = static_cast<const unsigned char*>(l.weight.data) + min(first + i, l.weight.rows - 1) * cols * element;
  const auto x = [&](int t) { return l.x + min(int64_t(t), l.n - 1) * cols; };
  float sums[rows][channels] = {};
  if constexpr (aligned) {
#pragma unroll(rows* channels > 4 ? 1 : rows > 2 ? 2 : 4)
    for (int64_t k = thread * V::size; k < cols; k += (split ? warps : 1) * 32 * V::size) {
      uint4 packed[channels];
#pragma unroll
      for (int i = 0; i < channels; i++) packed[i] = load_once(reinterpret_cast<const uint4*>(w[i] + k * element));
      float weight[channels][V::size];
#pragma unroll
      for (int i = 0; i < channels; i++) V::expand(packed[i], weight[i]);
#pragma unroll
      for (int t = 0; t < rows; t++)
#pragma unroll
        for (int v = 0; v < V::size; v += 4) {
          const float4 in = *reinterpret_cast<const float4*>(x(t) + k + v);
#pragma unroll
          for (int i = 0; i < channels; i++)
            sums[t][i] += weight[i][v] * in.x + weight[i][v + 1] * in.y + weight[i][v + 2] * in.z + weight[i][v + 3] * in.w;
        }
    }
  } else {
    for (int64_t k = thread; k < cols; k += (split ? warps : 1) * 32)
      for (int t = 0; t < rows; t++)
        for (int i = 0; i < channels; i++) sums[t][i] += load_float(s, w[i], k) * x(t)[k];
  }
#pragma unroll
  for (int t = 0; t < rows; t++)
#pragma unroll
    for (int i = 0; i < channels; i++) {
      sums[t][i] = warp_sum(sums[t][i]);
      if (split && lane == 0) parts[warp][t] = sums[t][i];
      if (!split && lane == (t * channels + i) % 32 && t < l.n && first + i < l.weight.rows) store(l, t, first + i, sums[t][i]);
    }
  if constexpr (split) {
    __syncthreads();
    if (threadIdx.x < l.n)
      store(l, threadIdx.x, first, parts[0][threadIdx.x] + parts[1][threadIdx.x] + parts[2][threadIdx.x] + parts[3][threadIdx.x]);
  }
}

template <Storage s, int rows> void launch_rows(Context& c, const Linear& l) {
  const int64_t vector = s == Storage::f32 ? 4 : 8;
  const bool aligned = l.weight.cols % vector == 0 && (uintptr_t(l.weight.data) | uintptr_t(l.x)) % 16 == 0;
  constexpr int channels = rows == 8 ? 2 : 4;  // by the registers there are
  const int64_t blocks = ceil_div<int64_t>(l.weight.rows, channels * warps);
  if (blocks < 4 * c.multiprocessors) {
    const Grid grid{dim3(unsigned(l.weight.rows)), dim3(warps * 32)};
    aligned ? launch<gemv_kernel<s, rows, 1, true>>(c, grid, l) : launch<gemv_kernel<s, rows, 1, false>>(c, grid, l);
  } else {
    const Grid grid{dim3(unsigned(blocks)), dim3(warps * 32)};
    aligned ? launch<gemv_kernel<s, rows, channels, true>>(c, grid, l)
            : launch<gemv_kernel<s, rows, channels, false>>(c, grid, l);
  }
}

template <Storage s> void launch_storage(Context& c, const Linear& l) {
  if (l.n == 1) return launch_rows<s, 1>(c, l);
  if (l.n == 2) return launch_rows<s, 2>(c, l);
  l.n <= 4 ? launch_rows<s, 4>(c, l) : launch_rows<s, 8>(c, l);
}

}  // namespace

void multiply_few_dense(Context& c, const Linear& l) {
  if (l.weight.storage == Storage::f32) launch_storage<Storage::f32>(c, l);
  if (l.weight.storage == Storage::f16) launch_storage<Storage::f16>(c, l);
  if (l.weight.storage == Storage::bf16) launch_storage<Storage::bf16>(c, l);
}

}  // namespace eac::cuda
