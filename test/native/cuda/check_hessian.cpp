// Products split in bf16, Hessian, cross moments, factor, two-stream targets.
#include <algorithm>

#include "cuda/timing.h"
#include "core/dtype.h"

namespace eac::cuda::check {
namespace {

using std::vector;

size_t z(int64_t n) { return static_cast<size_t>(n); }

// Activations with channels of unequal energy that correlate.
vector<float> activations(int64_t m, int64_t n, unsigned seed) {
  vector<float> x = normal(z(m * n), seed);
  const vector<float> common = normal(z(m), seed + 1), size = normal(z(n), seed + 2);
  for (int64_t t = 0; t < m; t++)
    for (int64_t j = 0; j < n; j++) x[z(t * n + j)] = (x[z(t * n + j)] + common[z(t)]) * (0.2f + std::fabs(size[z(j)]));
  return x;
}

// sum over t of (a - minus)[t, i] w[t] b[t, j], and the sum of the terms' sizes.
struct Moments {
  vector<double> sum, size;
};
Moments moments(const vector<float>& a, const vector<float>* minus, const vector<float>& b, const vector<float>* w, int64_t m,
                int64_t n) {
  Moments r{vector<double>(z(n * n)), vector<double>(z(n * n))};
  for (int64_t t = 0; t < m; t++)
    for (int64_t i = 0; i < n; i++) {
      double v = a[z(t * n + i)];
      if (minus) v -= (*minus)[z(t * n + i)];
      if (w) v *= (*w)[z(t)];
      for (int64_t j = 0; j < n; j++) {
        const double term = v * b[z(t * n + j)];
        r.sum[z(i * n + j)] += term, r.size[z(i * n + j)] += std::fabs(term);
      }
    }
  return r;
}

// |got - want| against what gemm.cuh promises: 2^-16 of the terms' sizes, and what a long sum of equal signs loses besides.
void within_terms(const std::string& name, const vector<float>& got, const vector<double>& want, const vector<double>& size,
                  bool long_sum = false) {
  double worst = 0;
  for (size_t i = 0; i < want.size(); i++) {
    const double error = std::fabs(double(got[i]) - want[i]) / (size[i] + 1e-3);
    worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
  }
  const double limit = 0x1p-16 + (long_sum ? 9e-5 : 0);
  char text[80];
  std::snprintf(text, sizeof text, "largest error %.2e of the terms (limit %.1e)", worst, limit);
  report(name, worst <= limit, text);
}

void check_hessian_of(int64_t m, int64_t n, bool weighted) {
  const vector<float> x = activations(m, n, 11);
  vector<float> w = normal(z(m), 12), before = normal(z(n * n), 13);
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < i; j++) before[z(j * n + i)] = before[z(i * n + j)];
  const Buffer<float> dx(x), dw(w), h(before);
  const Hessian args{dx, m, n, weighted ? dw.data() : nullptr, h};
  device()(device().table.hessian(device().context, &args));
  Moments want = moments(x, nullptr, x, weighted ? &w : nullptr, m, n);
  for (size_t i = 0; i < before.size(); i++) want.sum[i] += before[i], want.size[i] += std::fabs(before[i]);
  const vector<float> got = h.read();
  const std::string shape = std::to_string(m) + " x " + std::to_string(n) + (weighted ? ", weights" : "");
  within_terms("hessian, " + shape, got, want.sum, want.size, m > 1000);
  bool symmetric = true;
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < i; j++) symmetric = symmetric && got[z(i * n + j)] == got[z(j * n + i)];
  report("hessian, " + shape + ": symmetric", symmetric, "");
}

void check_cross_of(int64_t m, int64_t n, bool weighted) {
  const vector<float> x = activations(m, n, 21), full = activations(m, n, 24), w = normal(z(m), 22),
                      before = normal(z(n * n), 23);
  const Buffer<float> dx(x), df(full), dw(w), d(before);
  const Cross args{df, dx, m, n, weighted ? dw.data() : nullptr, d};
  device()(device().table.cross(device().context, &args));
  Moments want = moments(full, &x, x, weighted ? &w : nullptr, m, n);
  for (size_t i = 0; i < before.size(); i++) want.sum[i] += before[i], want.size[i] += std::fabs(before[i]);
  within_terms("cross, " + std::to_string(m) + " x " + std::to_string(n) + (weighted ? ", weights" : ""), d.read(), want.sum,
               want.size);
}

vector<float> hessian_of(int64_t tokens, int64_t n, unsigned seed) {
  const vector<float> x = activations(tokens, n, seed);
  const Moments h = moments(x, nullptr, x, nullptr, tokens, n);
  return {h.sum.begin(), h.sum.end()};
}

struct Factored {
  int64_t n;
  Buffer<int32_t> order;
  Buffer<float> diagonal, u;
  Status status;
  Factored(const vector<float>& h, int64_t n_, double damping, bool act_order)
      : n(n_), order(z(n_)), diagonal(z(n_)), u(z(n_ * n_)) {
    const Buffer<float> dh(h);
    const Factor args{dh, n, damping, act_order, order, diagonal, u};
    status = device().table.factor(device().context, &args);
  }
};

// U^T U H = I in the factor's order, U upper triangular; the order is that of a stable sort.
void check_factor_of(const std::string& name, const vector<float>& h, int64_t n, double damping, bool act_order) {
  const Factored f(h, n, damping, act_order);
  device()(f.status);
  double mean = 0;
  for (int64_t i = 0; i < n; i++) mean += double(h[z(i * (n + 1))]) / double(n);
  const double added = damping * (mean > 0 ? mean : 1);
  vector<float> diagonal(z(n));
  vector<int32_t> order(z(n));
  for (int64_t i = 0; i < n; i++) order[z(i)] = int32_t(i), diagonal[z(i)] = float(double(h[z(i * (n + 1))]) + added);
  if (act_order)
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return diagonal[z(a)] > diagonal[z(b)]; });
  equal(name + ": order", f.order.read(), order);
  close(name + ": diagonal", f.diagonal.read(), {diagonal.begin(), diagonal.end()}, 1e-6);
  const vector<float> u = f.u.read();
  vector<double> uh(z(n * n)), product(z(n * n)), identity(z(n * n));
  bool triangular = true;
  for (int64_t i = 0; i < n; i++) {
    identity[z(i * (n + 1))] = 1;
    for (int64_t k = 0; k < i; k++) triangular = triangular && u[z(i * n + k)] == 0;
    for (int64_t k = i; k < n; k++)
      for (int64_t j = 0; j < n; j++)
        uh[z(i * n + j)] += double(u[z(i * n + k)]) * (double(h[z(order[z(k)] * n + order[z(j)])]) + (k == j ? added : 0));
  }
  for (int64_t i = 0; i < n; i++)
    for (int64_t k = 0; k <= i; k++)
      for (int64_t j = 0; j < n; j++) product[z(i * n + j)] += double(u[z(k * n + i)]) * uh[z(k * n + j)];
  report(name + ": upper triangular", triangular, "");
  close(name + ": U^T U H = I", {product.begin(), product.end()}, identity, 1e-4);
}

void check_failures() {
  const int64_t n = 100;
  vector<float> h = hessian_of(150, n, 41);
  const auto refused = [&](const std::string& name, const vector<float>& bad, bool act_order) {
    const Status status = Factored(bad, n, 0.01, act_order).status;
    report("factor, " + name + ": refused", status == Status::not_positive_definite, device().table.error(device().context));
  };
  vector<float> bad = h;
  bad[3 * n + 70] = NAN;
  refused("NaN", bad, true);
  bad = h;
  bad[5 * (n + 1)] = NAN, bad[90 * (n + 1)] = NAN;
  refused("NaN on the diagonal", bad, true);
  bad = h;
  bad[77 * (n + 1)] = -1e4f;
  refused("negative pivot", bad, false);
  check_factor_of("factor after these", h, n, 0.01, true);
}

void check_two_stream_of(Storage storage, int64_t rows, int64_t n) {
  const vector<float> h = hessian_of(2 * n, n, 51), d = normal(z(n * n), 52);
  vector<float> w = normal(z(rows * n), 53);
  vector<uint16_t> half;
  for (float& v : w) {
    if (storage == Storage::f32) continue;
    half.push_back(storage == Storage::bf16 ? f32_to_bf16(v) : f32_to_f16(v));
    v = storage == Storage::bf16 ? bf16_to_f32(half.back()) : f16_to_f32(half.back());
  }
  const Factored f(h, n, 0.05, true);
  device()(f.status);
  const Buffer<float> dw(w), dd(d), out(z(rows * n));
  const Buffer<uint16_t> dh(half);
  const void* data = storage == Storage::f32 ? static_cast<const void*>(dw.data()) : dh.data();
  const TwoStream args{storage, data, rows, n, f.order, f.u, dd, 0.7f, out};
  device()(device().table.two_stream(device().context, &args));
  const vector<int32_t> order = f.order.read();
  const vector<float> u = f.u.read();
  vector<double> want;
  double largest = 0;
  for (int64_t r = 0; r < rows; r++) {
    vector<double> wd(z(n)), y(z(n)), target(z(n));
    for (int64_t k = 0; k < n; k++)
      for (int64_t j = 0; j < n; j++) wd[z(j)] += double(w[z(r * n + k)]) * d[z(k * n + j)];
    for (int64_t i = 0; i < n; i++)
      for (int64_t k = i; k < n; k++) y[z(i)] += wd[z(order[z(k)])] * u[z(i * n + k)];
    for (int64_t i = 0; i < n; i++) {
      double s = 0;
      for (int64_t k = 0; k <= i; k++) s += y[z(k)] * u[z(k * n + i)];
      target[z(order[z(i)])] = w[z(r * n + order[z(i)])] + double(0.7f) * s;
    }
    for (const double v : target) largest = std::max(largest, std::fabs(v));
    want.insert(want.end(), target.begin(), target.end());
  }
  close("two stream, " + std::to_string(rows) + " x " + std::to_string(n) + ", storage " + std::to_string(int(storage)),
        out.read(), want, 2e-5 * (1 + largest));
}

void check_hessian() {
  check_hessian_of(1, 5, false);
  check_hessian_of(70, 130, false);
  check_hessian_of(70, 130, true);
  check_hessian_of(1100, 33, true);  // in slices
  check_cross_of(45, 131, true);
  check_cross_of(33, 64, false);
  if (!device().slow()) {
    check_hessian_of(9000, 257, false);
    check_hessian_of(9000, 130, true);
    check_cross_of(9000, 130, false);
  }
  for (const int64_t n : {1, 63, 64, 150}) {
    const vector<float> h = hessian_of(n + n / 2 + 1, n, unsigned(30 + n));
    for (const bool act_order : {false, true})
      check_factor_of("factor, " + std::to_string(n) + (act_order ? ", ordered" : ""), h, n, 0.01, act_order);
  }
  if (!device().slow()) check_factor_of("factor, 520, ordered", hessian_of(800, 520, 31), 520, 0.01, true);
  vector<float> equals(130 * 130, 0.f);  // equal diagonals, channels without energy
  for (size_t i = 0; i < 130; i++) equals[i * 131] = float(i % 3);
  check_factor_of("factor, ties", equals, 130, 0.01, true);
  check_factor_of("factor, no energy", vector<float>(20 * 20, 0.f), 20, 0.01, true);
  check_failures();
  for (const Storage s : {Storage::f32, Storage::f16, Storage::bf16}) check_two_stream_of(s, 3, 70);
  check_two_stream_of(Storage::f32, 140, 36);
}

void time_hessian() {
  const auto& t = device().table;
  for (const int64_t channels : {2048, 4096, 14336}) {
    const int64_t n = scaled(channels), m = scaled(4096), rows = scaled(4096);
    const std::string shape = ", " + std::to_string(m) + " tokens, " + std::to_string(n) + " channels";
    const Buffer<float> x(repeated_normal(m * n, 1)), h(vector<float>(z(n * n), 0.f)), diagonal(z(n)), u(z(n * n));
    const Buffer<int32_t> order(z(n));
    const Hessian hessian{x, m, n, nullptr, h};
    timed("hessian" + shape, {.operations = 3.0 * double(m * n * n)}, [&] { device()(t.hessian(device().context, &hessian)); });
    const Factor factor{h, n, 0.01, true, order, diagonal, u};
    timed("factor, " + std::to_string(n) + " channels (operations in f64)", {.operations = 2.0 / 3 * std::pow(double(n), 3)},
          [&] { device()(t.factor(device().context, &factor)); });
    const Buffer<float> full(repeated_normal(m * n, 4)), d(repeated_normal(n * n, 3));
    const Cross cross{full, x, m, n, nullptr, d};
    timed("cross" + shape, {.operations = 6.0 * double(m * n * n)}, [&] { device()(t.cross(device().context, &cross)); });
    const Buffer<float> w(repeated_normal(rows * n, 2)), out(z(rows * n));
    const TwoStream two{Storage::f32, w, rows, n, order, u, d, 1.f, out};
    timed("two stream, " + std::to_string(rows) + " rows, " + std::to_string(n) + " channels",
          {.operations = 18.0 * double(rows * n * n)}, [&] { device()(t.two_stream(device().context, &two)); });
  }
}

const Group group("hessian", check_hessian, time_hessian);

}  // namespace
}  // namespace eac::cuda::check
