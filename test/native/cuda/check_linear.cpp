#include "cuda/timing.h"
#include "cuda/weights.h"
#include "kernels/bench/random_matrix.h"
#include "kernels/matmul/gemm.h"

namespace eac::cuda::check {
namespace {

struct Case {
  int kind;
  int64_t n, rows, cols, group = 128;
  Precision precision = Precision::exact;
  bool bias = false, add = false, symmetric = false;
};

std::string name_of(const Case& c) {
  std::string name = kind_name(c.kind) + " " + std::to_string(c.rows) + " x " + std::to_string(c.cols);
  if (c.kind <= 4) name += " group " + std::to_string(c.group);
  name += ", " + std::to_string(c.n) + (c.n == 1 ? " row" : " rows");
  if (c.precision == Precision::fast) name += ", fast";
  return name + (c.symmetric ? ", symmetric" : "") + (c.bias ? ", bias" : "") + (c.add ? ", added" : "");
}

void check_case(const Case& c) {
  const DeviceMatrix w(any_matrix(c.rows, c.cols, c.kind, c.group, c.symmetric, unsigned(c.rows + c.cols)));
  const std::vector<float> x = normal(size_t(c.n * c.cols), 1), before = normal(size_t(c.n * c.rows), 2);
  const Tensor bias = random_matrix(1, c.rows, c.kind == 32 ? DType::f32 : DType::bf16, 3);
  const DeviceMatrix device_bias{Matrix(bias)};
  const Buffer<float> in(x);
  // Fast products round activations, and nothing else; f32 and f16 weights always multiply in f32. bf16 weights with few rows, too.
  const bool rounds = c.precision == Precision::fast && (c.kind <= 4 || (c.kind == 16 && c.n > 8 && c.cols % 8 == 0));
  // Exact ones keep 17 bits of them on the tensor cores.
  const bool splits = c.precision == Precision::exact && (c.kind <= 4 || (c.kind == 16 && c.n > 8 && c.cols % 8 == 0));
  std::vector<float> want = before;
  linear_reference((rounds ? rounded(x) : x).data(), c.cols, c.n, w.host, c.bias ? &bias : nullptr, c.add ? 1.0f : 0.0f,
                   want.data(), c.rows);
  device().each_path([&](const std::string& path) {
    const Buffer<float> out = c.add ? Buffer<float>(before) : Buffer<float>(before.size());
    const Linear l{in,    c.n,         w.weight, device_bias.weight.storage, c.bias ? device_bias.weight.data : nullptr,
                   c.add, c.precision, out};
    device()(device().table.linear(device().context, &l));
    close("linear " + name_of(c) + path, out.read(), {want.begin(), want.end()}, splits ? 2e-5 : 4e-6);
  });
}

void check_linear() {
  const Precision exact = Precision::exact, fast = Precision::fast;
  for (const int bits : {2, 3, 4}) {
    // Few rows: one and two tiles of columns, ragged channels, groups that end within units, slices.
    for (const Case& c : {Case{bits, 1, 64, 256}, Case{bits, 4, 80, 320, 64}, Case{bits, 7, 40, 224, 32},
                          Case{bits, 8, 33, 288, 96}, Case{bits, 1, 32, 100, 128}, Case{bits, 3, 64, 2400, 128}})
      check_case(c);
    check_case({bits, 8, 100, 320, 128, fast, true, true});
    // Rows of whole pairs of units; so many channels that blocks have more of them.
    for (const Case& c : {Case{bits, 7, 40, 256, 32}, Case{bits, 5, 33, 384, 64, fast, true, true}, Case{bits, 2, 19, 1152, 128},
                          Case{bits, 8, 600, 256, 64}})
      check_case(c);
    check_case({bits, 1, 17, 64, 32, fast, false, false, true});
    // Tiles of 16 and of 64 rows.
    for (const Case& c :
         {Case{bits, 9, 272, 256}, Case{bits, 30, 100, 288, 32}, Case{bits, 65, 40, 224, 96}, Case{bits, 64, 257, 100, 128}})
      check_case(c);
    check_case({bits, 16, 48, 1100, 128, fast, true, true});
    check_case({bits, 70, 300, 320, 64, fast, true, false, true});
    // More than one tile of 128 rows, more stages than there are at a time, slices, groups that end within units.
    check_case({bits, 200, 130, 640, 32, fast, true, true});
    check_case({bits, 128, 20, 1100, 96});
    if (!device().slow()) check_case({bits, 400, 700, 4096, 128, fast}), check_case({bits, 300, 700, 4096, 32, exact});
  }
  for (const int kind : {16, 17, 32}) {
    for (const Case& c :
         {Case{kind, 1, 61, 256}, Case{kind, 2, 60, 200}, Case{kind, 3, 300, 72}, Case{kind, 8, 5, 61}, Case{kind, 5, 4096, 8}})
      check_case(c);
    check_case({kind, 1, 60, 300, 0, fast, true, true});
    for (const Case& c : {Case{kind, 9, 70, 72}, Case{kind, 33, 129, 200}, Case{kind, 65, 60, 61}, Case{kind, 12, 33, 1100}})
      check_case(c);
    check_case({kind, 70, 260, 136, 0, fast, true, true});
    check_case({kind, 150, 140, 456, 0, exact});
    check_case({kind, 20, 16, 64, 0, exact, true, false});
  }
}

void time_matrix(int kind, int64_t rows, int64_t cols, const std::vector<int64_t>& tokens,
                 const std::vector<Precision>& precisions) {
  rows = scaled(rows), cols = scaled(cols);
  std::vector<DeviceMatrix> weights;
  weights.emplace_back(any_matrix(rows, cols, kind, 128, false, 1));
  const double bytes = weights[0].bytes();
  const int64_t operands = operands_of(bytes);
  while (int64_t(weights.size()) < operands) weights.push_back(weights[0].copy());
  for (const int64_t count : tokens)
    for (const Precision precision : precisions) {
      const int64_t n = count <= 32 ? count : scaled(count);
      const Buffer<float> in(repeated_normal(n * cols, 1)), out(size_t(n * rows));
      const auto call = [&](int64_t i) {
        const Linear l{in, n, weights[size_t(i)].weight, Storage::f32, nullptr, false, precision, out};
        device()(device().table.linear(device().context, &l));
      };
      const std::string name = "linear " + name_of({kind, n, rows, cols, 128, precision});
      const Cost operations{.operations = 2.0 * double(n) * double(rows) * double(cols)};
      const auto run = [&](const std::string& path) { timed(name + path, operations, [&] { call(0); }); };
      if (count <= 32)
        device().each_path([&](const std::string& path) { timed_recorded(name + path, {.bytes = bytes}, operands, call); });
      else
        kind <= 16 ? device().each_path(run) : run("");
    }
}

void time_linear() {
  const Precision exact = Precision::exact, fast = Precision::fast;
  for (const int bits : {2, 3, 4}) time_matrix(bits, 28672, 4096, {1, 8, 32, 512, 4096}, {fast, exact});
  for (const int64_t width : {2048, 4096}) time_matrix(4, width, width, {1, 8}, {fast, exact});  // attention's
  time_matrix(16, 28672, 4096, {1, 8, 32, 512, 4096}, {fast});
  for (const int64_t width : {2048, 4096}) time_matrix(4, width, width, {1, 8}, {fast, exact});  // attention's
  time_matrix(16, 28672, 4096, {512}, {exact});
  time_matrix(32, 8192, 4096, {512}, {exact});
  time_matrix(32, 60, 2048, {1}, {exact});      // a router
  time_matrix(16, 151936, 2048, {1}, {exact});  // a head
}

const Group group("linear", check_linear, time_linear);

}  // namespace
}  // namespace eac::cuda::check
