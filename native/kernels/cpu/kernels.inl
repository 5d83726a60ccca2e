// One instruction set's table, from the shared source. The including file defines EAC_LANES (f32 lanes), EAC_ISA_NAME,
// EAC_ISA_TABLE, EAC_TOKEN_TILE and EAC_K_BLOCK, EAC_MR and EAC_NV (GEMM tile: rows, vectors),
// EAC_INT8_PANELS, EAC_INT8_TOKENS (int8 tile), EAC_INT8_PANELS_ONE (for one token) and EAC_INT8_PREFETCH (bytes), and opens namespace eac { namespace {
// with its own primitives before it, simd.inl included.

#include "kernels/cpu/gemm.inl"
#include "kernels/cpu/dot.inl"
#include "kernels/cpu/elementwise.inl"
#include "kernels/cpu/nn.inl"
#include "kernels/cpu/int8.inl"
#include "kernels/cpu/limits.inl"

}  // namespace

extern const Isa EAC_ISA_TABLE;
const Isa EAC_ISA_TABLE = {
    .name = EAC_ISA_NAME,
    .lanes = L,
    .gemm_f32 = {EAC_MR, EAC_NV* L, tile_height<float, EAC_MR, EAC_NV>, pack<float>, tile<float, EAC_MR, EAC_NV>},
    .gemm_f64 = {EAC_MR, EAC_NV* L / 2, tile_height<double, EAC_MR, EAC_NV>, pack<double>, tile<double, EAC_MR, EAC_NV>},
    .token_tile = EAC_TOKEN_TILE,
    .k_block = EAC_K_BLOCK,
    .dot_panel = dot_panel,
    .pack_lanes = pack_lanes,
    .lane_tile = lane_tile,
    .gemv = gemv,
    .int8_tokens = EAC_INT8_TOKENS,
    .dot_int8 = dot_int8,
    .quantize_int8 = quantize_int8,
    .dequantize = dequantize,
    .to_f32 = to_f32,
    .exp_f32 = exp_f32,
    .silu_mul = gated<silu_mul>,
    .clamped_swiglu = gated<clamped_swiglu>,
    .gelu_mul = gated<gelu_mul>,
    .gelu_tanh_mul = gated<gelu_tanh_mul>,
    .relu_mul = gated<relu_mul>,
    .softmax_row = softmax_row,
    .softmax_block = softmax_block,
    .blend_f32 = blend_f32,
    .dot_f32 = dot_f32,
    .axpy_f32 = axpy_f32,
    .scale_f32 = scale_f32,
    .sum_f64 = sum_f64,
    .squares_f64 = squares_f64,
    .normalize = normalize,
    .rotate = rotate,
    .max_f32 = max_f32,
    .sum_exp = sum_exp,
    .sampling_weights = sampling_weights,
    .limits = {fma_sums * 2 * L, int8_operations, fma_limit, int8_limit, read_limit},
};

}  // namespace eac
