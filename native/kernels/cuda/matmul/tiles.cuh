// What the tiles of tiles.cu and warpgroup_tiles.cu share, and where those of tiles.cu get their weights from: codes, dequantized in registers, or
// bf16 from shared memory.
#pragma once
#include "kernels/cuda/matmul/product.cuh"

namespace eac::cuda {

// A block: 8 warps × 2 panels of 16 channels. Of gate_up the first four warps have the gate's rows, the others the up matrix's.
inline constexpr int tile_threads = 256, warp_panels = 2;

// Output channels of a block: gate_up's rows are half gate, half up.
__host__ __device__ inline int tile_channels(const Product& p) {
  return int(p.role == Role::gate_up ? tile_slab / 2 : tile_slab);
}

// Rows of 64 bf16 in shared memory, their chunks of 16 bytes exchanged so that eight rows' equal chunks lie in different banks.
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * 128 + (chunk ^ (row & 7)) * 16; }

// A tile's results in shared memory, (rows, result_stride) floats: rows 2c of a fragment lie 8 banks apart. Of gate_up the gate's channels come
// first, then the up matrix's.
inline constexpr int result_stride = tile_slab + 4;

// What they are for, and where to. The first tile_threads of the block; a warp writes whole rows.
__device__ __forceinline__ void write_tile(const Product& p, const Tile& t, const float* result) {
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < t.rows; row += tile_threads / 32) {
    const float* from = result + row * result_stride + lane;
    if (p.role == Role::gate_up) {
#pragma unroll
      for (int i = 0; i < tile_slab / 2; i += 32) store_hidden(p, t, row, t.channel + i + lane, from[i], from[tile_slab / 2 + i]);
    } else {
#pragma unroll
      for (int i = 0; i < tile_slab; i += 32)
        if (t.channel + i + lane < t.channels) store_out(p, t, row, t.channel + i + lane, from[i]);
    }
  }
}

__device__ __forceinline__ int64_t panel_of(const Product& p, const Tile& t, int warp) {
  return t.channel / unit_rows + (p.role == Role::gate_up ? warp % 4 : warp) * warp_panels;
}

template <int bits> class CodeSource {
 public:
  static constexpr bool grouped = true;

  __device__ __forceinline__ CodeSource(const Product& p, const Tile& t, const Weight& w, int first_unit)
      : lane_(threadIdx.x % 32), warp_(threadIdx.x / 32), last_(int(groups_of(w.cols, w.group_size)) - 1) {
    const int64_t panel = min(panel_of(p, t, warp_), panels_of(w.rows) - 1), units = units_of(w.cols);
    const bool last = panel + 1 == panels_of(w.rows);  // the padding behind it repeats it, in vain
    codes_ = static_cast<const unsigned char*>(w.data) + panel * units * unit_bytes(bits) + lane_ * 16;
    codes_stride_ = last ? 0 : unsigned(units) * unit_bytes(bits);
    params_ = params_of(w, panel, lane_);
    params_stride_ = last ? 0 : (last_ + 1) * 8;
    halves_ = int(halves_of_group(w));
    group_ = first_unit * 2 / halves_;
    left_ = halves_ - first_unit * 2 % halves_;
    load_next(group_);
    begin_group(left_);
  }

  __device__ __forceinline__ void copy(unsigned char* stage, int unit) const {
    for (int i = 0; i < warp_panels; i++)
      if (lane_ < unit_bytes(bits) / 16)
        copy_async(place(stage, i) + lane_ * 16, codes_ + (i * codes_stride_ + unsigned(unit) * unit_bytes(bits)));
  }
  template <int half>
  __device__ __forceinline__ void operands(const unsigned char* stage, uint32_t (&a)[warp_panels][2][4]) const {
#pragma unroll
    for (int i = 0; i < warp_panels; i++) {
      Codes<bits> codes;
      codes.load_shared(place(stage, i), lane_);
      const GroupParams group(now_[i]);
      operand<bits, half * 8>(codes, group, a[i][0]);
      operand<bits, half * 8 + 4>(codes, group, a[i][1]);
    }
  }
  // Counts a half; true: a group has ended, and its sums want scale().
  __device__ __forceinline__ bool group_ends() { return --left_ == 0; }
  __device__ __forceinline__ float scale(int panel, int row) const {
    return half_to_float(uint16_t(row ? now_[panel].y : now_[panel].x));
  }
  __device__ __forceinline__ void begin_group() {
    group_++;
    begin_group(halves_);
  }

 private:
  static constexpr int room = unit_bytes(4);
  template <class T> __device__ __forceinline__ T* place(T* stage, int i) const {
    return stage + (warp_ * warp_panels + i) * room;
  }

  // The parameters of a group are loaded while the one before it is at work.
  __device__ __forceinline__ void load_next(int group) {
    for (int i = 0; i < warp_panels; i++) next_[i] = params_[min(group, last_) * 8 + i * params_stride_];
  }
  __device__ __forceinline__ void begin_group(int halves) {
    for (int i = 0; i < warp_panels; i++) now_[i] = next_[i];
    left_ = halves;
    load_next(group_ + 1);
  }

  int lane_, warp_, last_, halves_, group_, left_, params_stride_;
  unsigned codes_stride_;  // of panels; two panels are less than 4 GB
  const unsigned char* codes_;
  const uint2* params_;
  uint2 now_[warp_panels], next_[warp_panels];
};

class Bf16Source {
 public:
  static constexpr bool grouped = false;

  __device__ __forceinline__ Bf16Source(const Product& p, const Tile& t)
      : lane_(threadIdx.x % 32), warp_(threadIdx.x / 32), chunk_(threadIdx.x % 8), row_(threadIdx.x / 8) {
    const bool pair = p.role == Role::gate_up;
    const Weight first = matrix_of(p, t, false), second = matrix_of(p, t, true);
    cols_ = first.cols;
    const int64_t at = (t.channel + row_) * cols_;
    // Rows 0 .. 127 of the block and 128 .. 255: of two matrices, or of one.
    data_[0] = static_cast<const uint16_t*>(first.data) + at;
    data_[1] = static_cast<const uint16_t*>(second.data) + at + (pair ? 0 : 128 * cols_);
    rows_[0] = int(min(first.rows - t.channel, int64_t(128)));
    rows_[1] = int(min(pair ? first.rows - t.channel : first.rows - t.channel - 128, int64_t(128)));
  }
  __device__ __forceinline__ void copy(unsigned char* stage, int unit) const {
    const int channel = unit * unit_cols + chunk_ * 8;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int half = i / 4, row = row_ + i % 4 * 32;
      const bool valid = row < rows_[half] && channel < cols_;
      const uint16_t* from = data_[half] + i % 4 * 32 * cols_ + channel;
      copy_async(stage + swizzled(half * 128 + row, chunk_), valid ? from : data_[0], valid);
    }
  }
  template <int half>
  __device__ __forceinline__ void operands(const unsigned char* stage, uint32_t (&a)[warp_panels][2][4]) const {
#pragma unroll
    for (int i = 0; i < warp_panels; i++)
#pragma unroll
      for (int s = 0; s < 2; s++)
        load_matrices(a[i][s], stage + swizzled((warp_ * warp_panels + i) * 16 + lane_ % 16, half * 4 + s * 2 + lane_ / 16));
  }

 private:
  int lane_, warp_, chunk_, row_, rows_[2];
  int64_t cols_;
  const uint16_t* data_[2];
};

}  // namespace eac::cuda
