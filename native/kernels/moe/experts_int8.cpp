#include <algorithm>
#include <cstring>

#include "core/thread_pool.h"
#include "kernels/moe/stages.h"

namespace eac {
namespace {

constexpr int64_t row_block = 64;       // pairs of one tile: they and a chunk of weights stay in L1
constexpr int64_t channel_block = 128;  // hidden channels of one tile: whole blocks of the int8 values that it leaves behind
constexpr int64_t few_channels = 64;    // outputs of one piece of the down projection of a single token

const QuantMatrix& quant(const Matrix& m) { return std::get<QuantMatrix>(m); }

// Where an output channel begins.
PanelStart start_of(const QuantMatrix& w, int64_t channel) {
  const int64_t panel = channel / quant_panel, params = w.param_index(panel * quant_panel, 0);
  return {w.codes.as<uint8_t>() + panel * w.panel_bytes(), w.scales.as<uint16_t>() + params, w.zeros.as<uint8_t>() + params};
}

// out (n, channels) = rows of x · rows [channel, channel + channels) of w ^T, padded to whole panels. next: see Int8Dot.
void product(const Int8Tokens& x, const int32_t* rows, int64_t n, const QuantMatrix& w, int64_t channel, int64_t channels,
             float* out, int64_t ldout, const PanelStart& next) {
  isa().dot_int8({.w = panels_of(w),
                  .panel = channel / quant_panel,
                  .panels = (channels + quant_panel - 1) / quant_panel,
                  .units = w.blocks(),
                  .x = x,
                  .rows = rows,
                  .n = n,
                  .out = out,
                  .ldout = ldout,
                  .next = next});
}

// rows (n, row stride ld) += the bias of channels [channel, channel + channels), if there is one.
void add_bias(const Tensor* bias, int64_t channel, int64_t channels, float* rows, int64_t n, int64_t ld) {
  for (int64_t r = 0; bias && r < n; r++) isa().axpy_f32(1, bias->f32() + channel, rows + r * ld, channels);
}

Int8Tokens from_token(Int8Tokens x, int64_t token) {
  x.q += token * x.stride, x.scale += token * x.blocks, x.sum += token * x.blocks;
  return x;
}

struct Int8Experts {
  const MoeCall& c;
  ExpertsScratch& s;
  size_t count = c.experts.count();
  int64_t routed = s.dispatch.routed();

  void prepare() {
    const Int8Blocks& blocks = *c.experts.int8;
    s.x8.quantize(c.x, c.d, c.n, c.d, blocks.token);
    s.hidden8.reset(routed, c.experts.hidden_of(0), blocks.hidden);
    if (c.experts.shared) s.shared8.reset(c.n, c.experts.hidden_of(count), blocks.shared);
  }

  // Gate, up and activation of a tile; leaves the hidden values in int8.
  void gate_and_up(const Tile& t, const Tile* next) const {
    thread_local Scratch scratch;
    const size_t e = size_t(t.expert);
    float* gate = scratch.get<float>(2 * row_block * channel_block);
    float* up = gate + row_block * channel_block;
    const int32_t* tokens = s.dispatch.token_of_pair.data() + t.row;
    const QuantMatrix &gate_matrix = quant(c.experts.gate_of(e)), &up_matrix = quant(c.experts.up_of(e));
    const PanelStart after = next ? start_of(quant(c.experts.gate_of(size_t(next->expert))), next->channel) : PanelStart{};
    product(s.x8.view(), tokens, t.rows, gate_matrix, t.channel, t.channels, gate, channel_block, start_of(up_matrix, t.channel));
    product(s.x8.view(), tokens, t.rows, up_matrix, t.channel, t.channels, up, channel_block, after);
    add_bias(c.experts.bias_of(e, &ExpertBiases::gate), t.channel, t.channels, gate, t.rows, channel_block);
    add_bias(c.experts.bias_of(e, &ExpertBiases::up), t.channel, t.channels, up, t.rows, channel_block);
    Int8Rows& hidden = e < count ? s.hidden8 : s.shared8;
    const int64_t first = e < count ? t.row : t.row - routed;
    for (int64_t r = 0; r < t.rows; r++) {
      glu(c.experts.activation, gate + r * channel_block, up + r * channel_block, t.channels);
      hidden.set(first + r, t.channel, gate + r * channel_block, t.channels);
    }
  }

  Int8Tokens hidden_from(size_t e, int64_t pair) const {
    return e < count ? from_token(s.hidden8.view(), pair) : from_token(s.shared8.view(), pair - routed);
  }

  // out += weight * down(hidden) for the pairs of a single token, some channels at a time.
  void down_one_token() const {
    const int64_t step = few_channels, tasks = (c.d + step - 1) / step, threads = thread_count();
    const std::vector<Term>& terms = terms_of_one_token();
    parallel_for(tasks, [&](int64_t task) {
      alignas(64) float y[few_channels];
      const int64_t channel = task * step, channels = std::min(step, c.d - channel);
      if (c.beta == 0) std::memset(c.out + channel, 0, size_t(channels) * sizeof(float));
      for (size_t i = 0; i < terms.size(); i++) {
        const PanelStart next = i + 1 < terms.size()     ? start_of(*terms[i + 1].down, channel)
                                : task + threads < tasks ? start_of(*terms[0].down, (task + threads) * step)
                                                         : PanelStart{};
        product(terms[i].hidden, nullptr, 1, *terms[i].down, channel, channels, y, step, next);
        add_bias(terms[i].bias, channel, channels, y, 1, step);
        isa().axpy_f32(terms[i].weight, y, c.out + channel, channels);
      }
    });
  }
  struct Term {
    const QuantMatrix* down;
    const Tensor* bias;
    Int8Tokens hidden;
    float weight;
  };
  const std::vector<Term>& terms_of_one_token() const {
    thread_local std::vector<Term> terms;
    terms.clear();
    const auto add = [&](size_t e, int64_t pair, float weight) {
      terms.push_back({&quant(c.experts.down_of(e)), c.experts.bias_of(e, &ExpertBiases::down), hidden_from(e, pair), weight});
    };
    for (int64_t slot = 0; slot < c.k; slot++)
      if (const int64_t pair = s.dispatch.pair_of_slot[size_t(slot)]; pair >= 0) add(expert_of(pair), pair, c.weights[slot]);
    if (c.experts.shared) add(count, routed, c.shared_weights[0]);
    return terms;
  }
  size_t expert_of(int64_t pair) const {
    const auto& o = s.dispatch.offsets;
    return size_t(std::upper_bound(o.begin(), o.end(), pair) - o.begin()) - 1;
  }

  void down() const {
    float* rows = s.rows.get<float>(s.dispatch.pairs() * c.d);
    s.dispatch.for_tiles(
        row_block, channel_block, [&](size_t) { return c.d; },
        [&](const Tile& t, const Tile* next) {
          const PanelStart after = next ? start_of(quant(c.experts.down_of(size_t(next->expert))), next->channel) : PanelStart{};
          const QuantMatrix& w = quant(c.experts.down_of(size_t(t.expert)));
          const Int8Tokens x = hidden_from(size_t(t.expert), t.row);
          const Tensor* bias = c.experts.bias_of(size_t(t.expert), &ExpertBiases::down);
          float* out = rows + t.row * c.d + t.channel;
          if (t.channels % quant_panel == 0) {
            product(x, nullptr, t.rows, w, t.channel, t.channels, out, c.d, after);
            return add_bias(bias, t.channel, t.channels, out, t.rows, c.d);
          }
          thread_local Scratch scratch;
          float* y = scratch.get<float>(row_block * channel_block);
          product(x, nullptr, t.rows, w, t.channel, t.channels, y, channel_block, after);
          add_bias(bias, t.channel, t.channels, y, t.rows, channel_block);
          for (int64_t r = 0; r < t.rows; r++) std::copy_n(y + r * channel_block, t.channels, out + r * c.d);
        });
    add_up(c, s, rows);
  }
};

}  // namespace

std::optional<Int8Blocks> int8_blocks(const Experts& experts) {
  const size_t count = experts.count(), all = experts.count_with_shared();
  Int8Blocks blocks{128, 128, 128};
  for (size_t e = 0; e < all; e++) {
    const auto suit = [](int64_t& block, const Matrix& m) {
      const auto* q = std::get_if<QuantMatrix>(&m);
      if (q) block = std::min(block, int8_block(*q));
      return q != nullptr;
    };
    if (!suit(blocks.token, experts.gate_of(e)) || !suit(blocks.token, experts.up_of(e)) ||
        !suit(e < count ? blocks.hidden : blocks.shared, experts.down_of(e)))
      return std::nullopt;
  }
  return blocks;
}

void run_int8(const MoeCall& c, ExpertsScratch& s) {
  Int8Experts run{c, s};
  run.prepare();
  s.dispatch.for_tiles(
      row_block, channel_block, [&](size_t e) { return c.experts.hidden_of(e); },
      [&](const Tile& t, const Tile* next) { run.gate_and_up(t, next); });
  if (c.n == 1)
    run.down_one_token();
  else
    run.down();
}

}  // namespace eac
