// The part of the CUDA runtime that the library uses, over host memory: see emulation.h.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "emulation.h"
#include "streams.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __constant__
#define __align__(n) alignas(n)
#define __shared__ static  // one block runs at a time

#define threadIdx (::eac::emulation::thread_index())
#define blockIdx (::eac::emulation::block_index())
#define blockDim (::eac::emulation::block_size())
#define gridDim (::eac::emulation::grid_size())

using dim3 = eac::emulation::Size;
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct int2 {
  int32_t x, y;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct double2 {
  double x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

// Barriers and exchanges between lanes. Lanes that have ended take no part, as on the GPU.
inline void __syncthreads() { eac::emulation::barrier_block(); }
inline void __syncwarp(uint32_t = 0xffffffffu) { eac::emulation::barrier_warp(); }
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T> T shuffled(T mine, int from) {
  T v;
  const unsigned char* all = eac::emulation::exchange(&mine, sizeof(T));
  std::memcpy(&v, all + size_t(from) * 64, sizeof(T));
  eac::emulation::leave_exchange();
  return v;
}
template <class T> T __shfl_sync(uint32_t, T v, int from, int width = 32) {
  const int lane = eac::emulation::lane();
  return shuffled(v, lane / width * width + (from % width + width) % width);
}
template <class T> T __shfl_xor_sync(uint32_t, T v, int mask, int width = 32) {
  const int lane = eac::emulation::lane(), from = lane ^ mask;
  return shuffled(v, from / width == lane / width ? from : lane);
}
template <class T> T __shfl_down_sync(uint32_t, T v, int by, int width = 32) {
  const int lane = eac::emulation::lane(), from = lane + by;
  return shuffled(v, from / width == lane / width ? from : lane);
}
template <class T> T __shfl_up_sync(uint32_t, T v, int by, int width = 32) {
  const int lane = eac::emulation::lane(), from = lane - by;
  return shuffled(v, from >= 0 && from / width == lane / width ? from : lane);
}
inline uint32_t __ballot_sync(uint32_t, int vote) {
  uint32_t bits = 0;
  const uint32_t live = eac::emulation::live_lanes();
  const unsigned char* all = eac::emulation::exchange(&vote, sizeof vote);
  for (int l = 0; l < 32; l++) {
    int v;
    std::memcpy(&v, all + l * 64, sizeof v);
    if ((live >> l & 1) && v) bits |= 1u << l;
  }
  eac::emulation::leave_exchange();
  return bits;
}
inline int __any_sync(uint32_t m, int vote) { return __ballot_sync(m, vote) != 0; }
inline int __all_sync(uint32_t m, int vote) {
  const uint32_t live = eac::emulation::live_lanes();
  return __ballot_sync(m, vote) == live;
}

template <class T, class F> T reduced(T mine, F f) {
  const uint32_t live = eac::emulation::live_lanes();
  const unsigned char* all = eac::emulation::exchange(&mine, sizeof mine);
  for (int l = 0; l < 32; l++) {
    T v;
    std::memcpy(&v, all + l * 64, sizeof v);
    if (live >> l & 1) mine = f(mine, v);
  }
  eac::emulation::leave_exchange();
  return mine;
}
template <class T> T __reduce_max_sync(uint32_t, T v) {
  return reduced(v, [](T a, T b) { return std::max(a, b); });
}
template <class T> T __reduce_min_sync(uint32_t, T v) {
  return reduced(v, [](T a, T b) { return std::min(a, b); });
}

// One thread runs at a time.
template <class T> T exchanged(T* at, T v) {
  const T old = *at;
  *at = v;
  return old;
}
template <class T, class U> T atomicAdd(T* at, U v) { return exchanged(at, T(*at + T(v))); }
template <class T, class U> T atomicMax(T* at, U v) { return exchanged(at, std::max(*at, T(v))); }
template <class T, class U> T atomicMin(T* at, U v) { return exchanged(at, std::min(*at, T(v))); }
template <class T, class U> T atomicOr(T* at, U v) { return exchanged(at, T(*at | T(v))); }
template <class T, class U> T atomicExch(T* at, U v) { return exchanged(at, T(v)); }
template <class T, class U, class V> T atomicCAS(T* at, U expected, V v) {
  return exchanged(at, *at == T(expected) ? T(v) : *at);
}

inline float __uint_as_float(uint32_t u) { return std::bit_cast<float>(u); }
inline uint32_t __float_as_uint(float f) { return std::bit_cast<uint32_t>(f); }
inline float __int_as_float(int32_t i) { return std::bit_cast<float>(i); }
inline int32_t __float_as_int(float f) { return std::bit_cast<int32_t>(f); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class A, class B> auto min(A a, B b) { return a < b ? a : b; }
template <class A, class B> auto max(A a, B b) { return a > b ? a : b; }

// Memory and streams. The next launch may overlap the last one.
enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum { cudaStreamNonBlocking = 1, cudaStreamCaptureModeThreadLocal = 1, cudaDevAttrMultiProcessorCount = 16 };
enum { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };
enum { cudaEventDisableTiming = 2 };
namespace eac::emulation {
using Queue = std::vector<Task>;
// What has been queued since a capture began, or null.
extern thread_local Queue* capturing;
}  // namespace eac::emulation
struct EmulatedGraph {
  eac::emulation::Queue queue;
};
using cudaGraph_t = EmulatedGraph*;
using cudaGraphExec_t = EmulatedGraph*;
struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
};

namespace eac::emulation {
inline const char* last_error = "";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    case cudaErrorLaunchFailure: return eac::emulation::last_error;
    default: return "error";
  }
}
inline cudaError_t cudaDriverGetVersion(int* v) { return *v = 13000, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
inline cudaError_t cudaSetDevice(int d) { return d == 0 ? cudaSuccess : cudaErrorInvalidValue; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  std::strcpy(p->name, "emulation");
  p->major = 9, p->minor = 0, p->multiProcessorCount = 4;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* v, int which, int) {
  *v = which == cudaDevAttrMultiProcessorCount ? 4 : which == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return cudaSuccess;
}
// EAC_EMULATION_MEMORY: bytes that there are, for tests of what does not fit.
inline size_t emulated_memory() {
  const char* m = std::getenv("EAC_EMULATION_MEMORY");
  return m ? std::strtoull(m, nullptr, 10) : size_t(64) << 30;
}
inline size_t emulated_used = 0;
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  if (eac::emulation::lost()) return cudaErrorIllegalAddress;
  *total = emulated_memory();
  *free = *total > emulated_used ? *total - emulated_used : 0;
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** p, size_t n) {
  if (eac::emulation::capturing) return cudaErrorInvalidValue;
  if (eac::emulation::lost()) return cudaErrorIllegalAddress;
  if (emulated_used + n > emulated_memory()) return cudaErrorMemoryAllocation;
  unsigned char* raw = static_cast<unsigned char*>(std::aligned_alloc(256, (n + 511) / 256 * 256));
  if (!raw) return cudaErrorMemoryAllocation;
  std::memcpy(raw, &n, sizeof n);
  std::memset(raw + 256, 0xff, n);  // NaN
  emulated_used += n;
  *p = raw + 256;
  return cudaSuccess;
}
template <class T> cudaError_t cudaMalloc(T** p, size_t n) { return cudaMalloc(reinterpret_cast<void**>(p), n); }
inline cudaError_t finish_launches() {
  const char* error = eac::emulation::finish();
  if (error) eac::emulation::last_error = error;
  return error ? cudaErrorLaunchFailure : cudaSuccess;
}
inline cudaError_t cudaFree(void* p) {
  if (!p) return cudaSuccess;
  eac::emulation::finish_streams();
  const cudaError_t status = finish_launches();
  unsigned char* raw = static_cast<unsigned char*>(p) - 256;
  size_t n;
  std::memcpy(&n, raw, sizeof n);
  emulated_used -= n;
  std::free(raw);
  return status;
}
inline cudaError_t cudaMallocHost(void** p, size_t n) {
  if (!(*p = std::malloc(n))) return cudaErrorMemoryAllocation;
  return eac::emulation::note_pinned(*p, n), cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* p) {
  eac::emulation::finish_streams();
  const cudaError_t status = finish_launches();
  eac::emulation::note_pinned(p, 0);
  return std::free(p), status;
}
// Given to the stream, or noted down while a graph is captured.
inline cudaError_t queue(cudaStream_t stream, eac::emulation::Task work, bool launch = false) {
  eac::emulation::note_launch(stream, launch);
  if (!eac::emulation::capturing) return eac::emulation::submit(stream, std::move(work));
  eac::emulation::capturing->push_back(std::move(work));
  return cudaSuccess;
}
inline eac::emulation::Task after_launches(std::function<void()> work) {
  return [=] {
    const cudaError_t status = finish_launches();
    if (status == cudaSuccess) work();
    return status;
  };
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind kind, cudaStream_t s) {
  const auto copy = [=](const void* source) { return after_launches([=] { std::memcpy(to, source, n); })(); };
  if (eac::emulation::capturing || kind != cudaMemcpyHostToDevice) return queue(s, [=] { return copy(from); });
  eac::emulation::note_launch(s, false);
  return eac::emulation::submit_copy(s, from, n, copy);
}
inline cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t s) {
  return queue(s, after_launches([=] { std::memset(p, v, n); }));
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) {
  return *s = eac::emulation::make_stream(), eac::emulation::lost() ? cudaErrorIllegalAddress : cudaSuccess;
}
// Not allowed while a graph is captured, as on the GPU.
inline cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  if (eac::emulation::capturing) return cudaErrorInvalidValue;
  const cudaError_t queued = eac::emulation::finish_stream(s), last = finish_launches();
  return queued != cudaSuccess ? queued : last;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t s) { return cudaStreamSynchronize(s); }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned = 0) {
  eac::emulation::note_launch(s, false);
  return eac::emulation::wait_for(s, e), cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return *e = eac::emulation::make_event(), cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  const cudaError_t status = queue(s, finish_launches);
  return eac::emulation::record(e, s), status;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t e) { return eac::emulation::free_event(e), cudaSuccess; }
// A graph is the list of what was queued meanwhile. One capture at a time.
inline cudaError_t cudaStreamBeginCapture(cudaStream_t s, int) {
  eac::emulation::note_launch(s, false);
  eac::emulation::capturing = new eac::emulation::Queue;
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* g) {
  *g = new EmulatedGraph{std::move(*eac::emulation::capturing)};
  delete eac::emulation::capturing;
  eac::emulation::capturing = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long) {
  return *e = new EmulatedGraph{g->queue}, cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t g) { return delete g, cudaSuccess; }
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t g, cudaStream_t s) {
  return queue(s, [all = g->queue] {
    for (const auto& work : all)
      if (const cudaError_t status = work(); status != cudaSuccess) return status;
    return cudaSuccess;
  });
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g) { return delete g, cudaSuccess; }
