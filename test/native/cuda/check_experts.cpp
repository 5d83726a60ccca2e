#include <algorithm>

#include "cuda/timing.h"
#include "cuda/weights.h"
#include "kernels/bench/random_matrix.h"
#include "kernels/moe/experts.h"

namespace eac::cuda::check {
namespace {

struct Case {
  std::string what;
  int64_t n, width, hidden, experts, top_k;
  std::vector<int> kinds;  // of the matrices, in turn: gate, up, down of each expert
  int64_t group = 128;
  Precision precision = Precision::exact;
  int64_t shared_hidden = 0;
  bool output_gate = false, biases = false, dropped = false, add = false;
  eac::Activation activation = eac::Activation::silu;
};

// A layer on both sides.
class Layer {
 public:
  explicit Layer(const Case& c) {
    for (int64_t e = 0; e < c.experts + (c.shared_hidden > 0); e++) {
      const int64_t hidden = e < c.experts ? c.hidden : c.shared_hidden;
      const unsigned seed = unsigned(e * 3);
      const auto matrix = [&](unsigned which, int64_t rows, int64_t cols) {
        const int kind = c.kinds[size_t(e * 3 + which) % c.kinds.size()];
        matrices.emplace_back(any_matrix(rows, cols, kind, c.group, false, seed + which));
        return matrices.back().weight;
      };
      list.push_back(
          {matrix(0, hidden, c.width), matrix(1, hidden, c.width), matrix(2, c.width, hidden), nullptr, nullptr, nullptr});
      if (c.biases && e < c.experts) {
        list.back().gate_bias = bias(gate_biases, hidden, seed + 100), list.back().up_bias = bias(up_biases, hidden, seed + 101);
        list.back().down_bias = bias(down_biases, c.width, seed + 102);
      }
    }
    if (c.output_gate) output_gate.emplace_back(any_matrix(1, c.width, 16, 0, false, 77));
    device_list = std::make_unique<Buffer<Expert>>(list);
  }
  // The same in other memory of the device; without biases.
  Layer copy() const {
    Layer l;
    for (const DeviceMatrix& m : matrices) l.matrices.push_back(m.copy());
    for (const DeviceMatrix& m : output_gate) l.output_gate.push_back(m.copy());
    for (size_t m = 0; m < matrices.size(); m += 3)
      l.list.push_back({l.matrices[m].weight, l.matrices[m + 1].weight, l.matrices[m + 2].weight, nullptr, nullptr, nullptr});
    l.device_list = std::make_unique<Buffer<Expert>>(l.list);
    return l;
  }
  eac::Experts host(const Case& c) const {
    std::vector<Matrix> gate, up, down;
    for (size_t e = 0; e < size_t(c.experts); e++)
      gate.push_back(matrices[e * 3].host), up.push_back(matrices[e * 3 + 1].host), down.push_back(matrices[e * 3 + 2].host);
    std::optional<SharedExpert> shared;
    if (c.shared_hidden) {
      const size_t at = size_t(c.experts) * 3;
      shared = SharedExpert{matrices[at].host, matrices[at + 1].host, matrices[at + 2].host, std::nullopt};
      if (c.output_gate) shared->output_gate = output_gate[0].host;
    }
    std::optional<ExpertBiases> biases;
    if (c.biases) biases = ExpertBiases{gate_biases, up_biases, down_biases};
    return {gate, up, down, c.activation, shared, biases};
  }
  // Of the chosen experts, and the shared one.
  double bytes(const Case& c, const std::vector<int32_t>& chosen) const {
    std::vector<bool> used(list.size());
    for (const int32_t e : chosen) used[size_t(e)] = true;
    if (c.shared_hidden) used.back() = true;
    double sum = 0;
    for (size_t m = 0; m < matrices.size(); m++) sum += used[m / 3] ? matrices[m].bytes() : 0;
    return sum;
  }

  std::vector<DeviceMatrix> matrices, output_gate;
  std::vector<Expert> list;
  std::unique_ptr<Buffer<Expert>> device_list;

 private:
  Layer() = default;
  std::vector<Tensor> gate_biases, up_biases, down_biases;
  std::vector<Buffer<float>> device_biases;
  const float* bias(std::vector<Tensor>& to, int64_t n, unsigned seed) {
    const std::vector<float> v = normal(size_t(n), seed);
    Tensor t = Tensor::zeros(DType::f32, {n});
    std::copy(v.begin(), v.end(), t.f32());
    to.push_back(t);
    device_biases.emplace_back(v);
    return device_biases.back();
  }
};

struct Choice {
  std::vector<float> weights;
  std::vector<int32_t> indices;
};
// Different experts a token, some of them liked by most tokens.
Choice choose(const Case& c) {
  std::mt19937 gen(5);
  Choice r;
  for (int64_t t = 0; t < c.n; t++) {
    std::vector<int32_t> order;
    for (int32_t e = 0; e < c.experts; e++) order.push_back(e);
    std::shuffle(order.begin() + (t % 2 ? 1 : 0), order.end(), gen);
    for (int64_t j = 0; j < c.top_k; j++) {
      r.indices.push_back(c.dropped && gen() % 3 == 0 ? -1 : order[size_t(j)]);
      r.weights.push_back(std::uniform_real_distribution<float>(0.1f, 1.0f)(gen));
    }
  }
  return r;
}

// What a call is made of. `keep` owns what it points to.
Experts call_of(const Case& c, const Layer& layer, const Buffer<float>& x, const Buffer<float>& weights,
                const Buffer<int32_t>& indices, float* out) {
  Experts e{};
  e.x = x, e.n = c.n, e.width = c.width, e.weights = weights, e.indices = indices, e.top_k = c.top_k, e.experts = c.experts;
  e.hidden = c.hidden, e.list = *layer.device_list, e.shapes = layer.list.data(), e.shared = c.shared_hidden > 0;
  e.shared_hidden = c.shared_hidden, e.activation = Activation(int(c.activation)), e.add = c.add, e.precision = c.precision,
  e.out = out;
  if (c.output_gate) e.output_gate = layer.output_gate[0].weight;
  return e;
}

std::string name_of(const Case& c) {
  return "experts " + c.what + ", " + std::to_string(c.n) + (c.n == 1 ? " token" : " tokens") +
         (c.precision == Precision::fast ? ", fast" : "");
}

void check_case(const Case& c) {
  const Layer layer(c);
  const Choice choice = choose(c);
  const std::vector<float> x = normal(size_t(c.n * c.width), 1), before = normal(x.size(), 2);
  const Buffer<float> in(x), weights(choice.weights);
  const Buffer<int32_t> indices(choice.indices);
  std::vector<float> want = before;
  run_experts_reference(x.data(), c.n, c.width, choice.weights.data(), choice.indices.data(), c.top_k, layer.host(c),
                        c.add ? 1.0f : 0.0f, want.data(), Activations::f32);
  device().each_path([&](const std::string& path) {
    const Buffer<float> out = c.add ? Buffer<float>(before) : Buffer<float>(x.size());
    const Experts e = call_of(c, layer, in, weights, indices, out);
    device()(device().table.experts(device().context, &e));
    // Fast: inputs and hidden values rounded to 8 bits.
    close(name_of(c) + path, out.read(), {want.begin(), want.end()}, c.precision == Precision::fast ? 2e-2 : 4e-5);
  });
}

void check_experts() {
  const auto gelu = eac::Activation::gelu_tanh, clamped = eac::Activation::clamped_swiglu;
  const Precision fast = Precision::fast;
  // Few tokens: streamed.
  check_case({"int4", 1, 128, 96, 6, 2, {4}});
  check_case({"int3, shared, gated", 1, 160, 96, 5, 3, {3}, 32, Precision::exact, 160, true});
  check_case(
      {"int2, all bits, shared, added", 3, 192, 128, 7, 2, {2, 3, 4, 4}, 64, Precision::exact, 320, false, false, false, true});
  check_case({"int4, biases, dropped", 8, 128, 40, 9, 4, {4, 3}, 32, Precision::exact, 0, false, true, true, false, clamped});
  check_case({"int3, shared, gated, dropped", 8, 96, 352, 300, 2, {3}, 96, fast, 64, true, false, true, true, gelu});
  check_case({"int2, long rows", 5, 64, 2400, 3, 2, {2}, 128});
  // Many tokens: sorted, tiles of 16 and of 64 pairs.
  check_case({"int4", 12, 128, 96, 6, 2, {4}});
  check_case({"int2, int3, int4, shared, gated, biases, dropped, added",
              40,
              160,
              144,
              5,
              2,
              {2, 3, 4, 4, 2},
              32,
              Precision::exact,
              200,
              true,
              true,
              true,
              true,
              clamped});
  check_case({"int3, shared", 100, 288, 160, 3, 2, {3}, 96, fast, 64});
  check_case({"int4, one expert has all", 150, 64, 40, 1, 1, {4}, 64, Precision::exact, 0, false, true});
  check_case({"int2, slices", 10, 64, 2400, 2, 1, {2}, 128});
  check_case({"int4, many experts", 20, 64, 32, 300, 3, {4}, 32, Precision::exact, 32, true});
  // Tiles of 128 pairs: gate and up of different bits, both widths of a tile, groups that end within units.
  check_case({"int2, int3, int4, biases", 120, 96, 144, 2, 2, {4, 3, 2, 3, 2, 4}, 32, fast, 0, false, true, true});
  check_case({"int3, shared, gated, added", 150, 130, 200, 2, 1, {3}, 128, Precision::exact, 72, true, false, false, true});
  check_case({"bf16, int4 down", 130, 72, 136, 1, 1, {16, 16, 4}, 64, fast, 0, false, true});
  // Dense, and dense among quantized.
  check_case({"bf16, shared, gated", 1, 72, 96, 4, 2, {16}, 0, Precision::exact, 64, true});
  check_case({"bf16, biases", 70, 136, 72, 2, 2, {16}, 0, fast, 0, false, true, true, false, gelu});
  check_case({"f16", 9, 61, 33, 3, 2, {17}, 0, Precision::exact, 45, true, true, true, true});
  check_case({"f32, slices", 70, 100, 1400, 2, 1, {32}});
  check_case(
      {"all kinds", 60, 128, 96, 6, 3, {4, 4, 16, 16, 16, 32, 17, 17, 3, 32, 32, 2}, 64, Precision::exact, 160, true, true});
}

struct Shape {
  const char* name;
  int64_t width, hidden, experts, top_k, shared_hidden;
};

// A call a layer: each has weights and choices of its own.
void time_few(Case c, const Shape& s, std::vector<Layer>& layers) {
  const std::vector<float> shares(size_t(c.n * c.top_k), 1 / float(c.top_k));
  const Buffer<float> x(repeated_normal(c.n * c.width, 1)), weights(shares), out(x.size());
  const auto choices = [&](int64_t l) { return uniform_choices(c.n, c.experts, c.top_k, unsigned(l)); };
  const int64_t operands = operands_of(layers[0].bytes(c, choices(0)));
  while (int64_t(layers.size()) < operands) layers.push_back(layers[0].copy());
  std::vector<Buffer<int32_t>> indices;
  double bytes = 0;
  for (int64_t l = 0; l < operands; l++) {
    indices.emplace_back(choices(l));
    bytes += layers[size_t(l)].bytes(c, choices(l)) / double(operands);
  }
  device().each_path([&](const std::string& path) {
    const Timing t = timed_recorded(name_of(c) + path, {.bytes = bytes}, operands, [&](int64_t l) {
      const Experts e = call_of(c, layers[size_t(l)], x, weights, indices[size_t(l)], out);
      device()(device().table.experts(device().context, &e));
    });
    if (c.precision == Precision::fast && c.n <= 8 && path.empty())
      judge("decode, " + std::to_string(c.n) + (c.n == 1 ? " token, " : " tokens, ") + s.name + " int2, int3, int4 (% of copy)",
            100 * t.share, {Goal::at_least, c.n == 1 ? 70.0 : 60.0});
  });
}

void time_many(const Case& c, const Shape& s, int64_t tokens, const Layer& layer) {
  const std::vector<float> shares(size_t(c.n * c.top_k), 1 / float(c.top_k));
  const Buffer<float> x(repeated_normal(c.n * c.width, 1)), weights(shares), out(x.size());
  const Buffer<int32_t> indices(uniform_choices(c.n, c.experts, c.top_k, 0));
  const Experts e = call_of(c, layer, x, weights, indices, out);
  const double products = double(c.n) * double(c.top_k * c.hidden + c.shared_hidden);
  device().each_path([&](const std::string& path) {
    const Timing t = timed(name_of(c) + path, {.operations = 6.0 * products * double(c.width)},
                           [&] { device()(device().table.experts(device().context, &e)); });
    if (s.shared_hidden > 0 || c.kinds[0] == 2 || c.precision != Precision::fast || tokens < 512 || !path.empty()) return;
    const std::string line = "prefill, " + std::to_string(tokens) + " tokens, Mixtral int3, int4 ";
    judge(line + "(% of bf16)", 100 * t.share, {Goal::at_least, 55});
    judge(line + "(times as fast as PyTorch)", pytorch("grouped_" + std::to_string(tokens)) / t.seconds, {Goal::at_least, 1});
  });
}

void time_experts() {
  const std::vector<int64_t> all = {1, 8, 32, 128, 512, 4096}, counts = device().emulated() ? std::vector<int64_t>{8, 512} : all;
  for (Shape s : {Shape{"Qwen1.5-MoE", 2048, 1408, 60, 4, 5632}, Shape{"Mixtral", 4096, 14336, 8, 2, 0}})
    for (const int bits : {2, 3, 4}) {
      if (device().emulated()) s.experts = 8;
      Case c{s.name + (" " + kind_name(bits)), 1, scaled(s.width), scaled(s.hidden), s.experts, s.top_k, {bits}};
      c.shared_hidden = scaled(s.shared_hidden), c.output_gate = s.shared_hidden > 0;
      std::vector<Layer> layers;
      layers.emplace_back(c);
      for (const int64_t tokens : counts)
        for (const Precision precision : {Precision::fast, Precision::exact}) {
          c.n = tokens <= 32 ? tokens : scaled(tokens), c.precision = precision;
          tokens <= 32 ? time_few(c, s, layers) : time_many(c, s, tokens, layers[0]);
        }
    }
}

const Group group("experts", check_experts, time_experts);

}  // namespace
}  // namespace eac::cuda::check
