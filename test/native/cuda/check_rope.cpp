#include "cuda/timing.h"
#include "kernels/nn/attention.h"

namespace eac::cuda::check {
namespace {

std::vector<float> frequencies_of(int64_t pairs, float base) {
  std::vector<float> f;
  for (int64_t i = 0; i < pairs; i++) f.push_back(std::pow(base, -float(i) / float(pairs)));
  return f;
}

void check_case(const std::string& name, int64_t heads, eac::Rope r, const std::vector<int32_t>& lengths,
                const std::vector<int32_t>& starts) {
  const Sequences s(lengths, starts);
  const int64_t width = heads * r.head_dim;
  std::vector<float> x = normal(size_t(s.batch.rows * width), 1);
  const Buffer<float> on_device(x), frequencies(r.frequencies), longer(r.long_frequencies);
  const Rope rope{on_device,    width,       r.head_dim,    r.offset, int64_t(r.frequencies.size()), frequencies, longer, r.scale,
                  r.long_scale, r.long_from, r.interleaved, s.batch};
  device()(device().table.rope(device().context, &rope));
  std::vector<Sequence> sequences;
  for (size_t i = 0; i < lengths.size(); i++) sequences.push_back({s.begin[i], lengths[i], starts[i], nullptr});
  eac::rope(x.data(), width, sequences, r);
  close("rope, " + name, on_device.read(), {x.begin(), x.end()}, 1e-6);
}

void check_rope() {
  for (const bool interleaved : {false, true}) {
    const std::string layout = interleaved ? "pairs beside each other" : "halves";
    eac::Rope r{.head_dim = 64, .frequencies = frequencies_of(32, 10000), .long_frequencies = {}, .interleaved = interleaved};
    check_case(layout, 5, r, {3, 1, 40}, {0, 17, 8000});
    check_case(layout + ", many rows", 11, r, {70, 9}, {3, 100000});
    r = {.head_dim = 24,
         .frequencies = frequencies_of(5, 500000),
         .long_frequencies = {},
         .scale = 1.5f,
         .interleaved = interleaved,
         .offset = 7};
    check_case(layout + ", some channels", 3, r, {4, 2}, {0, 1});
    r = {.head_dim = 16,
         .frequencies = frequencies_of(8, 10000),
         .long_frequencies = frequencies_of(8, 70000),
         .scale = 1.1f,
         .long_scale = 1.4f,
         .interleaved = interleaved,
         .long_from = 20};
    check_case(layout + ", long for one sequence", 2, r, {20, 1, 1, 21}, {0, 19, 20, 0});
  }
}

void time_rope() {
  for (const int32_t rows : {1, int32_t(scaled(4096))}) {
    const Sequences s({rows}, {0});
    const Buffer<float> x(repeated_normal(int64_t(rows) * 32 * 128, 1)), frequencies(frequencies_of(64, 10000));
    const Rope rope{x, 32 * 128, 128, 0, 64, frequencies, nullptr, 1, 1, 0, false, s.batch};
    timed_recorded("rope, " + std::to_string(rows) + " x 32 heads of 128", {.bytes = 8.0 * double(x.size())}, 1,
                   [&](int64_t) { device()(device().table.rope(device().context, &rope)); });
  }
}

const Group group("rope", check_rope, time_rope);

}  // namespace
}  // namespace eac::cuda::check
