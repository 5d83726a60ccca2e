// Sorting tokens by expert, and what precedes the products of few tokens. Bound: latency; a block an expert looks at all slots, which the L2 holds.
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

// This thread's share of the output gate times a token, if `lanes` threads share the channels.
template <Storage storage>
__device__ __forceinline__ float gate_share(const void* gate, const float* x, int64_t width, int lane, int lanes) {
  float sum = 0;
#pragma unroll 8
  for (int64_t k = lane; k < width; k += lanes) sum += load_float(storage, gate, k) * x[k];
  return sum;
}
__device__ float gate_share(const Experts& e, int64_t token, int lane, int lanes) {
  const void* gate = e.output_gate.data;
  const float* x = e.x + token * e.width;
  if (e.output_gate.storage == Storage::bf16) return gate_share<Storage::bf16>(gate, x, e.width, lane, lanes);
  if (e.output_gate.storage == Storage::f16) return gate_share<Storage::f16>(gate, x, e.width, lane, lanes);
  return gate_share<Storage::f32>(gate, x, e.width, lane, lanes);
}
__device__ __forceinline__ float sigmoid(float v) { return 1 / (1 + __expf(-v)); }

// A warp a token.
__global__ __launch_bounds__(threads) void shared_factors_kernel(Experts e, float* factor) {
  wait_for_earlier();
  const int64_t token = int64_t(blockIdx.x) * (threads / 32) + threadIdx.x / 32;
  if (token >= e.n) return;
  const float product = e.output_gate.data ? warp_sum(gate_share(e, token, threadIdx.x % 32, 32)) : 0;
  if (threadIdx.x % 32 == 0) factor[token] = e.output_gate.data ? sigmoid(product) : 1;
}

// blockIdx.y 0: inputs into planes; 1: the shared expert's factors, a block a token; 2: the places, a warp each.
__global__ __launch_bounds__(threads) void prepare_kernel(Experts e, Choice choice, Planes in, int places, int32_t* experts,
                                                          float* factor) {
  wait_for_earlier();
  if (blockIdx.y == 0) {
    const int64_t quads = in.stride / 4, i = global_thread();
    if (i < e.n * quads) split_quad(e.x + i / quads * e.width, e.width, i % quads, in, i / quads);
  } else if (blockIdx.y == 1) {
    __shared__ float shared[33];
    const int64_t token = blockIdx.x;
    if (!e.shared || token >= e.n) return;
    const float product = e.output_gate.data ? block_sum(gate_share(e, token, threadIdx.x, threads), shared) : 0;
    if (threadIdx.x == 0) factor[places * e.n + token] = e.output_gate.data ? sigmoid(product) : 1;
  } else {
    const int place = int(blockIdx.x) * (threads / 32) + int(threadIdx.x) / 32;
    if (place >= places) return;
    const int expert = expert_at(choice, place);
    for (int64_t t = threadIdx.x % 32; t < e.n; t += 32) {
      float sum = 0;
      for (int64_t j = t * e.top_k; j < (t + 1) * e.top_k; j++)
        if (expert >= 0 && e.indices[j] == expert) sum += e.weights[j];
      factor[place * e.n + t] = sum;
    }
    if (threadIdx.x % 32 == 0) experts[place] = expert;
  }
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

Prepared prepare(Context& c, const Experts& e, const Choice& choice) {
  const int64_t places = choice.places();
  const Planes in = allocate_planes(c, 0, e.n, e.width, e.precision, Order::lanes);
  int32_t* experts = c.scratch[2].get<int32_t>(places);
  float* factor = c.scratch[3].get<float>((places + 1) * e.n);
  const int64_t blocks =
      std::max({ceil_div<int64_t>(e.n * (in.stride / 4), threads), e.n, ceil_div<int64_t>(places, threads / 32)});
  launch<prepare_kernel>(c, {dim3(unsigned(blocks), 3), dim3(threads)}, e, choice, in, int(places), experts, factor);
  return {experts, factor, in};
}

void shared_factors(Context& c, const Experts& e, float* factor) {
  launch<shared_factors_kernel>(c, {dim3(unsigned(ceil_div<int64_t>(e.n, threads / 32))), dim3(threads)}, e, factor);
}

}  // namespace eac::cuda
