#include "cuda/timing.h"
#include "kernels/nn/norm.h"

namespace eac::cuda::check {
namespace {

DType dtype_of(Storage s) { return s == Storage::f32 ? DType::f32 : s == Storage::f16 ? DType::f16 : DType::bf16; }

Tensor stored(const std::vector<float>& v, Storage s) {
  Tensor t = Tensor::zeros(dtype_of(s), {int64_t(v.size())});
  for (size_t i = 0; i < v.size(); i++) {
    if (s == Storage::f32) t.f32()[i] = v[i];
    if (s == Storage::f16) t.as<uint16_t>()[i] = f32_to_f16(v[i]);
    if (s == Storage::bf16) t.as<uint16_t>()[i] = f32_to_bf16(v[i]);
  }
  return t;
}
Buffer<char> uploaded(const Tensor& t) { return Buffer<char>(std::vector<char>(t.as<char>(), t.as<char>() + t.bytes())); }

void check_rows(int64_t rows, int64_t width, Storage storage, bool layer, bool in_place) {
  std::vector<float> x = normal(size_t(rows * width), 1, 3);
  for (float& v : x) v += 0.5f;
  const Tensor w = stored(normal(size_t(width), 2), storage), b = stored(normal(size_t(width), 3), storage);
  const Buffer<float> in(x), other(x.size());
  const Buffer<char> weight = uploaded(w), bias = uploaded(b);
  const Norm norm{in, rows, width, storage, weight.data(), layer ? bias.data() : nullptr, 1e-5f, in_place ? in : other};
  device()(device().table.norm(device().context, &norm));
  std::vector<float> want(x.size());
  if (layer)
    layer_norm(x.data(), rows, width, w, b, 1e-5f, want.data());
  else
    rms_norm(x.data(), rows, width, w, 1e-5f, want.data());
  close((layer ? "layer norm, " : "rms norm, ") + std::to_string(rows) + " x " + std::to_string(width) + ", storage " +
            std::to_string(int(storage)) + (in_place ? ", in place" : ""),
        (in_place ? in : other).read(), {want.begin(), want.end()}, 1e-6);
}

void check_norm() {
  for (const bool layer : {false, true})
    for (const Storage s : {Storage::f32, Storage::f16, Storage::bf16}) {
      check_rows(1, 64, s, layer, false);
      check_rows(19, 129, s, layer, true);
      check_rows(3, 512, s, layer, false);
      check_rows(3, 1027, s, layer, false);
      check_rows(2, 2048, s, layer, true);
    }
}

void time_norm() {
  for (const auto& [count, width] : {std::pair<int64_t, int64_t>{1, 4096}, {4096, 2048}, {4096, 4096}, {4096 * 32, 128}}) {
    const int64_t rows = scaled(count);
    const Buffer<float> x(repeated_normal(rows * width, 1)), out(x.size()), weight(normal(size_t(width), 2));
    const Norm norm{x, rows, width, Storage::f32, weight.data(), nullptr, 1e-5f, out};
    timed_recorded("rms norm, " + std::to_string(rows) + " x " + std::to_string(width), {.bytes = 8.0 * double(x.size())}, 1,
                   [&](int64_t) { device()(device().table.norm(device().context, &norm)); });
  }
}

const Group group("norm", check_norm, time_norm);

}  // namespace
}  // namespace eac::cuda::check
