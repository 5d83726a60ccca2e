// What the kernels need of the GPU beyond CUDA C++: launching, and a few instructions by name. The tests have a second version of this file
// that runs kernels on the CPU (test/native/cuda/emulation), so nothing else may hold inline PTX or <<<>>>.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>

namespace eac::cuda {

struct Grid {
  dim3 blocks, threads;
  size_t shared = 0;  // bytes of dynamic shared memory
};

// Code for Hopper: sm_90a. What only Hopper has is in `if (on_hopper)`, of which the compiler leaves nothing elsewhere.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
inline constexpr bool on_hopper = true;
#else
inline constexpr bool on_hopper = false;
#endif

// Lets the kernel have `bytes` of dynamic shared memory. What it declares besides counts, too, so a launch asks from below the 48 KB that all may have.
// Kernels keep the most that a launch has asked for: another thread may be launching with more than this one wants.
template <auto kernel> cudaError_t allow_shared(size_t bytes) {
  static std::mutex mutex;
  static size_t most = 0;
  const std::lock_guard lock(mutex);
  const size_t all = bytes > most ? bytes : most;
  const cudaError_t status =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(all));
  if (status == cudaSuccess) most = all;
  return status;
}

// Asks that a multiprocessor's L1 be divided for the kernel as it is for those with the most shared memory: one that wants it otherwise than the
// launch before it could only start where that has ended.
template <auto kernel> void divide_l1_alike() {
  static const bool asked = [] {
    if (cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared) != cudaSuccess)
      (void)cudaGetLastError();  // it is a wish
    return true;
  }();
  (void)asked;
}

// kernel<<<>>>(args...). Limit of shared memory for every architecture: 96 KB, and up to 1 KB declared; of Hopper's kernels 227 KB together.
// overlap: it may start while the launch before it runs; see wait_for_earlier().
template <auto kernel, class... Args>
cudaError_t launch_kernel(cudaStream_t stream, const Grid& grid, bool overlap, Args... args) {
  if (grid.shared > 32 * 1024) {
    const cudaError_t status = allow_shared<kernel>(grid.shared);
    if (status != cudaSuccess) return status;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks, config.blockDim = grid.threads, config.dynamicSmemBytes = grid.shared, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = overlap;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Until all that was queued before this launch is done and its results can be seen; from then on the next launch may start (when every block has
// come so far). Every thread of every kernel calls it, first of all. Before it a kernel may only read what no launch writes (weights), or what
// was there before the launch before this one began to work, and write its registers and dynamic shared memory. A kernel that lets the next start
// before it has waited itself leaves the next one only the former.
// Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, griddepcontrol.
__device__ __forceinline__ void let_next_start() {
  if constexpr (on_hopper) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void wait_for_earlier() {
  if constexpr (on_hopper) asm volatile("griddepcontrol.wait;" ::: "memory");
  let_next_start();
}

template <class T> __device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
// v, which the compiler keeps in a register, where it would compute it once more for each use.
__device__ __forceinline__ uint32_t fixed(uint32_t v) {
  asm volatile("" : "+r"(v));
  return v;
}

// Two floats rounded to nearest even as bf16, `low` in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
// a * b + c on pairs, rounded once.
__device__ __forceinline__ uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
// a & mask | bits as one instruction, which the compiler makes two of if mask and bits are constants.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(mask), "r"(bits));
  return r;
}
__device__ __forceinline__ float half_to_float(uint16_t h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
__device__ __forceinline__ uint16_t float_to_half(float f) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}

// Tensor cores, PTX ISA "Warp-level matrix instructions": d += a b, a by rows, b by columns. Lane l, r = l / 4, c = l % 4:
//   a (16 × 16 bf16)  pairs (r, 2c) (r + 8, 2c) (r, 2c + 8) (r + 8, 2c + 8)
//   b (16 × 8 bf16)   pairs of rows (2c, r) (2c + 8, r)
//   d (16 × 8 f32)    (r, 2c) (r, 2c + 1) (r + 8, 2c) (r + 8, 2c + 1)
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// f64: a (8 × 4) is (r, c), b (4 × 8) is (c, r), d (8 × 8) are (r, 2c) (r, 2c + 1).
__device__ __forceinline__ void mma_f64(double (&d)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
               : "+d"(d[0]), "+d"(d[1])
               : "d"(a), "d"(b));
}
// Four 8 × 8 matrices of 16-bit elements from shared memory; lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned) and gets
// of each matrix the pair (l / 4, 2 (l % 4)); `transposed`: of its transpose.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes from global to shared memory, both aligned to 16, while the thread goes on; zeros if not `valid`.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid = true) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}
// To a shared_address().
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most n of this thread's groups are under way; other threads' copies need a barrier besides.
template <int n> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory"); }

// Loads of what is read once: past the L1.
__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ uint2 load_once(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
__device__ __forceinline__ uint32_t load_once(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// The 128 bytes that hold *p will be read, by another launch perhaps.
__device__ __forceinline__ void fetch_to_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
// Of what an earlier launch wrote, before wait_for_earlier(): from the L2. Until then an SM's L1 may hold what was there before.
__device__ __forceinline__ int32_t load_written(const int32_t* p) {
  int32_t v;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Hopper's instructions: PTX ISA "Asynchronous warpgroup level matrix instructions", "mbarrier", "setmaxnreg".

// Barriers in shared memory (8 bytes each): a phase ends when `count` arrivals have come. `parity`: of the phase waited for, 0 for the first.
__device__ __forceinline__ void signal_create(uint64_t* signal, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(signal)), "r"(count) : "memory");
}
__device__ __forceinline__ void signal_arrive(uint64_t* signal) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(signal)) : "memory");
}
__device__ __forceinline__ void signal_wait(uint64_t* signal, int parity) {
  uint32_t done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(shared_address(signal)), "r"(parity)
                 : "memory");
  } while (!done);
}
// A barrier of `threads` of the block's threads, whole warps. Number 0 is __syncthreads().
template <int number, int threads> __device__ __forceinline__ void barrier_of() {
  asm volatile("bar.sync %0, %1;" ::"n"(number), "n"(threads) : "memory");
}
// What this thread wrote to shared memory becomes visible to wgmma (of threads that a barrier tells).
__device__ __forceinline__ void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The registers of each thread of this warpgroup, which all of its warps change.
template <int n> __device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
}
template <int n> __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
}

// A warpgroup: d = a b, or d += a b, asynchronously. a (64 × 16 bf16): rows 16 w .. 16 w + 15 in warp w as in mma_bf16, or in shared memory, by rows;
// b (16 × n) in shared memory, by columns: where, matrix descriptors say. d (64 × n f32) in warp w as n / 8 tiles of mma_bf16.
// wgmma_fence() comes before a product if a or d have been touched; they must not be until wgmma_wait() with them.
#define EAC_D8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define EAC_D32(d, i) EAC_D8(d, i), EAC_D8(d, i + 8), EAC_D8(d, i + 16), EAC_D8(d, i + 24)
#define EAC_D32_NAMES \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define EAC_D64_NAMES EAC_D32_NAMES EAC_D32_MORE
#define EAC_D32_MORE                                                                                                           \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%" \
  "62,%63"
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" EAC_D64_NAMES
               "}, {%64,%65,%66,%67}, %68, p, 1, 1, 0; }"
               : EAC_D32(d, 0), EAC_D32(d, 32)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" EAC_D32_NAMES
               "}, {%32,%33,%34,%35}, %36, p, 1, 1, 0; }"
               : EAC_D32(d, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" EAC_D64_NAMES
               "}, %64, %65, p, 1, 1, 0, 0; }"
               : EAC_D32(d, 0), EAC_D32(d, 32)
               : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" EAC_D32_NAMES
               "}, %32, %33, p, 1, 1, 0, 0; }"
               : EAC_D32(d, 0)
               : "l"(a), "l"(b));
}
// Until at most n of the warpgroup's committed groups are under way.
template <int n> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}
// Until all are done: d is the thread's own again, which the compiler must not believe any earlier.
template <int n> __device__ __forceinline__ void wgmma_done(float (&d)[n]) {
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < n; i++) asm volatile("" : "+f"(d[i])::"memory");
}
#undef EAC_D8
#undef EAC_D32
#undef EAC_D32_NAMES
#undef EAC_D32_MORE
#undef EAC_D64_NAMES

}  // namespace eac::cuda
