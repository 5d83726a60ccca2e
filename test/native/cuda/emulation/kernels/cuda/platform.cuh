// Takes the place of native/kernels/cuda/platform.cuh: the same functions, lane by lane.
#pragma once
#include <cuda_runtime.h>

#include "core/dtype.h"

namespace eac::cuda {

struct Grid {
  dim3 blocks, threads;
  size_t shared = 0;
};

template <auto kernel> void divide_l1_alike() {}
template <auto kernel, class... Args>
cudaError_t launch_kernel(cudaStream_t stream, const Grid& grid, bool overlap, Args... args) {
  if (overlap && !emulation::behind_launch(stream)) {
    emulation::last_error = "a launch overlaps with what is no launch";
    return cudaErrorLaunchFailure;
  }
  return queue(
      stream,
      [=] {
        const char* error = emulation::run(grid.blocks, grid.threads, grid.shared, overlap, [=] { kernel(args...); });
        if (error) emulation::last_error = error;
        return error ? cudaErrorLaunchFailure : cudaSuccess;
      },
      true);
}
inline void let_next_start() { emulation::let_next_start(); }
inline void wait_for_earlier() { emulation::wait_for_earlier(); }

template <class T> T* dynamic_shared() { return reinterpret_cast<T*>(emulation::dynamic_memory()); }

inline float bf16_low(uint32_t pair) { return bf16_to_f32(uint16_t(pair)); }
inline float bf16_high(uint32_t pair) { return bf16_to_f32(uint16_t(pair >> 16)); }
inline uint32_t pack_bf16(float low, float high) { return uint32_t(f32_to_bf16(low)) | uint32_t(f32_to_bf16(high)) << 16; }
inline uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
  return pack_bf16(std::fma(bf16_low(a), bf16_low(b), bf16_low(c)), std::fma(bf16_high(a), bf16_high(b), bf16_high(c)));
}
inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }
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
inline void copy_async(uint32_t shared, const void* global) {
  emulation::queue_copy(emulation::shared_pointer(shared), global, 16);
}
inline void copy_commit() { emulation::commit_copies(); }
template <int n> void copy_wait() { emulation::wait_copies(n); }

inline uint4 load_once(const uint4* p) { return *p; }
inline uint2 load_once(const uint2* p) { return *p; }
inline uint32_t load_once(const uint32_t* p) { return *p; }
inline void fetch_to_l2(const void*) {}
inline int32_t load_written(const int32_t* p) { return *p; }

inline uint32_t shared_address(const void* p) { return emulation::shared_address(p); }
inline uint32_t fixed(uint32_t v) { return v; }

inline constexpr bool on_hopper = true;
inline void signal_create(uint64_t* signal, int count) { emulation::signal_create(signal, count); }
inline void signal_arrive(uint64_t* signal) { emulation::signal_arrive(signal); }
inline void signal_wait(uint64_t* signal, int parity) { emulation::signal_wait(signal, parity); }
template <int number, int threads> void barrier_of() { emulation::barrier_of(number, threads); }
inline void publish_shared() { emulation::publish_shared(); }
template <int n> void give_registers() {}
template <int n> void take_registers() {}

namespace emulated {
// PTX ISA "Matrix descriptor", operands by rows: the chunk of 16 bytes (8 columns) of a row that a descriptor describes.
inline const uint16_t* described(uint64_t descriptor, int row, int chunk) {
  constexpr uint32_t row_bytes[] = {16, 128, 64, 32}, swizzled_bits[] = {0, 3, 2, 1};
  const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3fff) * 16; };
  const int mode = int(descriptor >> 62);
  if (descriptor >> 49 & 7) emulation::fail("a descriptor with a base offset");
  const uint32_t columns = uint32_t(chunk) * (mode == 0 ? field(16) : 16);
  const uint32_t at = field(0) + uint32_t(row / 8) * field(32) + uint32_t(row % 8) * row_bytes[mode] + columns;
  const uint32_t exchanged = at >> 7 & ((1u << swizzled_bits[mode]) - 1);
  return reinterpret_cast<const uint16_t*>(emulation::published(at ^ exchanged << 4));
}
inline void load_rows(float (&v)[16], uint64_t descriptor, int row) {
  for (int k = 0; k < 16; k++) v[k] = bf16_to_f32(described(descriptor, row, k / 8)[k % 8]);
}

// The rows lane / 4 and lane / 4 + 8 of the warp's 16.
struct RowsOfA {
  float v[2][16];
  explicit RowsOfA(const uint32_t (&a)[4]) {
    const Held<uint32_t, 4> as(a);
    for (int h = 0; h < 2; h++)
      for (int k = 0; k < 16; k++) v[h][k] = half_of(as.v[emulation::lane() / 4 * 4 + k % 8 / 2][k / 8 * 2 + h], k % 2);
  }
  explicit RowsOfA(uint64_t descriptor) {
    const int warp = int(threadIdx.x) / 32 % 4;
    for (int h = 0; h < 2; h++) load_rows(v[h], descriptor, warp * 16 + emulation::lane() / 4 + h * 8);
  }
};

// Done when it is waited for: registers of a that are overwritten before, show.
template <int n, class RowsOf> void wgmma(float (&registers)[n], RowsOf rows_of, uint64_t b, bool add) {
  emulation::queue_work(registers, n, [rows_of, b, add](float* d) {
    const RowsOfA rows = rows_of();
    for (int i = 0; i < n; i++) {
      if (i % 4 > 1) continue;
      float column[16];
      load_rows(column, b, i / 4 * 8 + emulation::lane() % 4 * 2 + i % 2);
      for (int h = 0; h < 2; h++) {
        float sum = add ? d[i + 2 * h] : 0;
        for (int k = 0; k < 16; k++) sum = std::fma(rows.v[h][k], column[k], sum);
        d[i + 2 * h] = sum;
      }
    }
  });
}
}  // namespace emulated
inline void wgmma_fence() { emulation::fence_work(); }
inline void wgmma_commit() { emulation::commit_work(); }
template <int n> void wgmma(float (&d)[n], const uint32_t (&a)[4], uint64_t b, bool add) {
  emulated::wgmma(
      d, [&a] { return emulated::RowsOfA(a); }, b, add);
}
template <int n> void wgmma(float (&d)[n], uint64_t a, uint64_t b) {
  emulated::wgmma(
      d, [a] { return emulated::RowsOfA(a); }, b, true);
}
template <int n> void wgmma_wait() { emulation::wait_work(n); }
template <int n> void wgmma_done(float (&)[n]) { emulation::wait_work(0); }

}  // namespace eac::cuda
