#include "kernels/router/round.h"

#include "core/thread_pool.h"
#include "kernels/cpu/isa.h"

namespace eac {

Tensor round_against_inputs(const Tensor& w, const HessianFactor& f, DType dtype) {
  require(w.dtype == DType::f32 && w.cols() == f.n, "the router must be f32 and as wide as the Hessian");
  require(dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16, "routers are stored as f32, f16 or bf16");
  if (dtype == DType::f32) return w;
  const int64_t n = f.n;
  Tensor out = Tensor::zeros(dtype, {w.rows(), n});
  parallel_for(w.rows(), [&](int64_t r) {
    std::vector<float> row(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; i++) row[size_t(i)] = w.f32()[r * n + f.order[size_t(i)]];
    for (int64_t i = 0; i < n; i++) {
      const float v = row[size_t(i)];
      const uint16_t code = dtype == DType::bf16 ? f32_to_bf16(v) : f32_to_f16(v);
      const float rounded = dtype == DType::bf16 ? bf16_to_f32(code) : f16_to_f32(code);
      out.as<uint16_t>()[r * n + f.order[size_t(i)]] = code;
      const float* u = f.u.f32() + i * n;
      isa().axpy_f32(-(v - rounded) / u[i], u + i + 1, row.data() + i + 1, n - i - 1);
    }
  });
  return out;
}

}  // namespace eac
