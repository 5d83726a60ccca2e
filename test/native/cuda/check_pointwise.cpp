#include "cuda/timing.h"
#include "kernels/nn/activation.h"

namespace eac::cuda::check {
namespace {

void check_pointwise() {
  const auto& t = device().table;
  Context* c = device().context;
  for (const Activation a :
       {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu, Activation::clamped_swiglu}) {
    const size_t n = 1000;
    std::vector<float> gate = normal(n, 1, 3), up = normal(n, 2, 3);
    const Buffer<float> g(gate), u(up);
    const Glu glu{a, g, u, int64_t(n)};
    device()(t.glu(c, &glu));
    eac::glu(eac::Activation(int(a)), gate.data(), up.data(), int64_t(n));
    close("glu, activation " + std::to_string(int(a)), g.read(), {gate.begin(), gate.end()}, 1e-5);
  }
  const std::vector<float> x = normal(7 * 24, 3);
  const Buffer<float> in(x);
  {
    const Buffer<float> out(7 * 3 * 6);
    const Columns columns{in, 7, 3, 8, 6, 2, 1, 5, out};
    device()(t.zero(c, out, out.size() * sizeof(float)));
    device()(t.columns(c, &columns));
    std::vector<double> want(out.size(), 0);
    for (size_t i = 0; i < 7 * 3; i++)
      for (size_t j = 0; j < 5; j++) want[i * 6 + 1 + j] = x[i * 8 + 2 + j];
    close("columns", out.read(), want, 0);
  }
  {
    const Sequences s({3, 1, 3}, {0, 5, 2});
    const Buffer<float> out(3 * 24);
    const LastRows last{in, 24, s.batch, out};
    device()(t.last_rows(c, &last));
    std::vector<double> want;
    for (const size_t row : {2, 3, 6}) want.insert(want.end(), x.begin() + long(row * 24), x.begin() + long(row * 24 + 24));
    close("last rows", out.read(), want, 0);
  }
  {
    const Buffer<float> y(x);
    const AddScaled add{in, y, 0.5f, int64_t(x.size())};
    const Scale scale{y, 2.0f, int64_t(x.size())};
    device()(t.add_scaled(c, &add));
    device()(t.scale(c, &scale));
    std::vector<double> want;
    for (const float v : x) want.push_back(3.0 * v);
    close("add scaled, scale", y.read(), want, 1e-6);
  }
  {
    const std::vector<int32_t> ids = {6, 0, 3};
    const Buffer<int32_t> i(ids);
    const Buffer<float> out(3 * 24), gathered(3 * 24);
    const Embed embed{i, Storage::f32, in.data(), 2.0f, 3, 24, out};
    const GatherRows gather{in, i, 3, 24, gathered};
    device()(t.embed(c, &embed));
    device()(t.gather_rows(c, &gather));
    std::vector<double> want, twice;
    for (const int32_t id : ids)
      for (size_t j = 0; j < 24; j++) want.push_back(x[size_t(id) * 24 + j]), twice.push_back(2.0 * want.back());
    close("embed", out.read(), twice, 0);
    close("gather rows", gathered.read(), want, 0);
  }
}

void time_pointwise() {
  const int64_t rows = scaled(4096), width = scaled(14336), n = rows * width;
  const Buffer<float> gate(repeated_normal(n, 1)), up(repeated_normal(n, 2));
  const Glu glu{Activation::silu, gate, up, n};
  timed("glu, " + std::to_string(rows) + " x " + std::to_string(width), {.bytes = 12.0 * double(n)},
        [&] { device()(device().table.glu(device().context, &glu)); });
}

const Group group("pointwise", check_pointwise, time_pointwise);

}  // namespace
}  // namespace eac::cuda::check
