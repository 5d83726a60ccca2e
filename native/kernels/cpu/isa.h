// The vector kernels of one instruction set as a table of functions, chosen once at run time.
//
// LIMITS  Plain pointers only: the per-instruction-set files must not instantiate code that the linker could share
//         with the rest of the program (an inline function compiled for AVX2 must never reach the baseline).
//         Levels, weakest first: on x86-64 baseline (SSE2), avx2, avx512; on aarch64 baseline (NEON), dotprod, i8mm; elsewhere
//         baseline. EAC_MOE_ISA caps the choice: a level that the machine lacks falls to the best below it; a name that is none of
//         this architecture's levels caps nothing.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace eac {

// A QuantMatrix (layout: kernels/quant/quant_matrix.h).
struct QuantPanels {
  int bits;
  const uint8_t* codes;    // (panels, panel_bytes)
  const uint16_t* scales;  // (panels, groups, 16) f16
  const uint8_t* zeros;    // (panels, groups, 16)
  int64_t panel_bytes, groups, group_size;
};

// Tokens quantized to int8, value = scale * q, in blocks of 32, 64 or 128 channels that divide the groups of the weights.
struct Int8Tokens {
  const int8_t* q;     // (tokens, stride), zero up to the next multiple of 32 channels
  const float* scale;  // (tokens, blocks)
  const int32_t* sum;  // (tokens, blocks): of q
  int64_t stride, blocks, block;
};

// Where panels begin that will be read later, to be asked for in time.
struct PanelStart {
  const uint8_t* codes = nullptr;
  const uint16_t* scales = nullptr;
  const uint8_t* zeros = nullptr;
};

// out (n, 16 * panels; row stride ldout) = tokens · panels [panel, panel + panels) of w ^T.
struct Int8Dot {
  QuantPanels w;
  int64_t panel, panels, units;  // units: blocks of 32 channels
  Int8Tokens x;
  const int32_t* rows;  // token t is row rows[t] of x; null: row t
  int64_t n;
  float* out;
  int64_t ldout;
  PanelStart next = {};  // what will be read after these, or null
};

// One operand of a product while it is packed: element (i, k) lies at data[i * stride + k * k_stride].
struct PackSource {
  const void* data;
  DType dtype;
  int64_t stride, k_stride;
};

// y (tokens, rows) = beta * y + sum over the k blocks of x (tokens, k) · w (rows, k)^T + bias (rows).
struct DotPanel {
  int64_t k, rows, tokens;
  const float* w;  // (rows, k), row stride ldw
  const float* x;  // (tokens, k), row stride ldx
  int64_t ldw, ldx, ldy;
  float* acc;              // lane sums carried from one k block to the next: lanes * rows * tokens floats, 64-byte aligned
  bool first, last, beta;  // first block: the sums start at 0; last block: they are reduced and written to y
  const float* bias;       // or null
  float* y;
};

// The same for packed operands: y (tokens, rows) = beta * y + A · B^T + bias, rows at most those of a GEMM tile, tokens
// those of lane_panels.
struct LaneTile {
  int64_t k, tokens, rows;
  const float* a;     // panels of pack_lanes, gemm_f32.mr tokens each, the last as wide as gemm_f32.height(what is left)
  const float* b;     // one panel, gemm_f32.nr rows wide
  const float* bias;  // or null
  bool beta;
  float* y;
  int64_t ldy;
};

struct SoftmaxInfo {
  float max, sum;
};  // softmax = exp(x - max) / sum

// Logits on their way to a choice: distance = max - logit (NaN: infinite) gives the weight exp(-distance * inverse) and the bucket, the
// upper 16 bits of the distance as f32, 128 to each power of two. The first holds all below 2^-6, the last all from 1016 on.
struct SamplingWeights {
  static constexpr int32_t buckets = 2048, first = (127 - 6) << 7;
  const float* logits;
  float max, inverse;
  float* weight;
  int32_t* bucket;
};

constexpr int64_t tile_prefetch = 4;
// Floats of a panel of pack_lanes: its elements, and gaps between the lanes. lane_tile takes up to lane_panels of tokens.
constexpr int64_t lane_panel_size(int64_t k, int64_t width) { return k * width + 256; }
constexpr int64_t lane_panels = 4;

template <class T> struct GemmKernels {
  int mr, nr;  // register tile of C
  // Rows of the A panel for so many rows of C: the lowest tile that holds them.
  int (*height)(int64_t rows);
  // Packs `count` <= width rows (or columns) as [k][width], zero padded; multiplies by scale[k] if scale is not null.
  void (*pack)(PackSource source, int64_t width, int64_t count, int64_t k, const float* scale, T* out);
  // C tile (rows <= mr, cols <= nr) = alpha * A panel [k][height(rows)] · B [k][nr], row stride ldb, added to C if accumulate.
  // An element's sum runs over rising k, whatever the tile. B is read up to nr columns, also where cols is less.
  // `next`: what a later tile reads of B; k * tile_prefetch elements of it are asked for meanwhile, k * nr by the lower tiles.
  void (*tile)(int64_t k, T alpha, const T* a, const T* b, int64_t ldb, const T* next, bool accumulate, T* c, int64_t ldc,
               int64_t rows, int64_t cols);
};

// Loops at a limit of the machine: so many steps of so many operations (a multiply-add is two), and reading memory (a multiple of
// 256 bytes). sink: two elements, the first 0, the second written, so that nothing is optimised away.
struct LimitLoops {
  int64_t fma_operations, int8_operations;  // per step
  void (*fma)(int64_t steps, float* sink);
  void (*int8)(int64_t steps, int32_t* sink);
  void (*read)(const uint8_t* data, int64_t bytes, int32_t* sink);
};

struct Isa {
  const char* name;
  int lanes;  // f32 lanes of a vector
  GemmKernels<float> gemm_f32;
  GemmKernels<double> gemm_f64;

  // Dot products. Lane l of a sum takes the channels k = l (mod lanes) in rising order, then the lanes are halved until one is
  // left: an output is bit for bit the same whichever of these functions computed it.
  int token_tile;                        // tokens that dot_panel handles at a time
  int64_t k_block;                       // channels per block that suit the caches
  void (*dot_panel)(const DotPanel& p);  // k a multiple of 32
  // Many tokens: operands packed once, k a multiple of 32. `count` <= width rows, contiguous along k, become a panel of
  // lane_panel_size floats, zero padded; the order of its channels is lane_tile's own.
  void (*pack_lanes)(const float* in, int64_t stride, int64_t width, int64_t count, int64_t k, float* out);
  void (*lane_tile)(const LaneTile& t);
  // y[r] = dot(w row r, x), r < rows; k a multiple of 32. w: f32, f16 or bf16, row stride ldw in elements.
  void (*gemv)(DType dtype, const void* w, int64_t ldw, int64_t rows, int64_t k, const float* x, float* y);

  // Products with int8 activations: see int8.inl.
  int64_t int8_tokens;  // up to so many tokens, weights go from memory to registers
  void (*dot_int8)(const Int8Dot& d);
  // One row of n channels to int8: q up to the next multiple of 32, and scale and sum of each block.
  void (*quantize_int8)(const float* x, int64_t n, int64_t block, int8_t* q, float* scale, int32_t* sum);
  // Channels [k0, k0 + n) of the 16 rows of a panel in f32, k0 a multiple of 32; written up to the next multiple of 32.
  void (*dequantize)(const QuantPanels& w, int64_t panel, int64_t k0, int64_t n, float* out, int64_t ldout);
  void (*to_f32)(DType dtype, const void* in, int64_t n, float* out);  // f32, f16, bf16

  // Element-wise helpers of the other kernels. exp: within 2 ulp, exp(-inf) = 0, overflow is inf.
  void (*exp_f32)(const float* in, int64_t n, float* out);
  using Gated = void (*)(float* gate, const float* up, int64_t n);  // gate = activation(gate) * up: kernels/nn/activation.h
  Gated silu_mul, clamped_swiglu, gelu_mul, gelu_tanh_mul, relu_mul;
  SoftmaxInfo (*softmax_row)(float* x, int64_t n);  // in place; a row of -inf becomes zeros (sum 0)
  // One block of an online softmax: scores s[i], lo <= i < hi, become exp(s - max'), all others of the n zeros, with max' the new maximum
  // of *max and the scores; *max is updated, *shrink = exp(old max - max') is what earlier sums must be multiplied by. n a multiple of 16.
  // Returns the sum. Nothing to see and a *max of -inf: zeros, shrink 1 or 0.
  float (*softmax_block)(float* s, int64_t n, int64_t lo, int64_t hi, float* max, float* shrink);
  void (*blend_f32)(float a, float* y, float b, const float* x, int64_t n);  // y = a * y + b * x
  float (*dot_f32)(const float* a, const float* b, int64_t n);
  void (*axpy_f32)(float alpha, const float* x, float* y, int64_t n);  // y += alpha * x
  void (*scale_f32)(float alpha, float* x, int64_t n);

  // Rows of kernels/nn. Sums in f64.
  double (*sum_f64)(const float* x, int64_t n);
  double (*squares_f64)(const float* x, int64_t n, float shift);  // sum of (x - shift)^2
  // y = (x - shift) * scale * weight + bias; bias may be null, y may be x.
  void (*normalize)(const float* x, int64_t n, float shift, float scale, const float* weight, const float* bias, float* y);
  // Pairs of turning channels, (i, i + n) or interleaved, of `heads` heads, `stride` apart: by the angles position * frequencies[i], both
  // in f32, sine and cosine within 2 ulp for |angle| < 2^30, then times scale.
  void (*rotate)(float* x, int64_t heads, int64_t stride, const float* frequencies, int64_t n, float position, float scale,
                 bool interleaved);
  float (*max_f32)(const float* x, int64_t n);                    // NaN is passed over; -inf if nothing is left
  double (*sum_exp)(const float* x, int64_t n, float shift);      // of exp(x - shift)
  void (*sampling_weights)(const SamplingWeights& s, int64_t n);  // see SamplingWeights

  LimitLoops limits;
};

const Isa& isa();
// For tests and benchmarks: chooses a level by name for the whole process; false if this machine lacks it.
bool set_isa(const char* name);
constexpr int max_isas = 3;
// The levels of this machine, weakest first; returns how many (at most max_isas).
int available_isas(const Isa** out);
// The level that EAC_MOE_ISA = cap chooses on this machine; null: no cap.
const Isa& strongest_isa(const char* cap);

}  // namespace eac
