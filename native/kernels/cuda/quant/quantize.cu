// Round to nearest, and what it shares with GPTQ: weights as f32, group parameters.
//
// BOUND  bytes: the weight once as stored, 8 bytes a weight for its f32 copy, 1 for the code; a clip search reads its group 14 times from the L1.
#include "kernels/cuda/quant/quantize.cuh"

namespace eac::cuda {
namespace {

__global__ void load_weights_kernel(Quantize q, float* w) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i < q.rows * q.cols) w[i] = load_float(q.storage, q.w, i);
}

__global__ __launch_bounds__(256) void fit_groups_kernel(Quantize q, const float* w, int64_t groups, int64_t first, int64_t count,
                                                         uint8_t* codes) {
  wait_for_earlier();
  const int64_t i = global_thread() / 32, row = i / count, g = first + i % count;
  if (row >= q.rows) return;
  const int64_t begin = g * q.group_size, n = min(q.group_size, q.cols - begin);
  const float* values = w + row * q.cols + begin;
  const GroupParams p = fit_group(values, n, {q.bits, q.symmetric, q.clip_search}, q.importance ? q.importance + begin : nullptr);
  if (threadIdx.x % 32 == 0) {
    q.scales[row * groups + g] = p.scale_f16;
    q.zeros[row * groups + g] = p.zero;
  }
  if (!codes) return;
  const float scale = half_to_float(p.scale_f16), zero = p.zero, top = float((1 << q.bits) - 1);
  for (int64_t j = threadIdx.x % 32; j < n; j += 32)
    codes[row * q.cols + begin + j] = uint8_t(int(round_limited(values[j], scale, -zero, top - zero) + zero));
}

}  // namespace

void fit_groups(Context& c, const Quantize& q, const float* w, int64_t first, int64_t count, uint8_t* codes) {
  launch<fit_groups_kernel>(c, per_element(q.rows * count * 32), q, w, ceil_div(q.cols, q.group_size), first, count, codes);
}

void quantize(Context& c, const Quantize& given) {
  Quantize q = given;
  require(q.bits >= 2 && q.bits <= 4, "bits must be 2, 3 or 4");
  require(q.cols > 0 && q.rows >= 0, "a quantized matrix needs at least one column");
  require(q.group_size > 0 && (q.group_size % 32 == 0 || q.group_size >= q.cols),
          "the group size must be a positive multiple of 32, or at least the number of columns");
  require(!q.u || q.order, "GPTQ needs the factor's order");
  if (q.rows == 0) return;
  if (q.group_size > q.cols) q.group_size = q.cols;
  clear_findings(c);
  float* w = c.scratch[slot_weights].get<float>(q.rows * q.cols);
  launch<load_weights_kernel>(c, per_element(q.rows * q.cols), q, w);
  find_non_finite(c, w, q.rows * q.cols, 1);
  if (q.u)
    solve_gptq(c, q, w);
  else
    fit_groups(c, q, w, 0, ceil_div(q.cols, q.group_size), q.codes);
  if (read_findings(c)) throw Failure{Status::non_finite, "the weight holds NaN or infinity and cannot be quantized"};
}

}  // namespace eac::cuda
