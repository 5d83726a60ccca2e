#include "core/dtype.h"
#include "cuda/timing.h"
#include "cuda/weights.h"

namespace eac::cuda::check {
namespace {

// As stored, and what that stands for.
struct Stored {
  std::vector<char> bytes;
  std::vector<float> values;

  Stored(Storage storage, const std::vector<float>& v) : values(v) {
    for (float& x : values) {
      const uint16_t half = storage == Storage::f16 ? f32_to_f16(x) : f32_to_bf16(x);
      if (storage != Storage::f32) x = storage == Storage::f16 ? f16_to_f32(half) : bf16_to_f32(half);
      const char* from = storage == Storage::f32 ? reinterpret_cast<const char*>(&x) : reinterpret_cast<const char*>(&half);
      bytes.insert(bytes.end(), from, from + (storage == Storage::f32 ? 4 : 2));
    }
  }
};

void check_case(Storage storage, int64_t n, int64_t heads, int64_t in, int64_t out, int64_t x_width, int64_t out_width) {
  const Stored w(storage, normal(size_t(heads * out * in), 1, 1 / std::sqrt(float(in))));
  const std::vector<float> x = normal(size_t(n * heads * x_width), 2);
  const Buffer<char> weight(w.bytes);
  const Buffer<float> on(x), y(std::vector<float>(size_t(n * heads * out_width), 7));
  const HeadLinear a{on, n, heads, x_width, out_width, {storage, 0, heads * out, in, 0, weight.data(), nullptr}, y};
  device()(device().table.head_linear(device().context, &a));
  std::vector<double> want(y.size(), 7);  // channels beyond a head's outputs stay
  for (int64_t t = 0; t < n; t++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t o = 0; o < out; o++) {
        double sum = 0;
        for (int64_t i = 0; i < in; i++)
          sum += double(w.values[size_t((h * out + o) * in + i)]) * x[size_t((t * heads + h) * x_width + i)];
        want[size_t((t * heads + h) * out_width + o)] = sum;
      }
  close("head linear, storage " + std::to_string(int(storage)) + ", " + std::to_string(n) + " x " + std::to_string(heads) +
            " heads, " + std::to_string(in) + " of " + std::to_string(x_width) + " to " + std::to_string(out) + " of " +
            std::to_string(out_width),
        y.read(), want, n > 8 ? 3e-5 : 2e-6);
}

void check_head_linear() {
  for (const Storage s : {Storage::f32, Storage::f16, Storage::bf16}) {
    check_case(s, 1, 3, 128, 40, 192, 40);
    check_case(s, 5, 2, 72, 33, 72, 50);
    check_case(s, 8, 2, 13, 5, 17, 5);
    check_case(s, 20, 2, 13, 5, 17, 5);
    check_case(s, 140, 2, 128, 72, 192, 72);
    check_case(s, 9, 1, 200, 64, 200, 96);
  }
}

void time_case(int64_t n, int64_t heads, int64_t in, int64_t out, int64_t x_width, int64_t out_width) {
  std::vector<DeviceMatrix> weights;
  weights.emplace_back(any_matrix(heads * out, in, 16, 0, false, 1));
  const double bytes = weights[0].bytes();
  const int64_t operands = n <= 8 ? operands_of(bytes) : 1;
  while (int64_t(weights.size()) < operands) weights.push_back(weights[0].copy());
  const Buffer<float> x(repeated_normal(n * heads * x_width, 1)), y(size_t(n * heads * out_width));
  const auto call = [&](int64_t i) {
    const HeadLinear a{x, n, heads, x_width, out_width, weights[size_t(i)].weight, y};
    device()(device().table.head_linear(device().context, &a));
  };
  const std::string name = "head linear, " + std::to_string(n) + (n == 1 ? " token, " : " tokens, ") + std::to_string(heads) +
                           " heads, " + std::to_string(in) + " to " + std::to_string(out);
  if (n <= 8)
    timed_recorded(name, {.bytes = bytes}, operands, call);
  else  // of bf16: two for one of f32
    timed(name, {.operations = 4.0 * double(n * heads * in * out)}, [&] { call(0); });
}

void time_head_linear() {
  for (const int64_t heads : {int64_t(16), scaled(128)})
    for (const int64_t n : {int64_t(1), int64_t(8), scaled(2048)}) {
      time_case(n, heads, 128, scaled(512), 192, 576);
      time_case(n, heads, scaled(512), 128, 512, 128);
    }
}

const Group group("head_linear", check_head_linear, time_head_linear);

}  // namespace
}  // namespace eac::cuda::check
