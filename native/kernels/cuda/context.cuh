// What every operation has at hand: the stream, scratch memory, and errors as exceptions, which table.cu turns into a status.
#pragma once
#include <string>

#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/table.h"

namespace eac::cuda {

struct Failure {
  Status status;
  std::string message;
};

inline void require(bool condition, const char* message) {
  if (!condition) throw Failure{Status::invalid_argument, message};
}
// Throws what the runtime says, with what was being done. The runtime forgets it, or the next launch, which asks for the last error, would fail, too.
void check(cudaError_t status, const char* doing);
void check_allocation(cudaError_t status, size_t bytes, const char* where);

// Device memory that grows to what was asked for and is kept. It must not grow while launches are captured: run once before.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { cudaFree(memory_); }
  // Room for n elements; contents are lost.
  template <class T> T* get(int64_t n) { return static_cast<T*>(bytes(size_t(n) * sizeof(T))); }
  void release();
  uint64_t moves() const { return moves_; }

 private:
  void* bytes(size_t n);
  void* memory_ = nullptr;
  size_t size_ = 0;
  uint64_t moves_ = 0;
};

struct Context {
  int device = 0;
  int multiprocessors = 1;
  bool wgmma = false;    // products may use it
  bool overlap = false;  // launches may start before the one before them has ended
  cudaStream_t stream = nullptr;
  bool behind_launch = false;  // what was queued last is a launch
  std::string error;
  static constexpr int scratches = 12;
  Scratch scratch[scratches];  // an operation may use all of them
};

struct Graph {
  cudaGraphExec_t launches;
};
struct Event {
  cudaEvent_t event;
};

// A launch overlaps with a launch only: behind copies, events and graphs, whose weights or lists it may read before it waits, it starts when they are done.
template <auto kernel, class... Args> void launch(Context& c, const Grid& grid, Args... args) {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;  // nothing to do
  if (c.overlap) divide_l1_alike<kernel>();
  check(launch_kernel<kernel>(c.stream, grid, c.overlap && c.behind_launch, args...), "a kernel launch");
  c.behind_launch = true;
}
// The stream, for whatever is no launch.
inline cudaStream_t stream_of(Context& c) {
  c.behind_launch = false;
  return c.stream;
}

template <class T> __host__ __device__ constexpr T ceil_div(T a, T b) { return (a + b - 1) / b; }
// One thread an element, 256 a block.
inline Grid per_element(int64_t n) { return {dim3(unsigned(ceil_div<int64_t>(n, 256))), dim3(256)}; }
__device__ __forceinline__ int64_t global_thread() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// Element i of stored floats.
__device__ __forceinline__ float load_float(Storage storage, const void* data, int64_t i) {
  if (storage == Storage::f32) return static_cast<const float*>(data)[i];
  const uint16_t h = static_cast<const uint16_t*>(data)[i];
  return storage == Storage::bf16 ? __uint_as_float(uint32_t(h) << 16) : half_to_float(h);
}

// Over the lanes of a warp; every lane gets the result.
template <class T> __device__ __forceinline__ T warp_sum(T v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}
template <class T> __device__ __forceinline__ T warp_max(T v) {
  for (int step = 16; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, v, step);
    v = v > other ? v : other;
  }
  return v;
}
// Over a block of whole warps, at most 1024 threads; every thread gets the result. `shared`: 33 values. All threads must call.
template <class T> __device__ T block_sum(T v, T* shared) {
  v = warp_sum(v);
  __syncthreads();  // what an earlier call left has been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    v = warp_sum(threadIdx.x < (blockDim.x + 31) / 32 ? shared[threadIdx.x] : T(0));
    if (threadIdx.x == 0) shared[32] = v;
  }
  __syncthreads();
  return shared[32];
}

// Sets wgmma and overlap: asks the GPU whether it runs code for Hopper. EAC_MOE_CUDA_WGMMA=0, EAC_MOE_CUDA_OVERLAP=0: not wanted.
void find_features(Context& c);

// One function an operation, in the file of its name; each queues its launches on the context's stream.
void embed(Context&, const Embed&);
void norm(Context&, const Norm&);
void linear(Context&, const Linear&);
void head_linear(Context&, const HeadLinear&);
void rope(Context&, const Rope&);
void attention(Context&, const Attention&);
void route(Context&, const Route&);
void prune(Context&, const Prune&);
void pesf_mask(Context&, const PesfMask&);
void experts(Context&, const Experts&);
void glu(Context&, const Glu&);
void scale(Context&, const Scale&);
void add_scaled(Context&, const AddScaled&);
void columns(Context&, const Columns&);
void last_rows(Context&, const LastRows&);
void gather_rows(Context&, const GatherRows&);
void sample(Context&, const Sample&);
WeightBytes weight_bytes(int32_t bits, int64_t rows, int64_t cols, int64_t group_size);
void pack_weight(Context&, const PackWeight&);
void hessian(Context&, const Hessian&);
void cross(Context&, const Cross&);
void factor(Context&, const Factor&);
void two_stream(Context&, const TwoStream&);
void quantize(Context&, const Quantize&);
void calibrate_router(Context&, const CalibrateRouter&);

}  // namespace eac::cuda
