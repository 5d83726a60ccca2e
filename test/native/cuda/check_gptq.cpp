// Round to nearest and GPTQ against quantize_rtn_reference and quantize_gptq_reference.
#include <algorithm>
#include <limits>

#include "cuda/timing.h"
#include "kernels/quant/quantize.h"

namespace eac::cuda::check {
namespace {

using std::vector;

size_t z(int64_t n) { return static_cast<size_t>(n); }

Tensor tensor(const vector<float>& v, int64_t rows, int64_t cols) {
  Tensor t = Tensor::zeros(DType::f32, {rows, cols});
  std::copy(v.begin(), v.end(), t.f32());
  return t;
}

template <class T> vector<T> values(const Tensor& t) { return {t.as<T>(), t.as<T>() + t.size()}; }

struct Case {
  int64_t rows, cols;
  int bits;
  int64_t group_size;
  bool symmetric = false, clip_search = false, act_order = false;
  DType dtype = DType::f32;
  bool importance = false;
  std::string name() const {
    return std::to_string(rows) + " x " + std::to_string(cols) + ", " + std::to_string(bits) + " bit, groups of " +
           std::to_string(group_size) + (symmetric ? ", symmetric" : "") + (clip_search ? ", clip search" : "") +
           (act_order ? ", ordered" : "") + (importance ? ", importance" : "") +
           (dtype == DType::f32   ? ""
            : dtype == DType::f16 ? ", f16"
                                  : ", bf16");
  }
  QuantOptions options() const { return {bits, group_size, symmetric, clip_search}; }
};

// The weights of a case in its dtype.
Tensor weights(const Case& c, unsigned seed) {
  const vector<float> v = normal(z(c.rows * c.cols), seed, 0.1f);
  if (c.dtype == DType::f32) return tensor(v, c.rows, c.cols);
  Tensor t = Tensor::zeros(c.dtype, {c.rows, c.cols});
  for (size_t i = 0; i < v.size(); i++) t.as<uint16_t>()[i] = c.dtype == DType::bf16 ? f32_to_bf16(v[i]) : f32_to_f16(v[i]);
  return t;
}

struct Quantized {
  Status status;
  vector<uint8_t> codes, zeros;
  vector<uint16_t> scales;
  vector<double> row_error;
};

// order and u null: round to nearest
Quantized run(const Case& c, const Tensor& w, const float* importance, const int32_t* order, const float* u) {
  const int64_t groups = (c.cols + c.group_size - 1) / c.group_size;
  const vector<char> bytes(static_cast<const char*>(w.data), static_cast<const char*>(w.data) + w.bytes());
  const Buffer<char> data(bytes);
  const Buffer<uint8_t> codes(z(c.rows * c.cols)), zeros(z(c.rows * groups));
  const Buffer<uint16_t> scales(z(c.rows * groups));
  const Buffer<double> row_error(z(c.rows));
  const Storage storage = c.dtype == DType::f32 ? Storage::f32 : c.dtype == DType::f16 ? Storage::f16 : Storage::bf16;
  const Quantize args{storage,     data,       c.rows, c.cols, c.bits, c.group_size, c.symmetric, c.clip_search,
                      c.act_order, importance, order,  u,      codes,  scales,       zeros,       row_error};
  const Status status = device().table.quantize(device().context, &args);
  return {status, codes.read(), zeros.read(), scales.read(), row_error.read()};
}

// sum of importance (w - q)^2
double squared_error(const Case& c, const Tensor& w, const vector<float>& importance, const vector<uint8_t>& codes,
                     const vector<uint16_t>& scales, const vector<uint8_t>& zeros) {
  const int64_t groups = (c.cols + c.group_size - 1) / c.group_size;
  double sum = 0;
  for (int64_t r = 0; r < c.rows; r++)
    for (int64_t i = 0; i < c.cols; i++) {
      const size_t g = z(r * groups + i / c.group_size);
      const double d = element(w, r * c.cols + i) - double(f16_to_f32(scales[g])) * (codes[z(r * c.cols + i)] - double(zeros[g]));
      sum += d * d * (importance.empty() ? 1.0 : double(importance[z(i)]));
    }
  return sum;
}

template <class T> double share_different(const vector<T>& a, const vector<T>& b) {
  size_t n = 0;
  for (size_t i = 0; i < a.size(); i++) n += a[i] != b[i];
  return double(n) / double(a.size());
}

// Without a clip search every code is the reference's but at a tie that f32 decides otherwise; with one, f32 sums may also prefer another of two
// ranges that are as good, so the error is what is held.
void check_rtn_of(const Case& c) {
  const Tensor w = weights(c, 61);
  vector<float> importance = c.importance ? normal(z(c.cols), 62) : vector<float>();
  for (float& v : importance) v = v * v;
  const Buffer<float> dimportance(importance);
  const Quantized got = run(c, w, c.importance ? dimportance.data() : nullptr, nullptr, nullptr);
  device()(got.status);
  const QuantMatrix q = quantize_rtn_reference(w, c.options(), c.importance ? importance.data() : nullptr);
  const auto codes = values<uint8_t>(unpack_codes(q)), zeros = values<uint8_t>(unpack_zeros(q));
  const auto scales = values<uint16_t>(unpack_scales(q));
  const double limit = c.clip_search ? 0.02 : 0;
  const double codes_off = share_different(got.codes, codes), scales_off = share_different(got.scales, scales);
  const double want = squared_error(c, w, importance, codes, scales, zeros);
  const double error = squared_error(c, w, importance, got.codes, got.scales, got.zeros);
  char text[160];
  std::snprintf(text, sizeof text, "other codes %.3f %%, scales %.3f %%, error %+.4f %%", 100 * codes_off, 100 * scales_off,
                100 * (error / want - 1));
  report("round to nearest, " + c.name(), codes_off <= limit + 1e-4 && scales_off <= limit && error <= want * 1.00001, text);
}

// Activations whose channels correlate; their Hessian.
vector<float> hessian_of(int64_t n) {
  const int64_t tokens = 2 * n;
  const vector<float> x = normal(z(tokens * n), 71), common = normal(z(tokens), 72), size = normal(z(n), 73);
  vector<double> h(z(n * n));
  vector<double> row(z(n));
  for (int64_t t = 0; t < tokens; t++) {
    for (int64_t j = 0; j < n; j++) row[z(j)] = (x[z(t * n + j)] + common[z(t)]) * (0.2 + std::fabs(size[z(j)]));
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < n; j++) h[z(i * n + j)] += row[z(i)] * row[z(j)];
  }
  return {h.begin(), h.end()};
}

// A code flips where f32 and f64 disagree about a tie, and carries every later weight of its row with it; the error of the whole must not differ.
void check_gptq_of(const Case& c) {
  constexpr double damping = 0.01;
  const Tensor w = weights(c, 63);
  const vector<float> h = hessian_of(c.cols);
  const Buffer<float> dh(h), diagonal(z(c.cols)), u(z(c.cols * c.cols));
  const Buffer<int32_t> order(z(c.cols));
  const Factor factor{dh, c.cols, damping, c.act_order, order, diagonal, u};
  device()(device().table.factor(device().context, &factor));
  const Quantized got = run(c, w, diagonal, order, u);
  device()(got.status);
  const GptqResult want = quantize_gptq_reference(w, tensor(h, c.cols, c.cols), damping, c.act_order, c.options());
  double error = 0, direct = 0;
  for (const double e : got.row_error) error += e / double(c.rows);
  double mean = 0;
  for (int64_t i = 0; i < c.cols; i++) mean += double(h[z(i * (c.cols + 1))]) / double(c.cols);
  const int64_t groups = (c.cols + c.group_size - 1) / c.group_size;
  for (int64_t r = 0; r < c.rows; r++) {  // tr((W - Q) H (W - Q)^T) / rows: what row_error says without looking at codes
    vector<double> d(z(c.cols));
    for (int64_t i = 0; i < c.cols; i++) {
      const size_t g = z(r * groups + i / c.group_size);
      d[z(i)] =
          element(w, r * c.cols + i) - double(f16_to_f32(got.scales[g])) * (got.codes[z(r * c.cols + i)] - double(got.zeros[g]));
    }
    for (int64_t i = 0; i < c.cols; i++)
      for (int64_t j = 0; j < c.cols; j++)
        direct += d[z(i)] * (double(h[z(i * c.cols + j)]) + (i == j ? damping * mean : 0)) * d[z(j)] / double(c.rows);
  }
  const double codes_off = share_different(got.codes, values<uint8_t>(unpack_codes(want.matrix)));
  char text[160];
  std::snprintf(text, sizeof text, "other codes %.3f %%, error %+.4f %%, of the codes %+.4f %%", 100 * codes_off,
                100 * (error / want.error - 1), 100 * (direct / want.error - 1));
  const double limit = c.clip_search ? 0.05 : 0.01;
  report("gptq, " + c.name(),
         codes_off <= limit && std::fabs(error / want.error - 1) <= 1e-3 && std::fabs(direct / want.error - 1) <= 1e-3, text);
}

void check_refusals() {
  Case c{3, 64, 4, 32};
  Tensor w = weights(c, 1);
  w.f32()[100] = std::numeric_limits<float>::infinity();
  report("round to nearest, infinity: refused", run(c, w, nullptr, nullptr, nullptr).status == Status::non_finite, "");
  c.group_size = 40;
  report("groups of 40: refused", run(c, weights(c, 1), nullptr, nullptr, nullptr).status == Status::invalid_argument, "");
}

void check_gptq() {
  for (const int bits : {2, 3, 4})
    for (const bool symmetric : {false, true}) {
      check_rtn_of({5, 200, bits, 64, symmetric});
      check_rtn_of({5, 200, bits, 64, symmetric, true, false, DType::bf16, true});
    }
  check_rtn_of({3, 100, 4, 128, false, true});
  check_rtn_of({3, 70, 3, 70, false, true, false, DType::f16});
  check_rtn_of({130, 96, 4, 32});
  for (const int bits : {2, 3, 4})
    for (const bool act_order : {false, true}) {
      check_gptq_of({9, 200, bits, 64, bits == 3, bits == 2, act_order});
      check_gptq_of({9, 200, bits, 32, false, bits == 4, act_order});
    }
  check_gptq_of({2, 40, 4, 128, false, true});
  check_gptq_of({130, 150, 4, 150, false, true});  // one group over several blocks
  check_gptq_of({7, 330, 3, 160, false, true});    // groups of several blocks
  check_gptq_of({7, 330, 3, 160, true, true, true});
  check_gptq_of({7, 250, 4, 96, false, true, false, DType::f16});
  check_gptq_of({7, 300, 2, 128, false, true, true, DType::bf16});
  if (!device().slow()) check_gptq_of({300, 1000, 3, 128, false, true, true});
  check_refusals();
}

// Everything that quantizing weights of a width needs, on random weights and activations.
struct Solve {
  int64_t rows, cols, tokens = scaled(4096), groups = (cols + 127) / 128;
  Buffer<float> x, w, h, diagonal, u;
  Buffer<int32_t> order;
  Buffer<uint8_t> codes, zeros;
  Buffer<uint16_t> scales;
  Buffer<double> row_error;
  Solve(int64_t rows_, int64_t cols_)
      : rows(rows_),
        cols(cols_),
        x(repeated_normal(tokens * cols, 1)),
        w(repeated_normal(rows * cols, 2)),
        h(vector<float>(z(cols * cols), 0.f)),
        diagonal(z(cols)),
        u(z(cols * cols)),
        order(z(cols)),
        codes(z(rows * cols)),
        zeros(z(rows * groups)),
        scales(z(rows * groups)),
        row_error(z(rows)) {}

  void statistics(int64_t all_tokens) const {
    const Hessian args{x, tokens, cols, nullptr, h};
    device()(device().table.zero(device().context, h, h.size() * sizeof(float)));
    for (int64_t t = 0; t < all_tokens; t += tokens) device()(device().table.hessian(device().context, &args));
    const Factor factor{h, cols, 0.01, true, order, diagonal, u};
    device()(device().table.factor(device().context, &factor));
  }
  void quantize(bool gptq, bool clip_search) const {
    const Quantize args{Storage::f32, w,           rows,  cols,     3,     128,
                        false,        clip_search, true,  diagonal, order, gptq ? u.data() : nullptr,
                        codes,        scales,      zeros, row_error};
    device()(device().table.quantize(device().context, &args));
  }
};

void time_gptq() {
  for (const auto& [out, in] : {std::pair<int64_t, int64_t>{14336, 4096}, {4096, 14336}, {1408, 2048}, {2048, 1408}}) {
    const Solve s(scaled(out), scaled(in));
    s.statistics(s.tokens);
    for (const bool clip_search : {false, true}) {
      const std::string shape = std::to_string(s.rows) + " x " + std::to_string(s.cols) + (clip_search ? ", clip search" : "");
      timed("gptq, ordered, 3 bit, " + shape, {.operations = 3.0 * double(s.rows * s.cols * s.cols)},
            [&] { s.quantize(true, clip_search); });
      timed("round to nearest, 3 bit, " + shape, {.bytes = 13.0 * double(s.rows * s.cols)},
            [&] { s.quantize(false, clip_search); });
    }
  }
  // Each expert has Hessians of its own, of all tokens: those of gate and up are one.
  const Solve in(scaled(14336), scaled(4096)), hidden(scaled(4096), scaled(14336));
  const int64_t tokens = device().emulated() ? 2 * in.tokens : 262144;
  const Timing expert = timed("an expert of Mixtral, " + std::to_string(tokens) + " tokens to codes", {}, [&] {
    in.statistics(tokens);
    for (int matrix = 0; matrix < 2; matrix++) in.quantize(true, true);
    hidden.statistics(tokens);
    hidden.quantize(true, true);
  });
  judge("GPTQ, Mixtral's layer, 8 times an expert (s)", 8 * expert.seconds, {Goal::below, 60});
}

const Group group("gptq", check_gptq, time_gptq);

}  // namespace
}  // namespace eac::cuda::check
