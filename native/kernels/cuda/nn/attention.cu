// Attention: keys and values go into the caches, one of three kernels attends, and split results are merged.
#include "kernels/cuda/nn/attention.cuh"

#include <algorithm>
#include <cmath>

namespace eac::cuda {
namespace {

// 4 channels a thread.
__global__ void append_kernel(Attention a) {
  wait_for_earlier();
  const int64_t i = global_thread() * 4, key_width = a.kv_heads * a.head_dim, value_width = a.kv_heads * a.value_dim;
  const int64_t row = i / (key_width + value_width);
  if (row >= a.batch.rows) return;
  int64_t column = i % (key_width + value_width);
  const int64_t s = a.batch.sequence[row], position = a.batch.position[row];
  if (!a.keys[s]) return;
  const bool key = column < key_width;
  const int64_t width = key ? key_width : value_width;
  column -= key ? 0 : key_width;
  const float* from = (key ? a.k : a.v) + row * width + column;
  *reinterpret_cast<float4*>((key ? a.keys[s] : a.values[s]) + position * width + column) =
      *reinterpret_cast<const float4*>(from);
}

constexpr int merge_threads = 256, most_splits = 256;

// A block a row and head: threads take 4 channels of every groups-th split, and the groups are added up in their order.
__global__ void merge_kernel(Attend p) {
  wait_for_earlier();
  __shared__ float weight[most_splits], part_max[merge_threads / 32], part_sum[merge_threads / 32];
  __shared__ float4 results[merge_threads];
  const Attention& a = p.a;
  const int64_t row = blockIdx.x, all = a.batch.rows * a.heads;
  const int thread = int(threadIdx.x), warp = thread / 32, units = int(a.value_dim / 4), splits = p.part.splits,
            groups = merge_threads / units;
  float max = thread < splits ? p.part.max[thread * all + row] : -INFINITY;
  const float own_max = max;
  max = warp_max(max);
  if (thread % 32 == 0) part_max[warp] = max;
  __syncthreads();
  max = -INFINITY;
  for (int w = 0; w < merge_threads / 32; w++) max = fmaxf(max, part_max[w]);
  const float own = thread < splits ? exp2_below(own_max, max) : 0.f;
  weight[thread] = own;
  const float sums = warp_sum(thread < splits ? p.part.sum[thread * all + row] * own : 0.f);
  if (thread % 32 == 0) part_sum[warp] = sums;
  __syncthreads();
  const int group = thread / units, unit = thread % units;
  float4 r = make_float4(0, 0, 0, 0);
  if (group < groups) {
    const float4* values = reinterpret_cast<const float4*>(p.part.values + row * a.value_dim) + unit;
#pragma unroll 4
    for (int s = group; s < splits; s += groups) {
      const float4 v = values[s * all * units];
      const float w = weight[s];
      r.x += v.x * w, r.y += v.y * w, r.z += v.z * w, r.w += v.w * w;
    }
  }
  results[thread] = r;
  __syncthreads();
  if (thread >= units) return;
  for (int g = 1; g < groups; g++) {
    const float4 v = results[g * units + thread];
    r.x += v.x, r.y += v.y, r.z += v.z, r.w += v.w;
  }
  float sum = 0;
  for (int w = 0; w < merge_threads / 32; w++) sum += part_sum[w];
  const float scale = attention_scale(a, row % a.heads, max, sum);
  reinterpret_cast<float4*>(a.out + row * a.value_dim)[thread] = make_float4(r.x * scale, r.y * scale, r.z * scale, r.w * scale);
}

}  // namespace

Partials split_keys(Context& c, const Attention& a, int64_t groups, int64_t blocks, int64_t span, int64_t step, int64_t least) {
  Partials p{};
  const int64_t most = std::clamp<int64_t>(blocks / std::max<int64_t>(1, groups), 1, most_splits);
  const int64_t wanted = std::clamp<int64_t>(span / least, 1, most);
  p.chunk = int(ceil_div(ceil_div(span, wanted), step) * step);
  p.splits = int(std::max<int64_t>(1, ceil_div<int64_t>(span, p.chunk)));
  if (most == 1) return p;
  // Room for the most, so that a sequence that grows needs no more.
  const int64_t n = most * a.batch.rows * a.heads;
  p.values = c.scratch[0].get<float>(n * (a.value_dim + 2));
  p.max = p.values + n * a.value_dim;
  p.sum = p.max + n;
  return p;
}

Partials split_for_decoding(Context& c, const Attention& a, int64_t blocks, int64_t span, int64_t step) {
  const int64_t groups = a.batch.sequences * a.kv_heads;
  if (groups < blocks) return split_keys(c, a, groups, blocks, span, step, span <= 256 ? 256 : 64);
  return split_keys(c, a, groups, 4 * blocks, span, step, 512);
}

void attention(Context& c, const Attention& a) {
  require(a.kv_heads > 0 && a.heads > 0 && a.heads % a.kv_heads == 0, "the heads are no multiple of the kv heads");
  require(a.head_dim > 0 && a.head_dim % 8 == 0 && a.value_dim > 0 && a.value_dim % 8 == 0 && a.value_dim <= 1024,
          "attention on the GPU takes heads of a multiple of 8 channels, values up to 1024");
  require(!a.keys == !a.values, "a cache has keys and values");
  for (const void* p : {(const void*)a.q, (const void*)a.k, (const void*)a.v, (const void*)a.out})
    require(reinterpret_cast<uintptr_t>(p) % 16 == 0, "attention takes arrays aligned to 16 bytes");
  require(a.batch.sequences <= 65535, "more than 65535 sequences in a batch");
  if (a.batch.rows == 0) return;
  const int64_t width = a.kv_heads * (a.head_dim + a.value_dim);
  if (a.keys) launch<append_kernel>(c, per_element(a.batch.rows * width / 4), a);
  Attend p{a, int(a.heads / a.kv_heads), int(std::clamp<int64_t>(a.window, 0, 0x40000000)), {}};
  p.part.splits = 1;
  const int64_t rows = a.batch.longest * p.heads_per_kv;
  if (rows <= 8 && a.head_dim <= 256 && a.value_dim <= 256)
    attend_few(c, p);
  else if (rows <= 16 && a.head_dim <= 640 && a.value_dim <= 512)
    attend_rows(c, p);
  else
    attend_tiles(c, p);
}

void merge_splits(Context& c, const Attend& p) {
  if (p.part.splits > 1) launch<merge_kernel>(c, Grid{dim3(unsigned(p.a.batch.rows * p.a.heads)), dim3(merge_threads)}, p);
}

}  // namespace eac::cuda
