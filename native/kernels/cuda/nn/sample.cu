// Sampling. A row is searched by several blocks for the key (order.cuh) at which a running sum over falling logits reaches what is asked for:
// a histogram of its upper 11 bits, then of the next 11 and of the last 10 among those that agree so far (radix select). The last block to finish
// a histogram walks down its bins. There are up to three searches, each for what it leaves as the next one's total:
//   count   the top_k-th largest;  share   where the probability reaches top_p;  draw   where it passes the uniform number
// and ties in the last are told apart by their ids. Bound: latency; a pass reads the logits, mostly from the L2.
// Weights are integers, exp((logit - largest) / temperature) * 2^bits, so that sums do not depend on their order. What is lost, 2^-44 of the largest
// weight with 2^18 logits, changes an id as seldom as rounding does.
#include "kernels/cuda/context.cuh"
#include "kernels/cuda/nn/order.cuh"

#include <algorithm>
#include <bit>
#include <cmath>

namespace eac::cuda {
namespace {

constexpr int threads = 256, bins = 2048, levels = 3;
using Mass = unsigned long long;

enum Search { count, share, draw };
__host__ __device__ constexpr int shift_of(int level) { return level == 0 ? 21 : level == 1 ? 10 : 0; }

struct Histogram {
  Mass mass[bins];
  uint32_t count[bins];
};
struct Progress {
  Mass top;                  // the largest logit: its key above, the inverse of its id below
  Mass total;                // of the weights that are left
  Mass need, above;          // a search: what is still to be reached below `prefix`, and the weight that lies above
  uint32_t prefix, index;    // the key as far as it is known; of the drawn key's ids, which
  uint32_t finished[8];      // blocks, of each launch
  Histogram first, rest[6];  // of all logits; of each search's later levels
};

struct Job {
  Sample s;
  int64_t chunk;  // logits a block
  int bits;
  Progress* rows;
  uint32_t* matches;  // (rows, blocks)
};

__device__ __forceinline__ uint32_t key_of(float logit) { return ordered(logit == logit ? logit : -INFINITY); }
__device__ __forceinline__ uint32_t top_key(const Progress& p) { return uint32_t(p.top >> 32); }

__device__ Mass weight_of(const Job& j, uint32_t key, uint32_t top) {
  if (key == top) return Mass(1) << j.bits;
  const double x = (double(unordered(key)) - double(unordered(top))) / double(j.s.temperature);
  return x > -46 ? Mass(exp(x) * double(Mass(1) << j.bits) + 0.5) : 0;
}

// Calls f(id, logit) for a block's part of a row. Loads come first, several at a time: nothing is loaded past an atomic operation.
template <class F> __device__ void for_each_logit(const Job& j, int64_t row, int64_t block, F f) {
  constexpr int batch = 8;
  const float* logits = j.s.logits + row * j.s.vocabulary;
  const int64_t end = min(j.s.vocabulary, (block + 1) * j.chunk);
  for (int64_t from = block * j.chunk + threadIdx.x; from < end; from += batch * threads) {
    float v[batch];
#pragma unroll
    for (int i = 0; i < batch; i++)
      if (from + i * threads < end) v[i] = logits[from + i * threads];
#pragma unroll
    for (int i = 0; i < batch; i++)
      if (from + i * threads < end) f(uint32_t(from + i * threads), v[i]);
  }
}

// Whether this is the last of the row's blocks; what the others wrote is then in the L2 (__ldcg). All threads must call.
__device__ bool last_block(uint32_t* finished) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(finished, 1u) == gridDim.x - 1;
  __syncthreads();
  __threadfence();
  return last;
}

// The sum over the threads before this one; `all`: over all of them.
__device__ Mass sum_before(Mass v, Mass* all) {
  __shared__ Mass warps[threads / 32];
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  Mass sum = v;
  for (int step = 1; step < 32; step *= 2) {
    const Mass other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  Mass before = 0, total = 0;
  for (int w = 0; w < threads / 32; w++) {
    if (w < warp) before += warps[w];
    total += warps[w];
  }
  *all = total;
  return before + sum - v;
}

__global__ void largest_kernel(Job j) {
  wait_for_earlier();
  __shared__ Mass warps[threads / 32];
  Progress& p = j.rows[blockIdx.y];
  const bool greedy = j.s.temperature <= 0;
  Mass top = 0;
  for_each_logit(j, blockIdx.y, blockIdx.x,
                 [&](uint32_t id, float logit) { top = max(top, Mass(key_of(logit)) << 32 | (0xffffffffu - id)); });
  top = warp_max(top);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = top;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < threads / 32; w++) top = max(top, warps[w]);
    atomicMax(&p.top, top);
  }
  if (greedy && last_block(p.finished) && threadIdx.x == 0) j.s.ids[blockIdx.y] = int32_t(0xffffffffu - uint32_t(__ldcg(&p.top)));
}

__device__ void start(const Job& j, Progress& p, Search search) {
  const double all = double(p.total);
  const auto within = [&](double v, Mass most) { return v >= double(most) ? most : Mass(v); };
  p.prefix = 0, p.above = 0;
  if (search == count) p.need = Mass(j.s.top_k);
  if (search == share) p.need = max(Mass(1), within(ceil(j.s.top_p * all), p.total));
  if (search == draw) p.need = within(j.s.uniform ? j.s.uniform[blockIdx.y] * all : 0, p.total - 1) + 1;
}

// The bin, from the largest down, in which the sum reaches what is needed. `begins`: the search begins here.
__device__ void descend(const Job& j, Progress& p, const Histogram& h, Search search, int level, bool begins) {
  constexpr int each = bins / threads;
  const int from = bins - 1 - int(threadIdx.x) * each;
  Mass masses[each], mass = 0, number = 0, all, unused;
  uint32_t numbers[each];
#pragma unroll
  for (int i = 0; i < each; i++) masses[i] = __ldcg(&h.mass[from - i]), numbers[i] = __ldcg(&h.count[from - i]);
#pragma unroll
  for (int i = 0; i < each; i++) mass += masses[i], number += numbers[i];
  Mass above = sum_before(mass, &all);
  const Mass more = sum_before(number, &unused);
  if (begins && threadIdx.x == 0) {
    if (p.total == 0) p.total = all;
    start(j, p, search);
  }
  __syncthreads();
  const Mass need = p.need, own = search == count ? number : mass;
  Mass reached = search == count ? more : above;
  __syncthreads();
  if (reached >= need || reached + own < need) return;
#pragma unroll
  for (int i = 0; i < each; i++) {
    const Mass more_here = search == count ? numbers[i] : masses[i];
    if (reached + more_here >= need) {
      p.need = need - reached;
      p.above += above;
      p.prefix |= uint32_t(from - i) << shift_of(level);
      return;
    }
    reached += more_here, above += masses[i];
  }
}

// The key is known: what remains of the total, or which of the ids it is.
__device__ void conclude(const Job& j, Progress& p, Search search) {
  const Mass w = weight_of(j, p.prefix, top_key(p));
  if (search == count) p.total = p.above + p.need * w;
  if (search == share) p.total = p.above + (p.need + w - 1) / w * w;
  if (search == draw) p.index = uint32_t((p.need - 1) / w);
}

// launch: among the launches of the row; next: the search that follows this one, or this one.
__global__ void search_kernel(Job j, Search search, int level, int launch, Search next) {
  wait_for_earlier();
  __shared__ uint32_t number[bins], low[bins], high[bins];
  Progress& p = j.rows[blockIdx.y];
  Histogram& h = level == 0 ? p.first : p.rest[2 * search + level - 1];
  for (int b = int(threadIdx.x); b < bins; b += threads) number[b] = low[b] = high[b] = 0;
  __syncthreads();
  const uint32_t top = top_key(p), prefix = p.prefix;
  for_each_logit(j, blockIdx.y, blockIdx.x, [&](uint32_t, float logit) {
    const uint32_t key = key_of(logit);
    if (level > 0 && (key ^ prefix) >> shift_of(level - 1)) return;
    const uint32_t bin = key >> shift_of(level) & (level == 2 ? 1023 : 2047);
    const Mass w = weight_of(j, key, top);
    atomicAdd(&number[bin], 1u);
    if (w == 0) return;
    const uint32_t before = atomicAdd(&low[bin], uint32_t(w)), carry = before + uint32_t(w) < before;
    if (const uint32_t above = uint32_t(w >> 32) + carry) atomicAdd(&high[bin], above);
  });
  __syncthreads();
  for (int b = int(threadIdx.x); b < bins; b += threads) {
    if (number[b] == 0) continue;
    atomicAdd(&h.count[b], number[b]);
    if (const Mass mass = Mass(high[b]) << 32 | low[b]) atomicAdd(&h.mass[b], mass);
  }
  if (!last_block(&p.finished[launch])) return;
  descend(j, p, h, search, level, level == 0);
  if (level < levels - 1) return;
  __syncthreads();
  if (threadIdx.x == 0) conclude(j, p, search);
  __syncthreads();
  if (next != search) descend(j, p, p.first, next, 0, true);
}

// The index-th id among those with the drawn key.
__global__ void find_kernel(Job j, int launch) {
  wait_for_earlier();
  Progress& p = j.rows[blockIdx.y];
  const uint32_t key = p.prefix;
  uint32_t* matches = j.matches + int64_t(blockIdx.y) * gridDim.x;
  Mass own = 0, all;
  for_each_logit(j, blockIdx.y, blockIdx.x, [&](uint32_t, float logit) { own += key_of(logit) == key; });
  sum_before(own, &all);
  if (threadIdx.x == 0) matches[blockIdx.x] = uint32_t(all);
  if (!last_block(&p.finished[launch])) return;
  if (fabsf(unordered(top_key(p))) == INFINITY) {  // nothing to draw from
    if (threadIdx.x == 0) j.s.ids[blockIdx.y] = int32_t(0xffffffffu - uint32_t(p.top));
    return;
  }
  __shared__ uint32_t found[2];  // the block that it lies in, and which of its ids
  uint32_t left = p.index;
  for (uint32_t first = 0; first < gridDim.x; first += threads) {
    const uint32_t b = first + threadIdx.x, here = b < gridDim.x ? __ldcg(matches + b) : 0;
    const Mass before = sum_before(here, &all);
    if (before <= left && left < before + here) found[0] = b, found[1] = uint32_t(left - before);
    if (left < all) break;
    left -= uint32_t(all);
  }
  __syncthreads();
  const int64_t block = found[0];
  left = found[1];
  const float* logits = j.s.logits + blockIdx.y * j.s.vocabulary;
  const int64_t end = min(j.s.vocabulary, (block + 1) * j.chunk);
  for (int64_t from = block * j.chunk; from < end; from += threads) {
    const int64_t i = from + threadIdx.x;
    const bool match = i < end && key_of(logits[i]) == key;
    const Mass before = sum_before(match, &all);
    if (match && before == left) j.s.ids[blockIdx.y] = int32_t(i);
    if (left < all) return;
    left -= uint32_t(all);
  }
}

}  // namespace

void sample(Context& c, const Sample& s) {
  require(s.vocabulary > 0 && s.vocabulary < int64_t(1) << 31, "a vocabulary has between 1 and 2^31 ids");
  require(s.rows <= 65535, "more than 65535 rows to sample");
  if (s.rows == 0) return;
  Job j{s, 0, 0, nullptr, nullptr};
  const int64_t fair = ceil_div(s.rows * s.vocabulary, int64_t(4) * c.multiprocessors);
  j.chunk = std::max<int64_t>(2048, ceil_div<int64_t>(fair, 8 * threads) * 8 * threads);
  j.bits = std::min(52, 62 - int(std::bit_width(uint64_t(s.vocabulary))));
  j.rows = c.scratch[0].get<Progress>(s.rows);
  const Grid grid{dim3(unsigned(ceil_div(s.vocabulary, j.chunk)), unsigned(s.rows)), dim3(threads)};
  j.matches = c.scratch[1].get<uint32_t>(s.rows * grid.blocks.x);
  check(cudaMemsetAsync(j.rows, 0, size_t(s.rows) * sizeof(Progress), c.stream), "clearing the histograms of sampling");
  launch<largest_kernel>(c, grid, j);
  if (s.temperature <= 0) return;
  Search searches[3];
  int n = 0, launches = 0;
  if (s.top_k > 0 && s.top_k < s.vocabulary) searches[n++] = count;
  if (s.top_p < 1) searches[n++] = share;
  searches[n++] = draw;
  launch<search_kernel>(c, grid, j, searches[0], 0, launches++, searches[0]);
  for (int i = 0; i < n; i++)
    for (int level = 1; level < levels; level++)
      launch<search_kernel>(c, grid, j, searches[i], level, launches++, searches[std::min(i + 1, n - 1)]);
  launch<find_kernel>(c, grid, j, launches);
}

}  // namespace eac::cuda
