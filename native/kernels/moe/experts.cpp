#include "kernels/moe/experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/thread_pool.h"
#include "kernels/moe/stages.h"

namespace eac {
namespace {

constexpr int64_t row_block = 256;      // pairs of one tile: weights are expanded once for that many
constexpr int64_t channel_block = 128;  // output channels of one tile

void run_exact(const MoeCall& c, ExpertsScratch& s) {
  const Dispatch& plan = s.dispatch;
  const int64_t d = c.d, routed = plan.routed(), f = c.experts.hidden_of(0),
                shared = c.experts.shared ? c.experts.hidden_of(c.experts.count()) : 0;
  float* rows = s.rows.get<float>(plan.pairs() * d);
  float* hidden = s.hidden.get<float>(routed * f + (plan.pairs() - routed) * shared);
  float* up = s.up.get<float>(routed * f + (plan.pairs() - routed) * shared);
  // Where the hidden values of a tile begin: the shared expert's lie behind the others and have their own width.
  const auto at = [&](const Tile& t) { return t.row < routed ? t.row * f : routed * f + (t.row - routed) * shared; };

  parallel_for((routed + 63) / 64, [&](int64_t task) {
    for (int64_t p = task * 64; p < std::min(routed, task * 64 + 64); p++)
      std::memcpy(rows + p * d, c.x + plan.token_of_pair[size_t(p)] * d, size_t(d) * sizeof(float));
  });
  s.dispatch.for_tiles(
      row_block, channel_block, [&](size_t e) { return c.experts.hidden_of(e); },
      [&](const Tile& t, const Tile*) {
        const size_t e = size_t(t.expert);
        const int64_t width = c.experts.hidden_of(e);
        const float* in = t.row < routed ? rows + t.row * d : c.x + (t.row - routed) * d;
        float *h = hidden + at(t), *u = up + at(t);
        linear_serial(in, d, t.rows, c.experts.gate_of(e), c.experts.bias_of(e, &ExpertBiases::gate), t.channel,
                      t.channel + t.channels, 0, h, width);
        linear_serial(in, d, t.rows, c.experts.up_of(e), c.experts.bias_of(e, &ExpertBiases::up), t.channel,
                      t.channel + t.channels, 0, u, width);
        for (int64_t r = 0; r < t.rows; r++)
          glu(c.experts.activation, h + r * width + t.channel, u + r * width + t.channel, t.channels);
      });
  // The gathered rows are used up: their memory takes the results.
  s.dispatch.for_tiles(
      row_block, channel_block, [&](size_t) { return d; },
      [&](const Tile& t, const Tile*) {
        const size_t e = size_t(t.expert);
        const int64_t width = c.experts.hidden_of(e);
        linear_serial(hidden + at(t), width, t.rows, c.experts.down_of(e), c.experts.bias_of(e, &ExpertBiases::down), t.channel,
                      t.channel + t.channels, 0, rows + t.row * d, d);
      });
  add_up(c, s, rows);
}

}  // namespace

void add_up(const MoeCall& c, const ExpertsScratch& s, const float* rows) {
  parallel_for((c.n + 15) / 16, [&](int64_t task) {
    for (int64_t t = task * 16; t < std::min(c.n, task * 16 + 16); t++) {
      float* o = c.out + t * c.d;
      if (c.beta == 0) std::memset(o, 0, size_t(c.d) * sizeof(float));
      for (int64_t slot = t * c.k; slot < (t + 1) * c.k; slot++)
        if (const int64_t pair = s.dispatch.pair_of_slot[size_t(slot)]; pair >= 0)
          isa().axpy_f32(c.weights[slot], rows + pair * c.d, o, c.d);
      if (c.experts.shared) isa().axpy_f32(c.shared_weights[t], rows + (s.dispatch.routed() + t) * c.d, o, c.d);
    }
  });
}

Experts::Experts(std::vector<Matrix> gate_, std::vector<Matrix> up_, std::vector<Matrix> down_, Activation activation_,
                 std::optional<SharedExpert> shared_, std::optional<ExpertBiases> biases_)
    : gate(std::move(gate_)),
      up(std::move(up_)),
      down(std::move(down_)),
      activation(activation_),
      shared(std::move(shared_)),
      biases(std::move(biases_)),
      int8(gate.size() == up.size() && gate.size() == down.size() ? int8_blocks(*this) : std::nullopt) {
  if (!biases) return;
  for (auto* all : {&biases->gate, &biases->up, &biases->down})
    for (Tensor& t : *all) {
      Tensor f = Tensor::zeros(DType::f32, t.shape);
      isa().to_f32(t.dtype, t.data, t.size(), f.f32());
      t = std::move(f);
    }
}

void run_experts(const float* x, int64_t n, int64_t d, const float* weights, const int32_t* indices, int64_t k,
                 const Experts& experts, float beta, float* out, ExpertsScratch& s, Activations activations) {
  s.dispatch.sort(indices, n, k, experts.count(), experts.shared.has_value());
  MoeCall call{x, n, d, weights, k, nullptr, experts, beta, out};
  if (experts.shared) {
    float* g = s.shared_weights.get<float>(n);
    call.shared_weights = g;
    std::fill_n(g, n, 1.0f);
    if (experts.shared->output_gate) {
      linear(x, d, n, *experts.shared->output_gate, nullptr, 0, g, 1);
      for (int64_t t = 0; t < n; t++) g[t] = 1 / (1 + std::exp(-g[t]));
    }
  }
  if (activations == Activations::int8 && experts.int8)
    run_int8(call, s);
  else
    run_exact(call, s);
}

}  // namespace eac
