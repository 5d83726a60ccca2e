// The border between the addon and the CUDA library: one exported function that returns a table of functions over plain data.
//
// LIMITS  No CUDA type, C++ object or exception crosses it, so that the addon needs no CUDA header, library or driver, and a library
//         of another build is recognised by its version instead of being believed.
//         Every pointer is device memory unless its comment says host. Matrices are row-major f32 without gaps unless a comment says
//         otherwise. What each operation computes is defined with its CPU kernel (the header is named beside it); results agree within
//         rounding, not bit for bit. Operations are queued on the context's stream and return before they are done.
#pragma once
#include <cstddef>
#include <cstdint>

namespace eac::cuda {

inline constexpr uint32_t table_version = 3;

enum class Status : int32_t { ok, invalid_argument, out_of_memory, not_positive_definite, non_finite, failed };

// A device with a stream and scratch memory of its own. One thread at a time.
struct Context;
// A captured sequence of launches.
struct Graph;
// A place in a stream.
struct Event;

struct DeviceInfo {
  char name[256];
  int32_t major, minor;  // compute capability
  int32_t multiprocessors;
  int64_t total_memory, free_memory;  // bytes
};

enum class Storage : int32_t { f32, f16, bf16, quantized };

// W (rows × cols). Dense: row-major in `data`. Quantized: see weights.cuh; made by pack_weight.
struct Weight {
  Storage storage;
  int32_t bits;  // quantized: 2, 3 or 4
  int64_t rows, cols, group_size;
  const void* data;
  const void* params;  // quantized: scales and zero points
};

// The rows of a batch. Sequences lie one after the other; a register with one row a sequence has a batch of its own, lengths 1.
struct Batch {
  int64_t rows, sequences;
  int64_t longest, deepest;  // host: the most rows of a sequence; the most tokens that one attends to, its own included
  const int32_t* sequence;   // (rows)
  const int32_t* position;   // (rows)
  const int32_t* begin;      // (sequences) first row
  const int32_t* length;     // (sequences) rows
};

enum class Activation : int32_t { silu, gelu, gelu_tanh, relu, clamped_swiglu };  // kernels/nn/activation.h
enum class Scoring : int32_t { softmax, sigmoid, sparse_mixer };                  // kernels/router/select.h
enum class PruneMode : int32_t { drop, renormalize, reselect };
// exact: f32 activations, as far as the products allow (1e-5 relative); fast: bf16 activations in products with quantized or bf16 weights
enum class Precision : int32_t { exact, fast };

struct Embed {  // out[i] = scale * table[ids[i]]
  const int32_t* ids;
  Storage storage;
  const void* table;  // (vocabulary, width)
  float scale;
  int64_t rows, width;
  float* out;
};
struct Norm {  // kernels/nn/norm.h; bias null: rms
  const float* x;
  int64_t rows, width;
  Storage storage;
  const void *weight, *bias;
  float eps;
  float* out;
};
struct Linear {  // kernels/matmul/gemm.h: out (n × rows of w) = (add ? out : 0) + x w^T + bias
  const float* x;
  int64_t n;
  Weight weight;
  Storage bias_storage;
  const void* bias;  // or null
  bool add;
  Precision precision;
  float* out;
};
struct HeadLinear {  // kernels/matmul/head_linear.h: out[t, h, o] = sum over i of weight[h * out + o, i] x[t, h, i]
  const float* x;
  int64_t n, heads, x_width, out_width;  // widths: of a head's block in x and out
  Weight weight;                         // dense (heads * out, in)
  float* out;
};
struct Rope {  // kernels/nn/attention.h
  float* x;
  int64_t width, head_dim, offset, pairs;
  const float *frequencies, *long_frequencies;  // (pairs); long: or null
  float scale, long_scale;
  int64_t long_from;
  bool interleaved;
  Batch batch;
};
// kernels/nn/attention.h. `keys`, `values`: (sequences) device arrays, each sequence's cache of this layer, [tokens, kv_heads, dim]; null, or null
// for a sequence: it sees its own rows only. All arrays are aligned to 16 bytes; dims are multiples of 8.
struct Attention {
  const float *q, *k, *v;
  float* out;
  Batch batch;
  float *const *keys, *const *values;
  int64_t heads, kv_heads, head_dim, value_dim, window;  // window 0: none
  float scale;
  const float* sinks;  // (heads) or null
};
struct Router {
  Scoring scoring;
  int64_t experts, top_k;
  bool renormalize;
  float scale, jitter;
  const float* correction;  // (experts) or null
  int64_t groups, top_groups, group_best;
};
struct Route {  // kernels/router/select.h
  const float* logits;
  Router router;
  Batch batch;
  float* weights;    // (rows, top_k)
  int32_t* indices;  // (rows, top_k)
  int32_t* counts;   // (sequences, experts)
};
struct Prune {  // apply_expert_mask of kernels/router/select.h
  const float* logits;
  Router router;
  Batch batch;
  PruneMode mode;
  const uint8_t* keep;  // (sequences, experts)
  float* weights;
  int32_t* indices;
};
struct
    PesfMask {  // EAC-MoE, Eq. 6: keep[s, e] = counts[s, e] * experts >= threshold * tokens of s; all of a sequence shorter than min_tokens
  const int32_t* counts;
  Batch batch;
  int64_t experts;
  double threshold;  // alpha * top_k
  int64_t min_tokens;
  uint8_t* keep;  // (sequences, experts)
};
// One expert. Biases f32, or null.
struct Expert {
  Weight gate, up, down;
  const float *gate_bias, *up_bias, *down_bias;
};
struct Experts {  // kernels/moe/experts.h
  const float* x;
  int64_t n, width;
  const float* weights;    // (n, top_k)
  const int32_t* indices;  // (n, top_k), -1: no expert
  int64_t top_k, experts, hidden;
  const Expert* list;    // (experts, and the shared one behind them) in device memory
  const Expert* shapes;  // host: the same list
  bool shared;
  int64_t shared_hidden;
  Weight output_gate;  // of the shared expert (1 × width); data null: none
  Activation activation;
  bool add;
  Precision precision;
  float* out;
};
struct Glu {
  Activation activation;
  float* gate;
  const float* up;
  int64_t n;
};
struct Scale {  // x *= scale
  float* x;
  float scale;
  int64_t n;
};
struct AddScaled {  // out += scale * x
  const float* x;
  float* out;
  float scale;
  int64_t n;
};
struct Columns {  // out[t, h, to + i] = x[t, h, from + i], i < count
  const float* x;
  int64_t rows, heads, x_width, out_width, from, to, count;  // widths: of a head
  float* out;
};
struct LastRows {  // out[s] = the last row of sequence s
  const float* x;
  int64_t width;
  Batch batch;
  float* out;
};
struct GatherRows {  // out[i] = x[indices[i]]
  const float* x;
  const int32_t* indices;
  int64_t rows, width;
  float* out;
};
struct Sample {  // kernels/nn/output.h
  const float* logits;
  int64_t rows, vocabulary;
  float temperature;
  int64_t top_k;
  double top_p;
  const double* uniform;  // (rows)
  int32_t* ids;
};
struct PackWeight {  // from the layout of kernels/quant/quant_matrix.h to weights.cuh
  int32_t bits;
  int64_t rows, cols, group_size;
  const uint8_t* codes;    // (panels, panel_bytes)
  const uint16_t* scales;  // f16 (panels, groups, 16)
  const uint8_t* zeros;    // (panels, groups, 16)
  void *data, *params;     // out, of the sizes that weight_bytes gives
};
struct WeightBytes {
  size_t data, params;
};

// Calibration: kernels/quant/quantize.h, kernels/router/calibrate.h.
struct Hessian {  // h += x^T diag(w) x
  const float* x;
  int64_t m, n;
  const float* weights;  // (m) or null
  float* h;              // (n, n)
};
struct Cross {  // d += (x_full - x)^T diag(w) x
  const float *x_full, *x;
  int64_t m, n;
  const float* weights;
  float* d;
};
struct Factor {  // H^-1 = U^T U of the damped, ordered H
  const float* h;
  int64_t n;
  double damping;
  bool act_order;
  int32_t* order;   // (n)
  float* diagonal;  // (n)
  float* u;         // (n, n), zeros below the diagonal
};
struct TwoStream {  // out = w + beta w d H^-1
  Storage storage;
  const void* w;  // (rows, n)
  int64_t rows, n;
  const int32_t* order;
  const float *u, *d;
  float beta;
  float* out;
};
struct Quantize {  // round to nearest, or GPTQ where u is given
  Storage storage;
  const void* w;  // (rows, cols)
  int64_t rows, cols;
  int32_t bits;
  int64_t group_size;
  bool symmetric, clip_search, act_order;
  const float* importance;  // (cols) or null: for the clip search
  const int32_t* order;
  const float* u;
  uint8_t* codes;     // (rows, cols)
  uint16_t* scales;   // f16 (rows, groups)
  uint8_t* zeros;     // (rows, groups)
  double* row_error;  // (rows): GPTQ only, its residuals
};
struct CalibrateRouter {
  const float *w, *x, *targets;  // (experts, width), (n, width), (n, experts)
  int64_t experts, width, n, k;
  double ridge, tolerance;
  int32_t max_iterations;
  float* out;           // (experts, width)
  int32_t* iterations;  // host
  double* loss;         // host: before and after
};

struct Table {
  uint32_t version;
  size_t bytes;  // of this struct

  // How many devices answer; `why` says what is missing where there are none (0), what is wrong where none answers (-1).
  int32_t (*probe)(char* why, size_t size);
  Status (*describe)(int32_t device, DeviceInfo* info);
  Status (*open)(int32_t device, Context** context);
  void (*close)(Context*);
  const char* (*error)(const Context*);  // what the last failed call said
  Status (*synchronize)(Context*);

  Status (*allocate)(Context*, size_t bytes, void** memory);
  void (*free)(void* memory);
  Status (*allocate_host)(Context*, size_t bytes, void** memory);  // pinned; kernels may read it
  void (*free_host)(void* memory);
  Status (*upload)(Context*, void* to, const void* from,
                   size_t bytes);  // the source may be changed on return, unless it is pinned
  Status (*download)(Context*, void* to, const void* from, size_t bytes);  // waits
  Status (*copy)(Context*, void* to, const void* from, size_t bytes);      // within the device
  Status (*zero)(Context*, void* memory, size_t bytes);

  // Between the two, operations are recorded instead of queued; all must have run once before with arguments of the same sizes.
  Status (*begin_capture)(Context*);
  Status (*end_capture)(Context*, Graph**);
  Status (*launch)(Context*, Graph*);
  void (*free_graph)(Graph*);
  // Frees scratch memory; operations take it again.
  Status (*trim)(Context*);
  // Changes when scratch memory was moved: graphs captured before must not be launched any more.
  uint64_t (*scratch_moves)(const Context*);

  // *event: null, or one to use again. `wait`: what is queued from now on waits for it, whichever context recorded it.
  Status (*record)(Context*, Event** event);
  Status (*wait)(Context*, Event* event);
  void (*free_event)(Event*);

  Status (*embed)(Context*, const Embed*);
  Status (*norm)(Context*, const Norm*);
  Status (*linear)(Context*, const Linear*);
  Status (*head_linear)(Context*, const HeadLinear*);
  Status (*rope)(Context*, const Rope*);
  Status (*attention)(Context*, const Attention*);
  Status (*route)(Context*, const Route*);
  Status (*prune)(Context*, const Prune*);
  Status (*pesf_mask)(Context*, const PesfMask*);
  Status (*experts)(Context*, const Experts*);
  Status (*glu)(Context*, const Glu*);
  Status (*scale)(Context*, const Scale*);
  Status (*add_scaled)(Context*, const AddScaled*);
  Status (*columns)(Context*, const Columns*);
  Status (*last_rows)(Context*, const LastRows*);
  Status (*gather_rows)(Context*, const GatherRows*);
  Status (*sample)(Context*, const Sample*);

  WeightBytes (*weight_bytes)(int32_t bits, int64_t rows, int64_t cols, int64_t group_size);
  Status (*pack_weight)(Context*, const PackWeight*);

  Status (*hessian)(Context*, const Hessian*);
  Status (*cross)(Context*, const Cross*);
  Status (*factor)(Context*, const Factor*);
  Status (*two_stream)(Context*, const TwoStream*);
  Status (*quantize)(Context*, const Quantize*);
  Status (*calibrate_router)(Context*, const CalibrateRouter*);
};

}  // namespace eac::cuda

// The library's only exported name.
extern "C" __attribute__((visibility("default"))) const eac::cuda::Table* eac_moe_cuda();
