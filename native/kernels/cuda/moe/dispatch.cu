// Sorting tokens by expert. Bound: latency; a block an expert looks at all slots, which the L2 holds.
#include "kernels/cuda/moe/dispatch.cuh"

#include <algorithm>

namespace eac::cuda {
namespace {

constexpr int threads = 256, each = 4;  // slots that a thread looks at at a time

// The sum over the threads before this one, and over all. `shared`: a value a warp. All threads must call.
__device__ int sum_before(int v, int* shared, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = v;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();  // what an earlier call left has been read
  if (lane == 31) shared[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < threads / 32; w++) {
    if (w < warp) before += shared[w];
    total += shared[w];
  }
  return before + sum - v;
}

// Block e: how many slots chose expert e.
__global__ __launch_bounds__(threads) void count_kernel(Experts e, int32_t* counts) {
  wait_for_earlier();
  __shared__ int shared[33];
  int count = 0;
  for (int64_t i = threadIdx.x; i < e.n * e.top_k; i += threads) count += e.indices[i] == int32_t(blockIdx.x);
  count = block_sum(count, shared);
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

// Block e: the pairs of expert e. The last block: the shared expert's, and the slots without a pair.
__global__ __launch_bounds__(threads) void place_kernel(Experts e, const int32_t* counts, int tile_rows, Dispatch d) {
  wait_for_earlier();
  __shared__ int shared[33];
  const int expert = int(blockIdx.x), experts = int(e.experts);
  const int64_t slots = e.n * e.top_k;
  int pairs = 0, tiles = 0;
  for (int i = threadIdx.x; i < expert; i += threads) pairs += counts[i], tiles += (counts[i] + tile_rows - 1) / tile_rows;
  pairs = block_sum(pairs, shared), tiles = block_sum(tiles, shared);
  if (threadIdx.x == 0) d.begin[expert] = pairs, d.first_tile[expert] = tiles;
  if (expert == experts) {
    const int shared_rows = e.shared ? int(e.n) : 0;
    if (threadIdx.x == 0)
      d.begin[experts + 1] = pairs + shared_rows, d.first_tile[experts + 1] = tiles + (shared_rows + tile_rows - 1) / tile_rows;
    for (int i = threadIdx.x; i < shared_rows; i += threads) d.tokens[pairs + i] = i;
    for (int64_t i = threadIdx.x; i < slots; i += threads)
      if (uint32_t(e.indices[i]) >= uint32_t(experts)) d.pair_of_slot[i] = -1;
    return;
  }
  for (int64_t first = 0; first < slots; first += threads * each) {
    const int64_t at = first + threadIdx.x * each;
    bool mine[each];
    int count = 0, total;
    for (int i = 0; i < each; i++) count += mine[i] = at + i < slots && e.indices[at + i] == expert;
    int pair = pairs + sum_before(count, shared, total);
    pairs += total;
    for (int i = 0; i < each; i++)
      if (mine[i]) d.tokens[pair] = int32_t((at + i) / e.top_k), d.pair_of_slot[at + i] = pair++;
  }
}

// A warp: the output gate times token `token`.
__device__ float gate_product(const Experts& e, int64_t token) {
  float sum = 0;
  for (int64_t k = threadIdx.x % 32; k < e.width; k += 32)
    sum += load_float(e.output_gate.storage, e.output_gate.data, k) * e.x[token * e.width + k];
  return warp_sum(sum);
}

__device__ void put_shared_factor(const Experts& e, int64_t token, float* factor) {
  const float factor_of_token = e.output_gate.data ? 1 / (1 + __expf(-gate_product(e, token))) : 1.f;
  if (threadIdx.x % 32 == 0) factor[token] = factor_of_token;
}

__global__ __launch_bounds__(threads) void shared_factors_kernel(Experts e, float* factor) {
  wait_for_earlier();
  const int64_t token = int64_t(blockIdx.x) * (threads / 32) + threadIdx.x / 32;
  if (token < e.n) put_shared_factor(e, token, factor);
}

// The last block: the chosen experts. The others: inputs into planes.
__global__ __launch_bounds__(threads) void choose_kernel(Experts e, Planes in, int most, int32_t* chosen, float* factor) {
  wait_for_earlier();
  __shared__ int shared[33];
  __shared__ int32_t indices[most_slots];
  const int64_t slots = e.n * e.top_k, quads = in.stride / 4, i = global_thread();
  if (blockIdx.x + 1 < gridDim.x) {
    if (i < e.n * quads) split_quad(e.x + i / quads * e.width, e.width, i % quads, in, i / quads);
    return;
  }
  for (int64_t s = threadIdx.x; s < slots; s += threads) indices[s] = e.indices[s];
  if (e.shared)
    for (int64_t t = threadIdx.x / 32; t < e.n; t += threads / 32) put_shared_factor(e, t, factor + most * e.n);
  __syncthreads();
  int count = 0;
  for (int64_t first = 0; first < e.experts; first += threads) {
    const int64_t expert = first + threadIdx.x;
    bool is_chosen = false;
    for (int s = 0; s < slots && expert < e.experts; s++) is_chosen |= indices[s] == int32_t(expert);
    int total;
    const int at = count + sum_before(is_chosen, shared, total);
    count += total;
    if (!is_chosen) continue;
    chosen[1 + at] = int32_t(expert);
    for (int64_t t = 0; t < e.n; t++) {
      float sum = 0;
      for (int64_t j = 0; j < e.top_k; j++)
        if (indices[t * e.top_k + j] == int32_t(expert)) sum += e.weights[t * e.top_k + j];
      factor[at * e.n + t] = sum;
    }
  }
  if (threadIdx.x == 0) chosen[0] = count;
}

}  // namespace

Dispatch sort_pairs(Context& c, const Experts& e, int tile_rows) {
  const int64_t slots = e.n * e.top_k, experts = e.experts;
  int32_t* memory = c.scratch[2].get<int32_t>(3 * (experts + 2) + 2 * slots + (e.shared ? e.n : 0));
  const Dispatch d{memory + (experts + 2), memory + 2 * (experts + 2), memory + 3 * (experts + 2) + slots,
                   memory + 3 * (experts + 2)};
  launch<count_kernel>(c, {dim3(unsigned(experts)), dim3(threads)}, e, memory);
  launch<place_kernel>(c, {dim3(unsigned(experts + 1)), dim3(threads)}, e, (const int32_t*)memory, tile_rows, d);
  return d;
}

Chosen choose(Context& c, const Experts& e) {
  const int64_t most = std::min(e.experts, e.n * e.top_k);
  const Planes in = allocate_planes(c, 0, e.n, e.width, e.precision, Order::lanes);
  int32_t* chosen = c.scratch[2].get<int32_t>(1 + most);
  float* factor = c.scratch[3].get<float>((most + 1) * e.n);
  const int64_t blocks = ceil_div<int64_t>(e.n * (in.stride / 4), threads) + 1;
  launch<choose_kernel>(c, {dim3(unsigned(blocks)), dim3(threads)}, e, in, int(most), chosen, factor);
  return {chosen, factor, most, in};
}

void shared_factors(Context& c, const Experts& e, float* factor) {
  launch<shared_factors_kernel>(c, {dim3(unsigned(ceil_div<int64_t>(e.n, threads / 32))), dim3(threads)}, e, factor);
}

}  // namespace eac::cuda
