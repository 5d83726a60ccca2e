// TopK-MSE router calibration by conjugate gradients on all rows at once.
//
// With r = T - X W^T, a row's correction v solves  (G_e + lambda_e I) v = sum_t m[t, e] r[t, e] x_t.  G_e is never formed:
// G_e p = sum_t m[t, e] (x_t . p) x_t, so one iteration for all rows is two products, S = X P^T and (m ∘ S)^T X.
// Preconditioner: with c_e = trace(G_e) / trace(G) and G_e ≈ c_e G, also lambda_e = c_e ridge mean(diag G), so the system is about
// c_e times G + ridge mean(diag G) I, whose inverse is a Hessian factor. c_e falls out: scaling a preconditioner changes no iterate.
// Scalars are f64 by row. Iterates are f64 too (they are small: E × d); only the two products are f32.
#include "kernels/router/calibrate.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/thread_pool.h"
#include "kernels/matmul/gemm.h"
#include "kernels/quant/cholesky.h"
#include "kernels/quant/quantize.h"

namespace eac {
namespace {

constexpr int64_t chunk_tokens = 8192;
constexpr double min_preconditioner_damping = 1e-4;  // it only shapes the convergence, so it need not follow a smaller ridge

Operand plain(const Tensor& t) { return {t.data, t.dtype, t.cols(), 1}; }
Operand transposed(const Tensor& t) { return {t.data, t.dtype, 1, t.cols()}; }

void check(const Tensor& w, const Tensor& x, const Tensor& targets, const RouterCalibrationOptions& o) {
  require(w.dtype == DType::f32 || w.dtype == DType::f16 || w.dtype == DType::bf16,
          "calibrate_router: W must be f32, f16 or bf16");
  require(x.dtype == DType::f32 && targets.dtype == DType::f32, "calibrate_router: X and the targets must be f32");
  require(w.shape.size() == 2 && x.shape.size() == 2 && targets.shape.size() == 2,
          "calibrate_router: W, X and the targets must be matrices");
  require(w.size() > 0 && x.cols() == w.cols(), "calibrate_router: W (E, d) and X (N, d) must agree in d");
  require(targets.cols() == w.rows() && targets.rows() == x.rows(), "calibrate_router: the targets must be (N, E)");
  require(o.k >= 1 && o.k <= w.rows(), "calibrate_router: k must lie between 1 and the number of experts");
  require(o.ridge >= 0 && std::isfinite(o.ridge), "calibrate_router: the ridge must be a number of at least 0");
}

Tensor as_f32(const Tensor& t) {
  Tensor out = Tensor::zeros(DType::f32, t.shape);
  for (int64_t i = 0; i < t.size(); i++) out.f32()[i] = float(element(t, i));
  return out;
}

void require_finite(const Tensor& t, const char* what) {
  parallel_for(t.rows(), [&](int64_t r) {
    int bad = 0;
    for (int64_t j = 0; j < t.cols(); j++) bad |= !std::isfinite(t.f32()[r * t.cols() + j]);
    if (bad)
      throw Error("NON_FINITE", std::string("calibrate_router: ") + what + " hold NaN or infinity at token " + std::to_string(r));
  });
}

// m (N × E), u8. Finite targets only.
Tensor window_mask(const Tensor& targets, int64_t k) {
  const int64_t experts = targets.cols();
  Tensor mask = Tensor::zeros(DType::u8, targets.shape);
  parallel_for((targets.rows() + 255) / 256, [&](int64_t chunk) {
    std::vector<int32_t> index(experts);
    for (int64_t t = chunk * 256; t < std::min(targets.rows(), (chunk + 1) * 256); t++) {
      const float* row = targets.f32() + t * experts;
      std::iota(index.begin(), index.end(), 0);
      std::nth_element(index.begin(), index.begin() + (k - 1), index.end(),
                       [&](int32_t a, int32_t b) { return row[a] != row[b] ? row[a] > row[b] : a < b; });
      for (int64_t i = 0; i < k; i++) mask.as<uint8_t>()[t * experts + index[i]] = 1;
    }
  });
  return mask;
}

template <class T> double dot(const T* a, const double* b, int64_t n) {
  double sum[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int l = 0; l < 4; l++) sum[l] += a[i + l] * b[i + l];
  for (; i < n; i++) sum[0] += a[i] * b[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// v := (L L^T)^-1 v
void solve_factored(const double* l, int64_t d, double* v) {
  for (int64_t i = 0; i < d; i++) v[i] = (v[i] - dot(l + i * d, v, i)) / l[i * d + i];
  for (int64_t i = d - 1; i >= 0; i--) {
    v[i] /= l[i * d + i];
    for (int64_t j = 0; j < i; j++) v[j] -= v[i] * l[i * d + j];
  }
}

struct Problem {
  const Tensor &x, &targets, &mask;
  int64_t tokens, dim, experts;
  std::vector<double> energy;  // (E): trace of G_e
  std::vector<int64_t> count;  // (E): tokens in the window

  Problem(const Tensor& x_, const Tensor& targets_, const Tensor& mask_)
      : x(x_),
        targets(targets_),
        mask(mask_),
        tokens(x.rows()),
        dim(x.cols()),
        experts(targets.cols()),
        energy(experts),
        count(experts) {
    std::vector<double> norm(tokens);
    parallel_for(tokens, [&](int64_t t) {
      for (int64_t j = 0; j < dim; j++) norm[t] += double(x.f32()[t * dim + j]) * x.f32()[t * dim + j];
    });
    parallel_for(experts, [&](int64_t e) {
      for (int64_t t = 0; t < tokens; t++)
        if (mask.as<uint8_t>()[t * experts + e]) energy[e] += norm[t], count[e]++;
    });
  }

  double lambda(int64_t e, double ridge) const { return ridge * std::max(energy[e] / double(dim), 1e-9); }

  // out (active × d) = sum_t f(m, s, T) x_t with s = X P^T; P (active × d) holds the rows `active` of an E × d matrix.
  // f(t, e, s) runs once for every token and active expert; it may keep sums by expert.
  template <class F> Tensor apply(const Tensor& p, const std::vector<int64_t>& active, F f, bool product = true) const {
    const int64_t rows = int64_t(active.size()), chunk = std::min(chunk_tokens, tokens);
    Tensor out = Tensor::zeros(DType::f32, {rows, dim}), s = Tensor::zeros(DType::f32, {chunk, rows});
    for (int64_t t0 = 0; t0 < tokens; t0 += chunk) {
      const int64_t count = std::min(chunk, tokens - t0);
      const Operand piece{x.f32() + t0 * dim, DType::f32, dim, 1};
      gemm_f32(count, rows, dim, 1.0f, piece, transposed(p), 0.0f, s.f32(), rows);
      parallel_for((count + 63) / 64, [&](int64_t block) {
        for (int64_t t = block * 64; t < std::min(count, (block + 1) * 64); t++)
          for (int64_t a = 0; a < rows; a++) {
            const int64_t at = (t0 + t) * experts + active[a];
            float& v = s.f32()[t * rows + a];
            v = mask.as<uint8_t>()[at] ? f(at, v) : 0.0f;
          }
      });
      if (product) gemm_f32(rows, dim, count, 1.0f, transposed(s), piece, 1.0f, out.f32(), dim);
    }
    return out;
  }

  // Right-hand side sum_t m r x_t of every row (if asked for), and Eq. 5 for W.
  Tensor residual(const Tensor& w, double& loss, bool product) const {
    std::vector<int64_t> all(experts);
    std::iota(all.begin(), all.end(), 0);
    Tensor diff = Tensor::zeros(DType::f32, {tokens, experts});
    Tensor b = apply(
        w, all, [&](int64_t at, float s) { return diff.f32()[at] = targets.f32()[at] - s; }, product);
    double sum = 0, count = 0;
    for (int64_t i = 0; i < diff.size(); i++) {
      sum += double(diff.f32()[i]) * diff.f32()[i];
      count += mask.as<uint8_t>()[i];
    }
    loss = count > 0 ? sum / count : 0;
    return b;
  }
};

// Row e by Cholesky: for rows with few tokens, where G_e resembles G least and forming it costs least.
// G_e is summed in f32; one correction with residuals in f64 makes up for that.
struct DirectRow {
  const Problem& problem;
  int64_t e, d;
  double lambda;
  std::vector<int64_t> window;  // its tokens

  DirectRow(const Problem& problem_, int64_t e_, double lambda_) : problem(problem_), e(e_), d(problem.dim), lambda(lambda_) {
    for (int64_t t = 0; t < problem.tokens; t++)
      if (problem.mask.as<uint8_t>()[t * problem.experts + e]) window.push_back(t);
  }
  const float* token(int64_t i) const { return problem.x.f32() + window[i] * d; }

  std::vector<double> factor() const {
    const int64_t count = int64_t(window.size()), chunk = std::min(chunk_tokens, count);
    Tensor gram = Tensor::zeros(DType::f32, {d, d}), rows = Tensor::zeros(DType::f32, {chunk, d});
    for (int64_t t0 = 0; t0 < count; t0 += chunk) {
      const int64_t held = std::min(chunk, count - t0);
      for (int64_t i = 0; i < held; i++) std::copy_n(token(t0 + i), d, rows.f32() + i * d);
      accumulate_hessian(gram, rows.row_range(0, held), nullptr);
    }
    std::vector<double> g(gram.f32(), gram.f32() + d * d);
    for (int64_t i = 0; i < d; i++) g[i * (d + 1)] += lambda;
    cholesky_lower(g.data(), d, d);
    return g;
  }

  // sum_t (T[t, e] - x_t . (w + v)) x_t - lambda v
  std::vector<double> residual(const float* w, const double* v) const {
    std::vector<double> row(d), miss(window.size()), out(d);
    for (int64_t j = 0; j < d; j++) row[j] = w[j] + v[j], out[j] = -lambda * v[j];
    parallel_for(int64_t(window.size()), [&](int64_t i) {
      miss[i] = problem.targets.f32()[window[i] * problem.experts + e] - dot(token(i), row.data(), d);
    });
    constexpr int64_t piece = 64;
    parallel_for((d + piece - 1) / piece, [&](int64_t p) {
      for (size_t i = 0; i < window.size(); i++)
        for (int64_t j = p * piece; j < std::min(d, (p + 1) * piece); j++) out[j] += miss[i] * token(i)[j];
    });
    return out;
  }

  void solve(const float* w, double* v) const {
    const std::vector<double> l = factor();
    for (int pass = 0; pass < 2; pass++) {
      std::vector<double> r = residual(w, v);
      solve_factored(l.data(), d, r.data());
      for (int64_t j = 0; j < d; j++) v[j] += r[j];
    }
  }
};

// Residuals are measured in the preconditioned norm, sqrt(r . z): the plain one is ruled by the few directions of high energy that all
// inputs share, and says nothing about the others.
struct Row {
  double lambda = 0, scale = 0, rz = 0, first = 0, best = 0;
};

// Conjugate gradients. v, r, p, best: f64 (E × d).
struct Solver {
  const Problem& problem;
  const RouterCalibrationOptions& o;
  int64_t dim;
  HessianFactor factor;
  std::vector<Row> rows;
  std::vector<int64_t> active;
  std::vector<double> v, r, p, best;

  // w: the rows to correct; b (E × d): their right-hand sides
  Solver(const Problem& problem_, const RouterCalibrationOptions& o_, const Tensor& w, const Tensor& b)
      : problem(problem_),
        o(o_),
        dim(problem_.dim),
        rows(problem_.experts),
        v(b.size()),
        r(b.size()),
        p(b.size()),
        best(b.size()) {
    for (int64_t e = 0; e < problem.experts; e++) {
      double* row = &r[e * dim];
      std::copy_n(b.f32() + e * dim, dim, row);
      rows[e].lambda = problem.lambda(e, o.ridge);
      rows[e].scale = std::sqrt(dot(row, row, dim));
      if (rows[e].scale == 0) continue;
      const double n = double(problem.count[e]), d = double(dim);
      if (n * d * d / 2 + d * d * d / 6 < o.direct_below * 2 * double(problem.tokens) * d) {
        DirectRow(problem, e, rows[e].lambda).solve(w.f32() + e * dim, &best[e * dim]);
      } else {
        active.push_back(e);
      }
    }
    if (active.empty()) return;
    Tensor gram = Tensor::zeros(DType::f32, {dim, dim});
    accumulate_hessian(gram, problem.x, nullptr);
    factor = factor_hessian(gram, std::max(o.ridge, min_preconditioner_damping), false);
  }

  // z = r U^T U for the active rows (active × d), each divided by the norm of its right-hand side: a fixed scale that keeps f32 in range.
  Tensor precondition() const {
    const int64_t n = int64_t(active.size());
    Tensor z = Tensor::zeros(DType::f32, {n, dim}), y = Tensor::zeros(DType::f32, {n, dim});
    for (int64_t a = 0; a < n; a++)
      for (int64_t j = 0; j < dim; j++) z.f32()[a * dim + j] = float(r[active[a] * dim + j] / rows[active[a]].scale);
    gemm_f32(n, dim, dim, 1.0f, plain(z), transposed(factor.u), 0.0f, y.f32(), dim);
    gemm_f32(n, dim, dim, 1.0f, plain(y), plain(factor.u), 0.0f, z.f32(), dim);
    return z;
  }

  void drop(const std::vector<uint8_t>& done) {
    size_t kept = 0;
    for (size_t a = 0; a < active.size(); a++)
      if (!done[a]) active[kept++] = active[a];
    active.resize(kept);
  }

  // Keeps the best iterates, lets converged rows leave, and turns the search: p = z + (z . r)/(old z . r) p.
  void direct() {
    if (active.empty()) return;
    const Tensor z = precondition();
    std::vector<uint8_t> done(active.size());
    parallel_for(int64_t(active.size()), [&](int64_t a) {
      const int64_t e = active[a];
      Row& row = rows[e];
      double *pe = &p[e * dim], *re = &r[e * dim], rz = 0;
      const float* ze = z.f32() + a * dim;
      for (int64_t j = 0; j < dim; j++) rz += double(ze[j]) * re[j];
      if (row.first == 0) {
        row.first = row.best = rz;
      } else if (rz < row.best) {
        row.best = rz;
        std::copy_n(&v[e * dim], dim, &best[e * dim]);
      }
      done[a] = !(rz > o.tolerance * o.tolerance * row.first);
      const double beta = row.rz > 0 ? rz / row.rz : 0;
      for (int64_t j = 0; j < dim; j++) pe[j] = ze[j] + beta * pe[j];
      row.rz = rz;
    });
    drop(done);
  }

  // One step along p for every active row; rows whose curvature is lost to rounding leave.
  void step() {
    Tensor direction = Tensor::zeros(DType::f32, {int64_t(active.size()), dim});
    for (size_t a = 0; a < active.size(); a++)
      for (int64_t j = 0; j < dim; j++) direction.f32()[a * dim + j] = float(p[active[a] * dim + j]);
    const Tensor image = problem.apply(direction, active, [](int64_t, float s) { return s; });
    std::vector<uint8_t> done(active.size());
    parallel_for(int64_t(active.size()), [&](int64_t a) {
      const int64_t e = active[a];
      const Row& row = rows[e];
      double *pe = &p[e * dim], *re = &r[e * dim], *ve = &v[e * dim], curvature = 0;
      const float* ge = image.f32() + a * dim;
      for (int64_t j = 0; j < dim; j++) curvature += pe[j] * (ge[j] + row.lambda * pe[j]);
      const double alpha = row.rz / curvature;
      done[a] = !(curvature > 0 && std::isfinite(alpha));
      if (done[a]) return;
      for (int64_t j = 0; j < dim; j++) {
        ve[j] += alpha * pe[j];
        re[j] -= alpha * (ge[j] + row.lambda * pe[j]);
      }
    });
    drop(done);
  }

  int solve() {
    int iterations = 0;
    for (direct(); !active.empty() && iterations < o.max_iterations; iterations++) {
      step();
      direct();
    }
    return iterations;
  }
};

}  // namespace

RouterCalibration calibrate_router(const Tensor& w, const Tensor& x, const Tensor& targets, const RouterCalibrationOptions& o) {
  check(w, x, targets, o);
  RouterCalibration result;
  result.weight = as_f32(w);
  if (x.rows() == 0) return result;
  require_finite(x, "the router inputs");
  require_finite(targets, "the targets");
  const Tensor mask = window_mask(targets, o.k);
  const Problem problem(x, targets, mask);
  const Tensor b = problem.residual(result.weight, result.loss_before, true);
  Solver solver(problem, o, result.weight, b);
  result.iterations = solver.solve();
  for (int64_t i = 0; i < result.weight.size(); i++) result.weight.f32()[i] = float(result.weight.f32()[i] + solver.best[i]);
  problem.residual(result.weight, result.loss_after, false);
  return result;
}

RouterCalibration calibrate_router_reference(const Tensor& w, const Tensor& x, const Tensor& targets,
                                             const RouterCalibrationOptions& o) {
  check(w, x, targets, o);
  const int64_t experts = w.rows(), d = w.cols(), tokens = x.rows();
  RouterCalibration result;
  result.weight = as_f32(w);
  double before = 0, after = 0, count = 0;
  const auto in_window = [&](int64_t t, int64_t e) {
    int64_t ahead = 0;
    for (int64_t i = 0; i < experts; i++) {
      const float other = targets.f32()[t * experts + i], own = targets.f32()[t * experts + e];
      ahead += other > own || (other == own && i < e);
    }
    return ahead < o.k;
  };
  const auto miss = [&](int64_t t, int64_t e) {
    double s = targets.f32()[t * experts + e];
    for (int64_t j = 0; j < d; j++) s -= double(x.f32()[t * d + j]) * result.weight.f32()[e * d + j];
    return s;
  };
  for (int64_t e = 0; e < experts; e++) {
    std::vector<int64_t> window;
    for (int64_t t = 0; t < tokens; t++)
      if (in_window(t, e)) window.push_back(t);
    if (window.empty()) continue;
    std::vector<double> g(d * d), b(d);
    double trace = 0;
    for (int64_t t : window) {
      const float* xt = x.f32() + t * d;
      const double r = miss(t, e);
      before += r * r, count++;
      for (int64_t i = 0; i < d; i++) {
        b[i] += r * xt[i];
        trace += double(xt[i]) * xt[i];
        for (int64_t j = 0; j < d; j++) g[i * d + j] += double(xt[i]) * xt[j];
      }
    }
    for (int64_t i = 0; i < d; i++) g[i * (d + 1)] += o.ridge * std::max(trace / double(d), 1e-9);
    cholesky_lower(g.data(), d, d);
    solve_factored(g.data(), d, b.data());
    for (int64_t j = 0; j < d; j++) result.weight.f32()[e * d + j] = float(result.weight.f32()[e * d + j] + b[j]);
    for (int64_t t : window) after += miss(t, e) * miss(t, e);
  }
  result.loss_before = count > 0 ? before / count : 0;
  result.loss_after = count > 0 ? after / count : 0;
  return result;
}

}  // namespace eac
