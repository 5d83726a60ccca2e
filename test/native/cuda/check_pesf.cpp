// PESF as a prefill meets it: a layer without and with pruning, under the expert loads of a trained model.
//
// LAYER       The experts' part: router, routing, (mask, pruning,) experts and shared experts. The whole layer: norms, attention with its
//             projections and rotary embedding before. Sequences of 512 tokens, each with favourites of its own, are pruned each by its own counts,
//             mode drop. bf16 weights, as in the paper's measurements of PESF alone, and int4.
// LOADS       expert_loads.h; a pass takes the loads of each of its layers in turn. Logits are made so that routing chooses what was drawn.
// BESIDE      The paper's speed-ups are of whole models, batch 4 × 512 (EAC-MoE, PESF alone): held against whole layers of bf16 at 4 × 512.
#include <algorithm>
#include <array>
#include <numeric>

#include "cuda/expert_loads.h"
#include "cuda/timing.h"
#include "cuda/weights.h"
#include "kernels/moe/experts.h"
#include "kernels/router/select.h"

namespace eac::cuda::check {
namespace {

constexpr std::array<double, 2> alphas = {0.3, 0.7};

struct Shape {
  const char* name;
  int64_t width, hidden, experts, top_k, shared_hidden, heads, kv_heads, head_dim;
  bool output_gate;
  std::array<double, 2> paper;  // speed-ups at these alphas
};
constexpr Shape shapes[] = {{"Qwen1.5-MoE", 2048, 1408, 60, 4, 5632, 16, 16, 128, true, {1.14, 1.47}},
                            {"DeepSeek-MoE-16B", 2048, 1408, 64, 6, 2816, 16, 16, 128, false, {1.11, 1.45}},
                            {"Phi-3.5-MoE", 4096, 6400, 16, 2, 0, 32, 8, 128, false, {1.12, 1.30}},
                            {"Mixtral", 4096, 14336, 8, 2, 0, 32, 8, 128, false, {1.08, 1.13}}};

using Layers = std::vector<std::vector<double>>;
const Layers& loads_of(const Shape& s) {
  const auto same = [&](const ExpertLoads& l) { return l.experts == s.experts && l.top_k == s.top_k; };
  return std::find_if(expert_loads.begin(), expert_loads.end(), same)->layers;
}

// Systematic sampling: each token chooses top_k different experts, expert e with the chance chances[e]. (tokens, top_k)
std::vector<int32_t> draw(const std::vector<double>& chances, int64_t top_k, int64_t tokens, std::mt19937& gen) {
  std::vector<int32_t> order(chances.size()), chosen;
  std::iota(order.begin(), order.end(), 0);
  for (int64_t t = 0; t < tokens; t++) {
    std::shuffle(order.begin(), order.end(), gen);
    const double start = std::uniform_real_distribution<double>()(gen);
    double sum = 0;
    int64_t count = 0;
    for (size_t i = 0; i < order.size() && count < top_k; i++) {
      sum += chances[size_t(order[i])];
      // What rounding may have left out: the last experts of the order.
      if (sum > start + double(count) || top_k - count == int64_t(order.size() - i)) chosen.push_back(order[i]), count++;
    }
  }
  return chosen;
}

// Logits (rows, experts) whose largest are the drawn experts'.
std::vector<float> draw_logits(const Shape& s, const std::vector<double>& chances, const std::vector<int32_t>& lengths,
                               unsigned seed) {
  std::mt19937 gen(seed);
  std::vector<float> logits;
  std::vector<double> places = chances;
  for (const int32_t tokens : lengths) {
    std::shuffle(places.begin(), places.end(), gen);
    std::vector<float> rows = normal(size_t(tokens * s.experts), unsigned(gen()));
    const std::vector<int32_t> chosen = draw(places, s.top_k, tokens, gen);
    for (size_t i = 0; i < chosen.size(); i++) rows[i / size_t(s.top_k) * size_t(s.experts) + size_t(chosen[i])] += 20;
    logits.insert(logits.end(), rows.begin(), rows.end());
  }
  return logits;
}

// The weights of a layer. Matrices of one shape have the same values, each in memory of its own.
class Weights {
 public:
  Weights(const Shape& s, int kind)
      : output_gate(any_matrix(1, s.width, 16, 0, false, 3)),
        router(any_matrix(s.experts, s.width, 32, 0, false, 4)),
        shared_(s.shared_hidden > 0) {
    const auto matrix = [&](int64_t rows, int64_t cols) { return any_matrix(rows, cols, kind, 128, false, 1); };
    const auto add = [&](int64_t count, int64_t hidden) {
      const DeviceMatrix up(matrix(hidden, s.width)), down(matrix(s.width, hidden));
      for (int64_t e = 0; e < count; e++) {
        for (const DeviceMatrix* m : {&up, &up, &down}) experts.push_back(m->copy());
        const size_t at = experts.size() - 3;
        list.push_back({experts[at].weight, experts[at + 1].weight, experts[at + 2].weight, nullptr, nullptr, nullptr});
      }
    };
    add(s.experts, s.hidden);
    if (s.shared_hidden) add(1, s.shared_hidden);
    const int64_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
    for (const auto& [rows, cols] : {std::pair{q, s.width}, {kv, s.width}, {kv, s.width}, {s.width, q}})
      attention.emplace_back(matrix(rows, cols));
    device_list = std::make_unique<Buffer<Expert>>(list);
  }
  eac::Experts host() const {
    std::vector<Matrix> of[3];
    const size_t shared = shared_ ? experts.size() - 3 : experts.size();
    for (size_t i = 0; i < shared; i++) of[i % 3].push_back(experts[i].host);
    std::optional<SharedExpert> last;
    if (shared_) last = SharedExpert{experts[shared].host, experts[shared + 1].host, experts[shared + 2].host, output_gate.host};
    return {of[0], of[1], of[2], eac::Activation::silu, last};
  }
  std::vector<DeviceMatrix> experts, attention;  // gate, up, down of each; q, k, v, out
  DeviceMatrix output_gate, router;
  std::vector<Expert> list;
  std::unique_ptr<Buffer<Expert>> device_list;

 private:
  bool shared_;
};

template <class Arguments> void call(Status (*f)(Context*, const Arguments*), const Arguments& a) {
  device()(f(device().context, &a));
}
Precision precision(const Weight& w) { return w.storage == Storage::quantized ? Precision::fast : Precision::exact; }

// A batch on its way through a layer.
struct Pass {
  Pass(const Shape& s, const Weights& w, const std::vector<int32_t>& lengths, const Layers& loads)
      : s(s),
        w(w),
        batch(lengths, std::vector<int32_t>(lengths.size(), 0)),
        rows(batch.batch.rows),
        x(repeated_normal(rows * s.width, 1)),
        h(x.size()),
        out(x.size()),
        q(count(s.heads * s.head_dim)),
        k(count(s.kv_heads * s.head_dim)),
        v(k.size()),
        attended(q.size()),
        scores(count(s.experts)),
        weights(count(s.top_k)),
        indices(weights.size()),
        counts(lengths.size() * size_t(s.experts)),
        keep(counts.size()),
        ones(std::vector<float>(size_t(s.width), 1)),
        frequencies(std::vector<float>(size_t(s.head_dim / 2), 0.01f)) {
    for (const auto& chances : loads) logits.emplace_back(draw_logits(s, chances, lengths, unsigned(logits.size())));
  }

  // With the choices of a layer. alpha 0: no pruning.
  void run(size_t layer, double alpha, bool whole) const {
    const Table& t = device().table;
    if (whole) {
      attend();
      call<Norm>(t.norm, {out, rows, s.width, Storage::f32, ones, nullptr, 1e-6f, h});
    }
    const float* in = whole ? h : x;
    linear(in, w.router.weight, false, scores);  // takes its time; routed are the drawn logits
    const cuda::Router router{Scoring::softmax, s.experts, s.top_k, false, 1, 0, nullptr, 1, 1, 1};
    call<Route>(t.route, {logits[layer], router, batch.batch, weights, indices, counts});
    if (alpha > 0) {
      call<PesfMask>(t.pesf_mask, {counts, batch.batch, s.experts, pesf_threshold(spec(), alpha), 2, keep});
      call<Prune>(t.prune, {logits[layer], router, batch.batch, PruneMode::drop, keep, weights, indices});
    }
    call<Experts>(t.experts, {in, rows, s.width, weights, indices, s.top_k, s.experts, s.hidden, *w.device_list, w.list.data(),
                              s.shared_hidden > 0, s.shared_hidden, s.output_gate ? w.output_gate.weight : Weight{},
                              Activation::silu, whole, precision(w.list[0].gate), out});
  }
  RouterSpec spec() const { return {.experts = s.experts, .top_k = s.top_k}; }
  // Of the latest run: the share of the (token, expert) pairs that were pruned.
  double skipped() const {
    const std::vector<int32_t> chosen = indices.read();
    return double(std::count(chosen.begin(), chosen.end(), -1)) / double(chosen.size());
  }

  const Shape& s;
  const Weights& w;
  const Sequences batch;
  const int64_t rows;
  const Buffer<float> x, h, out, q, k, v, attended, scores, weights;
  const Buffer<int32_t> indices, counts;
  const Buffer<uint8_t> keep;
  const Buffer<float> ones, frequencies;
  std::vector<Buffer<float>> logits;  // by layer

 private:
  size_t count(int64_t width) const { return size_t(rows * width); }
  void linear(const float* in, const Weight& weight, bool add, float* to) const {
    call<Linear>(device().table.linear, {in, rows, weight, Storage::f32, nullptr, add, precision(weight), to});
  }
  void attend() const {
    const Table& t = device().table;
    call<Norm>(t.norm, {x, rows, s.width, Storage::f32, ones, nullptr, 1e-6f, h});
    linear(h, w.attention[0].weight, false, q);
    linear(h, w.attention[1].weight, false, k);
    linear(h, w.attention[2].weight, false, v);
    for (const auto& [heads, of] : {std::pair{s.heads, q.data()}, {s.kv_heads, k.data()}})
      call<Rope>(t.rope,
                 {of, heads * s.head_dim, s.head_dim, 0, s.head_dim / 2, frequencies, nullptr, 1, 1, 0, false, batch.batch});
    call<Attention>(t.attention, {q, k, v, attended, batch.batch, nullptr, nullptr, s.heads, s.kv_heads, s.head_dim, s.head_dim,
                                  0, 1 / std::sqrt(float(s.head_dim)), nullptr});
    linear(attended, w.attention[3].weight, false, out);
  }
};

// What is drawn has the loads it was drawn for.
void check_loads() {
  for (const Shape& s : shapes) {
    const std::vector<double>& chances = loads_of(s).front();
    constexpr int64_t tokens = 4000;
    std::mt19937 gen(1);
    std::vector<double> found(chances.size(), 0);
    for (const int32_t e : draw(chances, s.top_k, tokens, gen)) found[size_t(e)] += 1.0 / tokens;
    close(std::string("PESF, ") + s.name + ": drawn loads", {found.begin(), found.end()}, chances, 0.03);
  }
}

// Router to experts on the device, against the CPU's kernels; the whole layer: that it runs and writes all.
void check_layer() {
  const Shape s{"small", 64, 40, 60, 4, 96, 4, 2, 16, true, {}};
  const Weights w(s, 4);
  const std::vector<int32_t> lengths = {70, 9, 1};
  const Pass pass(s, w, lengths, {loads_of(s)[0]});
  constexpr double alpha = 0.7;
  pass.run(0, alpha, false);
  std::vector<Sequence> sequences;
  for (size_t i = 0; i < lengths.size(); i++) sequences.push_back({pass.batch.begin[i], lengths[i], 0, nullptr});
  const std::vector<float> logits = pass.logits[0].read(), x = pass.x.read();
  std::vector<float> weights(pass.weights.size()), out(x.size());
  std::vector<int32_t> indices(weights.size()), counts(pass.counts.size());
  std::vector<uint8_t> keep(counts.size());
  select_experts(logits.data(), pass.rows, pass.spec(), weights.data(), indices.data());
  count_selections(indices.data(), sequences, pass.spec(), counts.data());
  pesf_mask(counts.data(), sequences, pass.spec(), alpha, 1, keep.data());
  apply_expert_mask(logits.data(), keep.data(), eac::PruneMode::drop, sequences, pass.spec(), weights.data(), indices.data());
  equal("PESF, mask", pass.keep.read(), keep);
  equal("PESF, pruned choices", pass.indices.read(), indices);
  const double skipped = pass.skipped();
  report("PESF, share skipped", skipped > 0.02 && skipped < 0.5, std::to_string(skipped));
  run_experts_reference(x.data(), pass.rows, s.width, weights.data(), indices.data(), s.top_k, w.host(), 0, out.data(),
                        Activations::f32);
  close("PESF, layer", pass.out.read(), {out.begin(), out.end()}, 2e-2);
  pass.run(0, alpha, true);
  const std::vector<float> all = pass.out.read();
  report("PESF, whole layer", std::all_of(all.begin(), all.end(), [](float v) { return std::isfinite(v); }), "finite");
}

void check_pesf() {
  check_loads();
  check_layer();
}

// Seconds of all layers without pruning, and with it at each alpha.
void time_pass(const Pass& pass, bool whole, const std::string& name, bool as_published) {
  const size_t layers = pass.logits.size();
  const auto all = [&](double alpha) {
    for (size_t l = 0; l < layers; l++) pass.run(l, alpha, whole);
  };
  const std::vector<double> t = time_in_turn({[&] { all(0); }, [&] { all(alphas[0]); }, [&] { all(alphas[1]); }});
  for (size_t a = 0; a < alphas.size(); a++) {
    double skipped = 0;
    for (size_t l = 0; l < layers; l++) {
      pass.run(l, alphas[a], whole);
      skipped += pass.skipped() / double(layers);
    }
    const double faster = t[0] / t[a + 1];
    std::printf("PESF %.1f, %-70s %10.1f us -> %10.1f us, %4.1f %% of the pairs skipped: %.2f times as fast (paper %.2f)\n",
                alphas[a], name.c_str(), t[0] * 1e6 / double(layers), t[a + 1] * 1e6 / double(layers), 100 * skipped, faster,
                pass.s.paper[a]);
    if (as_published) judge("PESF 0.3, 0.7, " + name + " (times as fast)", faster, {Goal::at_least, pass.s.paper[a]});
  }
}

void time_pesf() {
  for (Shape s : shapes) {
    if (device().emulated() && s.experts > 8) continue;
    s.width = scaled(s.width), s.hidden = scaled(s.hidden), s.shared_hidden = scaled(s.shared_hidden);
    Layers loads = loads_of(s);
    if (device().emulated()) s.head_dim = 8, loads.resize(1);
    for (const int kind : {16, 4}) {
      const Weights w(s, kind);
      for (const size_t sequences : {1, 4}) {
        const Pass pass(s, w, std::vector<int32_t>(sequences, int32_t(scaled(512))), loads);
        for (const bool whole : {false, true}) {
          const std::string name = std::string(s.name) + " " + kind_name(kind) + ", " + std::to_string(pass.rows) + " tokens, " +
                                   (whole ? "whole layer" : "experts");
          time_pass(pass, whole, name, kind == 16 && sequences == 4 && whole);
        }
      }
    }
  }
}

const Group group("pesf", check_pesf, time_pesf);

}  // namespace
}  // namespace eac::cuda::check
