// Tensor-core products for many rows: tiles of 256 channels × 64 rows (16 where experts have few), 8 warps of 32 channels × all rows.
//
// METHOD      Weights are operand a, activations operand b of mma_bf16. A pipeline of copy_async brings units of 64 channels: the planes of the
//             tile's rows (gathered by pair) swizzled, codes as they lie. Codes become operands in registers; a group's sums are
//             scaled into the totals when it ends. Totals go through shared memory, so that what is written is whole lines.
// BOUND       Operations: 2 channels cols rows, twice that for exact products (two planes). A unit of a 64-row tile costs an SM 64 mma a warp,
//             and a warp about as many instructions to dequantize, so the tensor cores stay the bound. From the L2 come
//             256 bits / 8 + 128 bytes a channel for 32768 operations.
#include "kernels/cuda/matmul/tiles.cuh"

namespace eac::cuda {
namespace {

template <int rows, int planes, bool dense> struct Shape {
  static constexpr int plane_bytes = rows * 128;
  static constexpr int stage_bytes = planes * plane_bytes + (dense ? tile_slab * 128 : tile_slab / unit_rows * unit_bytes(4));
  static constexpr int stages = dense ? 2 : rows == 64 && planes == 2 ? 3 : 4;
  static constexpr int result_bytes = rows * result_stride * 4;
  static constexpr size_t shared = stages * stage_bytes > result_bytes ? stages* stage_bytes : result_bytes;
};

// The part of a tile's activations that a thread copies.
template <int rows, int planes> class RowCopies {
 public:
  __device__ __forceinline__ RowCopies(const Product& p, const Tile& t)
      : in_(p.in), chunk_(threadIdx.x % 8), row_(threadIdx.x / 8) {
    for (int i = 0; i < count; i++) {
      const int row = row_ + i * 32;
      from_[i] = row < t.rows ? input_row(p, t.pair + row) * in_.stride + chunk_ * 8 : -1;
    }
  }
  __device__ __forceinline__ void copy(unsigned char* stage, int unit) const {
#pragma unroll
    for (int i = 0; i < count; i++) {
      const int row = row_ + i * 32;
      if (rows < 32 && row >= rows) continue;
      const int64_t at = from_[i] < 0 ? 0 : from_[i] + unit * unit_cols;
      copy_async(stage + swizzled(row, chunk_), in_.high + at, from_[i] >= 0);
      if (planes == 2) copy_async(stage + rows * 128 + swizzled(row, chunk_), in_.low + at, from_[i] >= 0);
    }
  }

 private:
  static constexpr int count = rows < 32 ? 1 : rows / 32;
  Planes in_;
  int chunk_, row_;
  int64_t from_[count];  // in the planes; -1: none
};

template <int rows> using Sums = float[warp_panels][rows / 8][4];

// sums += the operands of half a unit times the rows' activations in `stage`.
template <int half, int rows, int planes> __device__ __forceinline__ void multiply_half(const uint32_t (&a)[warp_panels][2][4],
                                                                                        const unsigned char* stage,
                                                                                        Sums<rows>& sums) {
  constexpr int step = rows == 16 ? 2 : 4;  // times two panels: so many products are independent of each other
  const int lane = threadIdx.x % 32;
#pragma unroll 1  // unrolled, two planes need more registers than there are
  for (int plane = 0; plane < planes; plane++)
#pragma unroll
    for (int first = 0; first < rows / 8; first += step) {
      uint32_t b[step][4];
#pragma unroll
      for (int j = 0; j < step; j++)
        load_matrices(b[j], stage + plane * rows * 128 + swizzled((first + j) * 8 + lane % 8, half * 4 + lane / 8));
#pragma unroll
      for (int s = 0; s < 2; s++)
#pragma unroll
        for (int i = 0; i < warp_panels; i++)
#pragma unroll
          for (int j = 0; j < step; j++) mma_bf16(sums[i][first + j], a[i][s], {b[j][2 * s], b[j][2 * s + 1]});
    }
}

template <class Source, int rows>
__device__ __forceinline__ void end_group(const Source& source, Sums<rows>& sums, Sums<rows>& totals) {
#pragma unroll
  for (int i = 0; i < warp_panels; i++)
#pragma unroll
    for (int j = 0; j < rows / 8; j++)
#pragma unroll
      for (int d = 0; d < 4; d++) totals[i][j][d] += source.scale(i, d / 2) * sums[i][j][d], sums[i][j][d] = 0;
}

template <int half, int rows, int planes, class Source>
__device__ __forceinline__ void step_half(Source& source, const unsigned char* stage, Sums<rows>& sums, Sums<rows>& totals) {
  uint32_t a[warp_panels][2][4];
  source.template operands<half>(stage + planes * rows * 128, a);
  if constexpr (Source::grouped) {
    multiply_half<half, rows, planes>(a, stage, sums);
    if (source.group_ends()) {
      end_group<Source, rows>(source, sums, totals);
      source.begin_group();
    }
  } else {
    multiply_half<half, rows, planes>(a, stage, totals);
  }
}

// totals += the units [begin, end) of the warp's panels times the tile's rows. All warps of the block, each with a source of its own.
template <int rows, int planes, class Source>
__device__ __forceinline__ void multiply(Source source, const Product& p, const Tile& t, int begin, int end, Sums<rows>& totals) {
  using S = Shape<rows, planes, !Source::grouped>;
  unsigned char* memory = dynamic_shared<unsigned char>();
  const RowCopies<rows, planes> activations(p, t);
  const auto copy = [&](int slot, int unit) {
    if (unit < end) {
      activations.copy(memory + slot * S::stage_bytes, unit);
      source.copy(memory + slot * S::stage_bytes + planes * S::plane_bytes, unit);
    }
    copy_commit();  // also an empty one: the wait counts groups
  };
  for (int s = 0; s < S::stages - 1; s++) copy(s, begin + s);
  Sums<rows> sums = {};
  int slot = 0, ahead = S::stages - 1;
  for (int unit = begin; unit < end; unit++) {
    copy_wait<S::stages - 2>();
    barrier_of<1, tile_threads>();  // everybody's copies are here, and everybody is done with the slot that is filled next
    copy(ahead, unit + S::stages - 1);
    const unsigned char* stage = memory + slot * S::stage_bytes;
    step_half<0, rows, planes>(source, stage, sums, totals);
    step_half<1, rows, planes>(source, stage, sums, totals);
    slot = slot + 1 == S::stages ? 0 : slot + 1;
    ahead = ahead + 1 == S::stages ? 0 : ahead + 1;
  }
  if constexpr (Source::grouped) end_group<Source, rows>(source, sums, totals);  // a slice may end within a group
}

template <int rows> __device__ __forceinline__ void store_tile(const Product& p, const Tile& t, const Sums<rows>& totals) {
  float* result = dynamic_shared<float>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();  // the last unit has been read
#pragma unroll
  for (int i = 0; i < warp_panels; i++)
#pragma unroll
    for (int j = 0; j < rows / 8; j++)
#pragma unroll
      for (int d = 0; d < 4; d++)
        result[(j * 8 + lane % 4 * 2 + d % 2) * result_stride + (warp * warp_panels + i) * 16 + lane / 4 + d / 2 * 8] =
            totals[i][j][d];
  __syncthreads();
  write_tile(p, t, result);
}

template <int rows, int planes, bool dense>
__global__ __launch_bounds__(tile_threads, rows > 16 ? 1 : 2) void tiles_kernel(Product p) {
  wait_for_earlier();
  Tile t;
  if (!find_tile(p, tile_channels(p), t)) return;
  const Weight w = matrix_of(p, t, threadIdx.x >= tile_threads / 2);
  const int units = int(units_of(w.cols)), slice = int(blockIdx.y), slices = int(gridDim.y);
  const int begin = int(int64_t(units) * slice / slices), end = int(int64_t(units) * (slice + 1) / slices);
  Sums<rows> totals = {};
  if constexpr (dense) {
    multiply<rows, planes>(Bf16Source(p, t), p, t, begin, end, totals);
  } else {
    // Gate and up may differ in bits: warps then meet at different instructions, which barrier_of allows and __syncthreads does not.
    if (w.bits == 2) multiply<rows, planes>(CodeSource<2>(p, t, w, begin), p, t, begin, end, totals);
    if (w.bits == 3) multiply<rows, planes>(CodeSource<3>(p, t, w, begin), p, t, begin, end, totals);
    if (w.bits == 4) multiply<rows, planes>(CodeSource<4>(p, t, w, begin), p, t, begin, end, totals);
  }
  store_tile<rows>(p, t, totals);
}

template <int rows, int planes> void launch_tiles(Context& c, const Product& p, int64_t pairs) {
  const int64_t blocks = most_tiles(p, pairs, tile_channels(p));
  const dim3 grid(unsigned(blocks), unsigned(p.slices));
  if (p.path == Path::bf16)
    launch<tiles_kernel<rows, planes, true>>(c, {grid, dim3(tile_threads), Shape<rows, planes, true>::shared}, p);
  else
    launch<tiles_kernel<rows, planes, false>>(c, {grid, dim3(tile_threads), Shape<rows, planes, false>::shared}, p);
}

}  // namespace

void multiply_tiles(Context& c, const Product& p, int64_t pairs) {
  const bool exact = p.in.low != nullptr;
  if (p.tile_rows == 16)
    exact ? launch_tiles<16, 2>(c, p, pairs) : launch_tiles<16, 1>(c, p, pairs);
  else
    exact ? launch_tiles<64, 2>(c, p, pairs) : launch_tiles<64, 1>(c, p, pairs);
}

}  // namespace eac::cuda
