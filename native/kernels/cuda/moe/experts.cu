// Sparse-expert dispatch: which kernels compute it. What is computed: kernels/moe/experts.h.
//
// METHOD      Few tokens, quantized experts: two launches stream the chosen experts' weights once (gate_up and down of stream.cu); one before
//             them prepares inputs, one behind adds the slices up. Each begins while the one before it ends. Many tokens: pairs are sorted by
//             expert; one launch computes gate, up and activation of all experts, one down, one adds up each token's own pairs in the order of its slots. Experts whose weights another kernel multiplies
//             (dense ones among quantized ones) are launches of their own.
//             Nothing waits for the host, and launches do not depend on what tokens chose: a graph can hold them.
// BOUND       Few tokens: memory, the chosen experts' weights. Many: operations, 6 pairs hidden width.
#include <algorithm>

#include "kernels/cuda/moe/dispatch.cuh"

namespace eac::cuda {
namespace {

constexpr int64_t most_tokens = 8192;  // at a time: bounds the scratch memory

// The paths that the experts' products take.
struct Paths {
  bool gate[3] = {}, down[3] = {};  // by Path

  explicit Paths(const Experts& e) {
    for (int64_t i = 0; i < e.experts + e.shared; i++) {
      const Expert& x = e.shapes[i];
      const int64_t hidden = i < e.experts ? e.hidden : e.shared_hidden;
      require(x.gate.rows == hidden && x.up.rows == hidden && x.down.rows == e.width && x.gate.cols == e.width &&
                  x.up.cols == e.width && x.down.cols == hidden,
              "an expert's matrices must be hidden x width (gate, up) and width x hidden (down)");
      require(path_of(x.gate) == path_of(x.up), "gate and up of an expert must both be quantized, or of the same type");
      gate[int(path_of(x.gate))] = down[int(path_of(x.down))] = true;
    }
  }
  bool has(Path p) const { return gate[int(p)] || down[int(p)]; }
};

bool tensor(const bool (&paths)[3]) { return paths[int(Path::codes)] || paths[int(Path::bf16)]; }

// Few tokens. parts: (slices of the places' experts, then of the shared one; n, width).
__global__ void add_experts_kernel(Experts e, Prepared prepared, int places, int slices, int shared_slices, bool biases,
                                   const float* parts) {
  uint8_t* there = dynamic_shared<uint8_t>();  // whether a part has been written
  const int64_t i = global_thread(), size = e.n * e.width;
  const int routed = places * slices, all = routed + shared_slices;
  for (int q = threadIdx.x; q < all; q += blockDim.x) there[q] = q >= routed || load_written(prepared.expert + q / slices) >= 0;
  __syncthreads();
  wait_for_earlier();
  if (i >= size) return;
  const int64_t token = i / e.width, channel = i % e.width;
  float sum = e.add ? e.out[i] : 0.f;
#pragma unroll 8
  for (int q = 0; q < all; q++)
    if (there[q]) sum += parts[q * size + i];
  for (int p = 0; p < (biases ? places : 0); p++) {
    const float* bias = there[p * slices] ? e.list[prepared.expert[p]].down_bias : nullptr;
    if (bias) sum += prepared.factor[p * e.n + token] * bias[channel];
  }
  e.out[i] = sum;
}

void run_few(Context& c, const Experts& e) {
  const Choice choice{e.indices, int(e.n * e.top_k), int(e.experts)};
  const int places = choice.places();
  const Prepared prepared = prepare(c, e, choice);
  Stream s{};
  s.n = int(e.n), s.list = e.list, s.choice = choice, s.places = places, s.shared = e.shared;
  s.factor = prepared.factor;
  s.biases = std::any_of(e.shapes, e.shapes + e.experts, [](const Expert& x) { return x.gate_bias || x.up_bias || x.down_bias; });
  s.activation = e.activation;
  s.role = Role::gate_up;
  s.channels = int(e.hidden), s.shared_channels = int(e.shared_hidden);
  s.in = prepared.in;
  s.hidden =
      allocate_planes(c, 4, (places + 1) * e.n, std::max(e.hidden, e.shared ? e.shared_hidden : 0), e.precision, Order::lanes);
  multiply_stream(c, s);

  s.role = Role::down;
  s.channels = int(e.width);
  s.in = s.hidden;
  // As many blocks as if the shared expert were some more of the others; its slices are about as long as theirs.
  s.slices = stream_slices(c, places + (e.shared ? ceil_div(e.shared_hidden, e.hidden) : 0), e.width, e.hidden);
  s.shared_slices = e.shared ? int(ceil_div(units_of(e.shared_hidden), ceil_div<int64_t>(units_of(e.hidden), s.slices))) : 0;
  s.out = c.scratch[6].get<float>((places * s.slices + s.shared_slices) * e.n * e.width);
  multiply_stream(c, s);
  Grid grid = per_element(e.n * e.width);
  grid.shared = size_t(places * s.slices + s.shared_slices);
  launch<add_experts_kernel>(c, grid, e, prepared, places, s.slices, s.shared_slices, s.biases, (const float*)s.out);
}

// Many tokens. rows: (slices, pairs, width).
__global__ void combine_kernel(Experts e, Dispatch d, const float* rows, int64_t slices, int64_t slice_stride,
                               const float* factor) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i >= e.n * e.width) return;
  const int64_t token = i / e.width, channel = i % e.width;
  float sum = e.add ? e.out[i] : 0.f;
  const auto add = [&](int64_t pair, float weight) {
    float row = 0;
    for (int64_t s = 0; s < slices; s++) row += rows[s * slice_stride + pair * e.width + channel];
    sum += weight * row;
  };
  for (int64_t j = token * e.top_k; j < (token + 1) * e.top_k; j++)
    if (d.pair_of_slot[j] >= 0) add(d.pair_of_slot[j], e.weights[j]);
  if (e.shared) add(d.begin[e.experts] + token, factor[token]);
  e.out[i] = sum;
}

void run_many(Context& c, const Experts& e, const Paths& paths) {
  const int64_t slots = e.n * e.top_k, pairs = slots + (e.shared ? e.n : 0),
                widest = std::max(e.hidden, e.shared ? e.shared_hidden : 0);
  Product p{};
  p.tile_rows = tile_rows_for(c, !paths.has(Path::scalar), ceil_div(slots, std::max<int64_t>(e.experts, 1)));
  const Dispatch d = sort_pairs(c, e, p.tile_rows);
  p.n = e.n, p.list = e.list, p.routed = e.experts;
  p.begin = d.begin, p.first_tile = d.first_tile, p.tokens = d.tokens;
  p.slices = 1;
  p.activation = e.activation;

  p.role = Role::gate_up;
  p.cols = e.width, p.channels = e.hidden, p.shared_channels = e.shared ? e.shared_hidden : 0;
  if (tensor(paths.gate)) p.in = split_planes(c, 0, e.x, e.n, e.width, e.precision, Order::channels);
  p.x = e.x, p.x_stride = e.width;
  if (tensor(paths.down)) p.hidden = allocate_planes(c, 4, pairs, widest, e.precision, Order::channels);
  p.hidden_stride = widest;
  if (paths.down[int(Path::scalar)]) p.hidden_f32 = c.scratch[6].get<float>(pairs * widest);
  for (const Path path : {Path::codes, Path::bf16, Path::scalar}) {
    p.path = path;
    if (paths.gate[int(path)]) multiply_product(c, p, slots);
  }

  p.role = Role::down;
  p.cols = e.hidden, p.channels = e.width, p.shared_channels = e.shared ? e.width : 0;
  p.tokens = nullptr;
  p.in = p.hidden, p.x = p.hidden_f32, p.x_stride = widest;
  p.path = tensor(paths.down) ? Path::codes : Path::scalar;
  p.slices = tile_slices(c, p, slots);
  p.slice_stride = pairs * e.width;
  p.out = c.scratch[7].get<float>(p.slices * p.slice_stride);
  for (const Path path : {Path::codes, Path::bf16, Path::scalar}) {
    p.path = path;
    if (paths.down[int(path)]) multiply_product(c, p, slots);
  }

  float* factor = e.shared ? c.scratch[3].get<float>(e.n) : nullptr;
  if (e.shared) shared_factors(c, e, factor);
  launch<combine_kernel>(c, per_element(e.n * e.width), e, d, (const float*)p.out, p.slices, p.slice_stride,
                         (const float*)factor);
}

}  // namespace

void experts(Context& c, const Experts& all) {
  const Paths paths(all);
  require(!all.shared || !all.output_gate.data || all.output_gate.storage != Storage::quantized,
          "the shared expert's output gate must not be quantized");
  for (int64_t first = 0; first < all.n; first += most_tokens) {
    Experts e = all;
    e.n = std::min(most_tokens, all.n - first);
    e.x += first * e.width, e.out += first * e.width;
    e.weights += first * e.top_k, e.indices += first * e.top_k;
    if (!paths.has(Path::bf16) && !paths.has(Path::scalar) && e.n <= few_rows)
      run_few(c, e);
    else
      run_many(c, e, paths);
  }
}

}  // namespace eac::cuda
