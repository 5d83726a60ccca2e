// The oracle of the expert dispatch.
#include <cmath>
#include <vector>

#include "kernels/moe/experts.h"

namespace eac {
namespace {

void product(const float* x, const Matrix& w, const Tensor* bias, Activations activations, float* y) {
  const QuantMatrix* q = std::get_if<QuantMatrix>(&w);
  if (q && activations == Activations::int8)
    linear_int8_reference(x, q->cols, 1, *q, bias, 0, y, q->rows);
  else
    linear_reference(x, in_features(w), 1, w, bias, 0, y, out_features(w));
}

}  // namespace

void run_experts_reference(const float* x, int64_t n, int64_t d, const float* weights, const int32_t* indices, int64_t k,
                           const Experts& experts, float beta, float* out, Activations activations) {
  std::vector<float> y(static_cast<size_t>(d));
  for (int64_t t = 0; t < n; t++) {
    std::vector<double> sum(static_cast<size_t>(d), 0);
    const auto add = [&](size_t e, double weight) {
      std::vector<float> gate(static_cast<size_t>(experts.hidden_of(e))), up(gate.size());
      product(x + t * d, experts.gate_of(e), experts.bias_of(e, &ExpertBiases::gate), activations, gate.data());
      product(x + t * d, experts.up_of(e), experts.bias_of(e, &ExpertBiases::up), activations, up.data());
      glu(experts.activation, gate.data(), up.data(), int64_t(gate.size()));
      product(gate.data(), experts.down_of(e), experts.bias_of(e, &ExpertBiases::down), activations, y.data());
      for (int64_t j = 0; j < d; j++) sum[size_t(j)] += weight * y[size_t(j)];
    };
    for (int64_t slot = t * k; slot < (t + 1) * k; slot++)
      if (indices[slot] >= 0) add(size_t(indices[slot]), weights[slot]);
    if (experts.shared) {
      float g = INFINITY;
      if (experts.shared->output_gate) linear_reference(x + t * d, d, 1, *experts.shared->output_gate, nullptr, 0, &g, 1);
      add(experts.count(), 1 / (1 + std::exp(-double(g))));
    }
    for (int64_t j = 0; j < d; j++) out[t * d + j] = float((beta == 0 ? 0.0 : double(out[t * d + j])) + sum[size_t(j)]);
  }
}

}  // namespace eac
