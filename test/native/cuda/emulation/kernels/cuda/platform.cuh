// Takes the place of native/kernels/cuda/platform.cuh: the same functions, lane by lane.
#pragma once
#include <cuda_runtime.h>

#include "core/dtype.h"

namespace eac::cuda {

struct Grid {
  dim3 blocks, threads;
  size_t shared = 0;
};

template <auto kernel, class... Args> cudaError_t launch_kernel(cudaStream_t, const Grid& grid, Args... args) {
  return queue([=] {
    const char* error = emulation::run(grid.blocks, grid.threads, grid.shared, [&] { kernel(args...); });
    if (error) emulation::last_error = error;
    return error ? cudaErrorLaunchFailure : cudaSuccess;
  });
}

template <class T> T* dynamic_shared() { return reinterpret_cast<T*>(emulation::dynamic_memory()); }

inline float bf16_low(uint32_t pair) { return bf16_to_f32(uint16_t(pair)); }
inline float bf16_high(uint32_t pair) { return bf16_to_f32(uint16_t(pair >> 16)); }
inline uint32_t pack_bf16(float low, float high) { return uint32_t(f32_to_bf16(low)) | uint32_t(f32_to_bf16(high)) << 16; }
inline uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
  return pack_bf16(std::fma(bf16_low(a), bf16_low(b), bf16_low(c)), std::fma(bf16_high(a), bf16_high(b), bf16_high(c)));
}
inline float half_to_float(uint16_t h) { return f16_to_f32(h); }
inline uint16_t float_to_half(float f) { return f32_to_f16(f); }

namespace emulated {
// What the lanes of a warp hold of an operand.
template <class T, int n> struct Held {
  T v[32][n];
  explicit Held(const T (&mine)[n]) {
    const unsigned char* all = emulation::exchange(mine, sizeof mine);
    for (int l = 0; l < 32; l++) std::memcpy(v[l], all + l * 64, sizeof v[l]);
    emulation::leave_exchange();
  }
};
inline float half_of(uint32_t pair, int which) { return which ? bf16_high(pair) : bf16_low(pair); }
}  // namespace emulated

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const emulated::Held<uint32_t, 4> as(a);
  const emulated::Held<uint32_t, 2> bs(b);
  const int lane = emulation::lane();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + (i / 2) * 8, column = 2 * (lane % 4) + i % 2;
    float sum = d[i];
    for (int k = 0; k < 16; k++) {
      const int c = k % 8 / 2, half = k % 2;
      const float x = emulated::half_of(as.v[row % 8 * 4 + c][(k / 8) * 2 + row / 8], half);
      const float y = emulated::half_of(bs.v[column * 4 + c][k / 8], half);
      sum = std::fma(x, y, sum);
    }
    d[i] = sum;
  }
}
inline void mma_f64(double (&d)[2], double a, double b) {
  const double one[1] = {a}, other[1] = {b};
  const emulated::Held<double, 1> as(one), bs(other);
  const int lane = emulation::lane();
  for (int i = 0; i < 2; i++)
    for (int k = 0; k < 4; k++) d[i] = std::fma(as.v[lane / 4 * 4 + k][0], bs.v[(2 * (lane % 4) + i) * 4 + k][0], d[i]);
}
namespace emulated {
inline void load(uint32_t (&r)[4], const void* row, bool transposed) {
  const uint64_t mine[1] = {uint64_t(uintptr_t(row))};
  const Held<uint64_t, 1> rows(mine);
  const int lane = emulation::lane();
  for (int m = 0; m < 4; m++) {
    uint16_t pair[2];
    for (int i = 0; i < 2; i++) {
      const int at_row = transposed ? 2 * (lane % 4) + i : lane / 4, at_column = transposed ? lane / 4 : 2 * (lane % 4) + i;
      std::memcpy(&pair[i], (const char*)uintptr_t(rows.v[m * 8 + at_row][0]) + 2 * at_column, 2);
    }
    r[m] = pair[0] | uint32_t(pair[1]) << 16;
  }
  emulation::barrier_warp();
}
}  // namespace emulated
inline void load_matrices(uint32_t (&r)[4], const void* row) { emulated::load(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { emulated::load(r, row, true); }

inline void copy_async(void* shared, const void* global, bool valid = true) {
  emulation::queue_copy(shared, valid ? global : nullptr, 16);
}
inline void copy_commit() { emulation::commit_copies(); }
template <int n> void copy_wait() { emulation::wait_copies(n); }

inline uint4 load_once(const uint4* p) { return *p; }
inline uint2 load_once(const uint2* p) { return *p; }
inline uint32_t load_once(const uint32_t* p) { return *p; }

}  // namespace eac::cuda
