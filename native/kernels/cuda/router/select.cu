// From router logits to chosen experts, and pruning. A warp a token; its scores lie in shared memory, expert e with lane e % 32.
// Bound: latency, top_k rounds of a scan and two integer reductions; the logits are read once.
// Not-a-number follows the CPU: in a softmax it leaves no expert, in a sigmoid it takes its own expert out, and the sparse mixer, which compares
// logits in their order, takes it where it comes first.
#include "kernels/cuda/context.cuh"
#include "kernels/cuda/nn/order.cuh"

#include <cmath>

namespace eac::cuda {
namespace {

constexpr int warps = 4;                // tokens a block
constexpr int64_t most_experts = 1024;  // 3 floats each, a token: 48 KB a block
constexpr int32_t none = 0x7fffffff;
constexpr uint32_t everyone = 0xffffffffu;

struct Selection {
  const float* logits;
  Router router;
  int64_t rows;
  const int32_t* sequence;
  const uint8_t* keep;  // or null
  float* weights;
  int32_t *indices, *counts;  // counts: or null
};

// What a token of the warp works with.
struct Row {
  const Router& r;
  const float* logits;
  const uint8_t* keep;  // (experts) or null
  float *scores, *choice, *worth;
  int lane;
};

// The largest of v that is not minus infinity, the smaller index among equals; -1: none. `by_order`: if the first is not a number, that.
__device__ int32_t best_of(const float* v, int64_t experts, int lane, bool by_order) {
  uint32_t best = 0;
  int32_t at = none, first = none;
  for (int32_t e = lane; e < experts; e += 32) {
    if (v[e] == -INFINITY) continue;
    first = min(first, e);
    const uint32_t key = v[e] == v[e] ? ordered(v[e]) : 0;
    if (key > best) best = key, at = e;
  }
  const uint32_t top = __reduce_max_sync(everyone, best);
  at = __reduce_min_sync(everyone, best == top ? at : none);
  if (by_order) {
    first = __reduce_min_sync(everyone, first);
    if (first != none && v[first] != v[first]) return first;
  }
  return at == none ? -1 : at;
}

__device__ void score(const Row& w) {
  const Router& r = w.r;
  if (r.scoring == Scoring::softmax) {
    float max = -INFINITY, sum = 0;
    for (int64_t e = w.lane; e < r.experts; e += 32) max = fmaxf(max, w.logits[e]);
    max = warp_max(max);
    for (int64_t e = w.lane; e < r.experts; e += 32) sum += w.scores[e] = expf(w.logits[e] - max);
    sum = warp_sum(sum);
    for (int64_t e = w.lane; e < r.experts; e += 32) w.scores[e] /= sum;
  } else {
    for (int64_t e = w.lane; e < r.experts; e += 32) w.scores[e] = 1 / (1 + expf(-w.logits[e]));
  }
  for (int64_t e = w.lane; e < r.experts; e += 32) {
    const float by = w.scores[e] + (r.correction ? r.correction[e] : 0.f);
    w.choice[e] = (!w.keep || w.keep[e]) && by == by ? by : -INFINITY;
  }
  __syncwarp();
}

// Takes the experts of all but the best groups out of the choice; ties to the smaller group.
__device__ void limit_groups(const Row& w) {
  const Router& r = w.r;
  const int64_t size = r.experts / r.groups;
  for (int64_t g = w.lane; g < r.groups; g += 32) {
    float best = -INFINITY, second = -INFINITY;
    for (int64_t e = g * size; e < (g + 1) * size; e++)
      if (w.choice[e] > best)
        second = best, best = w.choice[e];
      else
        second = fmaxf(second, w.choice[e]);
    w.worth[g] = r.group_best == 2 && second != -INFINITY ? best + second : best;
  }
  __syncwarp();
  for (int64_t g = w.lane; g < r.groups; g += 32) {
    int64_t rank = 0;
    for (int64_t h = 0; h < r.groups; h++) rank += w.worth[h] > w.worth[g] || (w.worth[h] == w.worth[g] && h < g);
    if (rank >= r.top_groups)
      for (int64_t e = g * size; e < (g + 1) * size; e++) w.choice[e] = -INFINITY;
  }
  __syncwarp();
}

// Lane k gets the k-th choice.
__device__ void top_k(const Row& w, float* weight, int32_t* index) {
  const Router& r = w.r;
  score(w);
  if (r.top_groups < r.groups) limit_groups(w);
  float chosen = 0;
  for (int k = 0; k < r.top_k; k++) {
    const int32_t best = best_of(w.choice, r.experts, w.lane, false);
    if (best < 0) break;
    if (w.lane == k) *index = best, *weight = w.scores[best];
    chosen += w.scores[best];
    __syncwarp();  // all have compared
    if (w.lane == 0) w.choice[best] = -INFINITY;
    __syncwarp();
  }
  *weight *= r.scale / (r.renormalize && chosen > 0 ? chosen : 1.f);
}

__device__ void sparse_mixer(const Row& w, float* weight, int32_t* index) {
  const Router& r = w.r;
  for (int64_t e = w.lane; e < r.experts; e += 32) w.scores[e] = !w.keep || w.keep[e] ? w.logits[e] : -INFINITY;
  __syncwarp();
  for (int k = 0; k < r.top_k; k++) {
    const int32_t best = best_of(w.scores, r.experts, w.lane, true);
    if (best < 0) break;
    const float max = w.scores[best];
    float sum = 0;
    for (int64_t e = w.lane; e < r.experts; e += 32) {
      if (w.scores[e] == -INFINITY) continue;
      const float size = fabsf(w.logits[e]), factor = size < max ? max : size;
      if (!((max - w.logits[e]) / factor > 2 * r.jitter)) sum += expf(w.scores[e] - max);
    }
    sum = warp_sum(sum);
    if (w.lane == k) *index = best, *weight = r.scale / sum;
    __syncwarp();  // all have compared
    if (w.lane == 0) w.scores[best] = -INFINITY;
    __syncwarp();
  }
}

__global__ void select_kernel(Selection s) {
  wait_for_earlier();
  const Router& r = s.router;
  const int64_t row = global_thread() / 32;
  if (row >= s.rows) return;
  const int lane = int(threadIdx.x % 32);
  const int64_t sequence = s.sequence[row];
  float* scores = dynamic_shared<float>() + (threadIdx.x / 32) * 3 * r.experts;
  const Row w{r,      s.logits + row * r.experts, s.keep ? s.keep + sequence * r.experts : nullptr,
              scores, scores + r.experts,         scores + 2 * r.experts,
              lane};
  float weight = 0;
  int32_t index = -1;
  if (r.scoring == Scoring::sparse_mixer)
    sparse_mixer(w, &weight, &index);
  else
    top_k(w, &weight, &index);
  if (lane >= r.top_k) return;
  s.weights[row * r.top_k + lane] = weight;
  s.indices[row * r.top_k + lane] = index;
  if (s.counts && index >= 0) atomicAdd(s.counts + sequence * r.experts + index, 1);
}

__global__ void mask_kernel(Prune p) {
  wait_for_earlier();
  const int64_t row = global_thread(), k = p.router.top_k;
  if (row >= p.batch.rows) return;
  const uint8_t* keep = p.keep + int64_t(p.batch.sequence[row]) * p.router.experts;
  float *weights = p.weights + row * k, before = 0, after = 0;
  int32_t* indices = p.indices + row * k;
  for (int64_t i = 0; i < k; i++) {
    before += weights[i];
    if (indices[i] >= 0 && !keep[indices[i]]) weights[i] = 0, indices[i] = -1;
    after += weights[i];
  }
  if (p.mode == PruneMode::renormalize && after > 0)
    for (int64_t i = 0; i < k; i++) weights[i] *= before / after;
}

__global__ void pesf_mask_kernel(PesfMask m) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i >= m.batch.sequences * m.experts) return;
  const int64_t tokens = m.batch.length[i / m.experts];
  m.keep[i] = tokens < m.min_tokens || double(m.counts[i]) * double(m.experts) >= m.threshold * double(tokens);
}

void select(Context& c, const Selection& s) {
  const Router& r = s.router;
  require(r.experts > 0 && r.experts <= most_experts, "routers have up to 1024 experts here");
  require(r.top_k > 0 && r.top_k <= 32 && r.top_k <= r.experts, "a token takes up to 32 experts here");
  require(r.groups > 0 && r.experts % r.groups == 0, "the experts do not form so many groups");
  launch<select_kernel>(
      c, Grid{dim3(unsigned(ceil_div<int64_t>(s.rows, warps))), dim3(32 * warps), size_t(warps * 3 * r.experts) * sizeof(float)},
      s);
}

}  // namespace

void route(Context& c, const Route& a) {
  if (a.counts)
    check(cudaMemsetAsync(a.counts, 0, size_t(a.batch.sequences * a.router.experts) * sizeof(int32_t), c.stream),
          "clearing the counts of a router");
  select(c, {a.logits, a.router, a.batch.rows, a.batch.sequence, nullptr, a.weights, a.indices, a.counts});
}

void prune(Context& c, const Prune& p) {
  if (p.mode == PruneMode::reselect)
    select(c, {p.logits, p.router, p.batch.rows, p.batch.sequence, p.keep, p.weights, p.indices, nullptr});
  else
    launch<mask_kernel>(c, per_element(p.batch.rows), p);
}

void pesf_mask(Context& c, const PesfMask& m) { launch<pesf_mask_kernel>(c, per_element(m.batch.sequences * m.experts), m); }

}  // namespace eac::cuda
