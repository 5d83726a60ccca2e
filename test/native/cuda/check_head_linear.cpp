#include "core/dtype.h"
#include "cuda/check.h"

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

void time_head_linear() {
  for (const int64_t heads : {16, 128})
    for (const int64_t n : {1, 8, 2048})
      for (const auto& [in, out, x_width, out_width] :
           {std::tuple<int64_t, int64_t, int64_t, int64_t>{128, 512, 192, 576}, {512, 128, 512, 128}}) {
        const Buffer<uint16_t> weight(std::vector<uint16_t>(size_t(heads * in * out), 0x3c00));
        const Buffer<float> x(normal(size_t(n * heads * x_width), 1)), y(size_t(n * heads * out_width));
        const HeadLinear a{x, n, heads, x_width, out_width, {Storage::bf16, 0, heads * out, in, 0, weight.data(), nullptr}, y};
        Cost cost;
        if (n <= 8)
          cost.bytes = 2.0 * double(weight.size());
        else
          cost.operations = 4.0 * double(n) * double(weight.size());  // of bf16: two for one of f32
        timed("head linear, " + std::to_string(n) + " tokens, " + std::to_string(heads) + " heads, " + std::to_string(in) +
                  " to " + std::to_string(out),
              cost, [&] { device()(device().table.head_linear(device().context, &a)); });
      }
}

const Group group("head_linear", check_head_linear, time_head_linear);

}  // namespace
}  // namespace eac::cuda::check
