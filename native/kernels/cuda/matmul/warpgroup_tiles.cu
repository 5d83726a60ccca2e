// Tensor-core products for many rows on Hopper: tiles of 256 channels × 128 rows (64 where no more are left).
//
// METHOD      A warpgroup copies, two multiply with wgmma, each two sets of 64 channels (gate_up: of the gate, and the same of the up matrix): operand
//             a are weights, dequantized in registers (bf16 weights: from shared memory), operand b the rows' planes, from shared memory.
//             A ring of stages of 64 channels lies between them; a signal tells that a stage is full, another that it is empty.
//             A chain of products, a unit or, where a group ends within one, half a unit long, has sums of its own, which are then scaled
//             into the totals. While one warpgroup dequantizes and scales, the other one's chain has the tensor cores.
// BOUND       Operations, as tiles.cu; wgmma does 2048 multiply-adds a cycle and SM, mma.sync about 60 % of that. A chain takes the
//             tensor cores 256 cycles. Between two of its chains a warp issues 45 (4 bit) to 60 instructions to dequantize and 64 to scale,
//             and waits about 100 cycles for shared memory and the last products: less than the other warpgroup's chain takes. With 64 rows,
//             or groups of 32, a chain is half as long, and the tensor cores wait.
//             The L2 gives an SM 24 KB (128 rows, 256 channels of 4 bits) for 1024 cycles; bf16 weights 48 KB, which is their bound.
//             Registers of a thread: 128 totals, 64 sums, 16 of operand a; the copying warpgroup gives up some of its own.
#include "kernels/cuda/matmul/tiles.cuh"

namespace eac::cuda {
namespace {

// threads 0 .. 255 multiply, the others copy.
constexpr int threads = tile_threads + 128, most_rows = 128, sets = 2, set_panels = 8;

template <int planes, bool dense> struct Shape {
  static constexpr int plane_bytes = most_rows * 128;
  static constexpr int weights_at = planes * plane_bytes;
  static constexpr int params_at = weights_at + sets * set_panels * unit_bytes(4);  // (panels, halves of the unit, 64 bytes)
  static constexpr int stage_bytes = dense ? weights_at + tile_slab * 128 : params_at + sets * set_panels * 128;
  static constexpr int stages = dense ? 5 - planes : 7 - planes;
  static constexpr size_t shared = 1024 + stages * stage_bytes;  // stages begin at multiples of 1024
  static_assert(stage_bytes % 1024 == 0 && stages * stage_bytes >= most_rows * result_stride * 4 && shared < 227 * 1024);
};

// PTX ISA "Matrix descriptor" of rows in a stage, from `address` on. Rows of 128 bytes, eight of them 1024 bytes, which begin at multiples of it, their
// chunks of 16 bytes exchanged as swizzled() does. Bits 0-13: address / 16; 16-29: not used with this swizzle, 1; 32-45: bytes from eight rows to
// the next eight / 16; 62-63: 1, this swizzle. The chunks are exchanged by bits of the address, so columns further on are an address further on.
__device__ __forceinline__ uint64_t descriptor_of(uint32_t address) {
  return uint64_t(1) << 62 | uint64_t(1024 / 16) << 32 | uint64_t(1) << 16 | (address & 0x3ffff) >> 4;
}
constexpr uint64_t next_step = 16 * 2 / 16;  // added to a descriptor: the next 16 columns

struct Ring {
  unsigned char* memory;
  uint64_t *full, *empty;  // a signal a stage
  int begin, end;          // units
};

template <class S> class Slot {
 public:
  __device__ __forceinline__ unsigned char* stage(const Ring& r) const { return r.memory + at_ * S::stage_bytes; }
  __device__ __forceinline__ void wait_full(const Ring& r) const { signal_wait(r.full + at_, parity_); }
  __device__ __forceinline__ void wait_empty(const Ring& r) const { signal_wait(r.empty + at_, parity_ ^ 1); }
  __device__ __forceinline__ void set_full(const Ring& r) const { arrive(r.full); }
  __device__ __forceinline__ void set_empty(const Ring& r) const { arrive(r.empty); }
  __device__ __forceinline__ void next() {
    if (++at_ == S::stages) at_ = 0, parity_ ^= 1;
  }

 private:
  __device__ __forceinline__ void arrive(uint64_t* signals) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) signal_arrive(signals + at_);
  }
  int at_ = 0, parity_ = 0;
};

// The part of a tile's activations that a copying thread brings.
template <int planes> class RowCopies {
 public:
  __device__ __forceinline__ RowCopies(const Product& p, const Tile& t) : high_(p.in.high), low_(p.in.low) {
    const int chunk = threadIdx.x % 8, row = threadIdx.x % 128 / 8;
    place_ = swizzled(row, chunk);
    rows_ = t.rows > 64 ? 128 : 64;
#pragma unroll
    for (int i = 0; i < count; i++)
      from_[i] = row + i * 16 < t.rows ? uint32_t(input_row(p, t.pair + row + i * 16) * (p.in.stride / 8) + chunk) : none;
  }
  __device__ __forceinline__ void copy(unsigned char* stage, int unit) const {
#pragma unroll
    for (int i = 0; i < count; i++) {
      if (i * 16 >= rows_) break;
      const bool valid = from_[i] != none;
      const int64_t at = valid ? int64_t(from_[i] + uint32_t(unit) * 8) * 8 : 0;
      copy_async(stage + place_ + i * 16 * 128, high_ + at, valid);
      if (planes == 2) copy_async(stage + most_rows * 128 + place_ + i * 16 * 128, low_ + at, valid);
    }
  }

 private:
  static constexpr int count = most_rows / 16;
  static constexpr uint32_t none = ~0u;
  const uint16_t *high_, *low_;
  int place_, rows_;
  uint32_t from_[count];  // in the planes, in chunks of 16 bytes
};

// A copying warp brings four panels: those of one set that one warpgroup multiplies.
class CodeCopies {
 public:
  __device__ __forceinline__ CodeCopies(const Product& p, const Tile& t)
      : lane_(threadIdx.x % 32), first_(threadIdx.x % 128 / 32 * 4) {
    const bool pair = p.role == Role::gate_up;
    const Weight w = matrix_of(p, t, first_ >= set_panels);
    const int64_t units = units_of(w.cols), panels = panels_of(w.rows);
    const int64_t panel = t.channel / unit_rows + (pair ? first_ % set_panels : first_);
    bytes_ = unit_bytes(w.bits);
    last_group_ = int(groups_of(w.cols, w.group_size)) - 1;
    group_of_half_ = (1u << 31) / uint32_t(halves_of_group(w)) + 1;
    panel_stride_ = uint32_t(units) * bytes_;
    last_panel_ = int(max(int64_t(0), min(panels - 1 - panel, int64_t(3))));  // the padding behind it repeats it, in vain
    const int64_t base = min(panel, panels - 1);
    codes_ = static_cast<const unsigned char*>(w.data) + base * panel_stride_ + lane_ * 16;
    params_ = reinterpret_cast<const unsigned char*>(params_of(w, base + min(lane_ / 8, last_panel_), 0)) + lane_ % 4 * 16;
  }
  __device__ __forceinline__ void copy(unsigned char* codes, unsigned char* params, int unit) const {
    if (lane_ * 16 < bytes_)
#pragma unroll
      for (int i = 0; i < 4; i++)
        copy_async(codes + (first_ + i) * unit_bytes(4) + lane_ * 16,
                   codes_ + int64_t(min(i, last_panel_)) * panel_stride_ + uint32_t(unit) * uint32_t(bytes_));
    // half / halves_of_group, exact while (2 units)^2 < 2^31
    const int group = int(uint64_t(unit * 2 + lane_ / 4 % 2) * group_of_half_ >> 31);
    copy_async(params + first_ * 128 + lane_ * 16, params_ + int64_t(min(group, last_group_)) * 64);
  }

 private:
  int lane_, first_, bytes_, last_group_, last_panel_;
  uint32_t group_of_half_, panel_stride_;
  const unsigned char *codes_, *params_;
};

// Rows of bf16 weights; a thread brings a chunk of every 16th.
class DenseCopies {
 public:
  __device__ __forceinline__ DenseCopies(const Product& p, const Tile& t) : chunk_(threadIdx.x % 8), row_(threadIdx.x % 128 / 8) {
    const Weight first = matrix_of(p, t, false), second = matrix_of(p, t, true);
    const bool pair = p.role == Role::gate_up;
    cols_ = int(first.cols);
    for (int s = 0; s < sets; s++) {
      const int64_t row = t.channel + (pair ? 0 : s * 128);
      rows_[s] = int(min(first.rows - row, int64_t(128)));
      data_[s] = static_cast<const uint16_t*>((s ? second : first).data) + (rows_[s] > 0 ? row * cols_ : 0);
    }
  }
  __device__ __forceinline__ void copy(unsigned char* to, int unit) const {
    const int channel = unit * unit_cols + chunk_ * 8;
#pragma unroll
    for (int s = 0; s < sets; s++)
#pragma unroll 4
      for (int row = row_; row < 128; row += 16) {
        const bool valid = row < rows_[s] && channel < cols_;
        copy_async(to + s * 128 * 128 + swizzled(row, chunk_), data_[s] + (valid ? int64_t(row) * cols_ + channel : 0), valid);
      }
  }

 private:
  int chunk_, row_, cols_, rows_[sets];
  const uint16_t* data_[sets];
};

template <int planes, bool dense> __device__ __forceinline__ void produce(const Product& p, const Tile& t, const Ring& r) {
  using S = Shape<planes, dense>;
  constexpr int lag = S::stages / 2;  // stages that may still be on their way when the next one is asked for
  const RowCopies<planes> rows(p, t);
  const std::conditional_t<dense, DenseCopies, CodeCopies> weights(p, t);
  Slot<S> to, arrived;
  for (int unit = r.begin; unit < r.end + lag; unit++) {
    if (unit < r.end) {
      unsigned char* stage = to.stage(r);
      to.wait_empty(r);
      rows.copy(stage, unit);
      if constexpr (dense)
        weights.copy(stage + S::weights_at, unit);
      else
        weights.copy(stage + S::weights_at, stage + S::params_at, unit);
      to.next();
    }
    copy_commit();  // also an empty one: the wait counts groups
    if (unit < r.begin + lag) continue;
    copy_wait<lag>();
    publish_shared();
    arrived.set_full(r);
    arrived.next();
  }
}

// What a thread of a multiplying warpgroup has: 64 channels × rows as wgmma leaves them.
template <int rows> using Sums = float[rows / 2];

__device__ __forceinline__ int consumer_panel(int set) { return set * set_panels + int(threadIdx.x) / 32; }

// The operands of a unit.
template <int bits> __device__ __forceinline__ void dequantize(const unsigned char* unit, const GroupParams& first,
                                                               const GroupParams& second, uint32_t (&a)[4][4]) {
  Codes<bits> codes;
  codes.load_shared(unit, threadIdx.x % 32);
  operand<bits, 0>(codes, first, a[0]), operand<bits, 4>(codes, first, a[1]);
  operand<bits, 8>(codes, second, a[2]), operand<bits, 12>(codes, second, a[3]);
}

// sums = the products of steps [begin, end) of a unit.
template <int begin, int end, int planes, int n>
__device__ __forceinline__ void chain(float (&sums)[n], const uint32_t (&a)[4][4], uint64_t b) {
  wgmma_fence();
#pragma unroll
  for (int s = begin; s < end; s++)
#pragma unroll
    for (int plane = 0; plane < planes; plane++)
      wgmma(sums, a[s], b + s * next_step + plane * (most_rows * 128 / 16), s > begin || plane > 0);
  wgmma_commit();
}

template <int n>
__device__ __forceinline__ void add_scaled(float (&totals)[n], const float (&sums)[n], const GroupParams& group) {
#pragma unroll
  for (int i = 0; i < n; i++) totals[i] += group.scale[i / 2 % 2] * sums[i];
}

// whole: groups end with units.
template <int rows, int planes, bool whole>
__device__ __forceinline__ void multiply_codes(const Product& p, const Tile& t, const Ring& r, Sums<rows> (&totals)[sets]) {
  using S = Shape<planes, false>;
  const int bits[sets] = {matrix_of(p, t, false).bits, matrix_of(p, t, true).bits};
  Sums<rows> sums = {};
  Slot<S> slot;
  for (int unit = r.begin; unit < r.end; unit++, slot.next()) {
    slot.wait_full(r);
    const unsigned char* stage = slot.stage(r);
    const uint64_t b = descriptor_of(shared_address(stage));
#pragma unroll
    for (int set = 0; set < sets; set++) {
      const unsigned char* codes = stage + S::weights_at + consumer_panel(set) * unit_bytes(4);
      const uint2* params =
          reinterpret_cast<const uint2*>(stage + S::params_at + consumer_panel(set) * 128) + threadIdx.x % 32 / 4;
      const GroupParams first(params[0]), second(params[whole ? 0 : 8]);
      uint32_t a[4][4];
      if (bits[set] == 2) dequantize<2>(codes, first, second, a);
      if (bits[set] == 3) dequantize<3>(codes, first, second, a);
      if (bits[set] == 4) dequantize<4>(codes, first, second, a);
      if (!whole) {
        chain<0, 2, planes>(sums, a, b);
        wgmma_done(sums);
        add_scaled(totals[set], sums, first);
      }
      chain<whole ? 0 : 2, 4, planes>(sums, a, b);
      wgmma_done(sums);
      if (set + 1 == sets) slot.set_empty(r);
      add_scaled(totals[set], sums, second);
    }
  }
}

template <int rows, int planes> __device__ __forceinline__ void multiply_dense(const Ring& r, Sums<rows> (&totals)[sets]) {
  using S = Shape<planes, true>;
  Slot<S> slot;
  for (int unit = r.begin; unit < r.end; unit++, slot.next()) {
    slot.wait_full(r);
    const uint32_t stage = shared_address(slot.stage(r));
    const uint64_t b = descriptor_of(stage);
    wgmma_fence();
#pragma unroll
    for (int set = 0; set < sets; set++) {
      const uint64_t a = descriptor_of(stage + S::weights_at + (set * 2 + threadIdx.x / 128) * 64 * 128);
#pragma unroll
      for (int s = 0; s < 4; s++)
#pragma unroll
        for (int plane = 0; plane < planes; plane++)
          wgmma(totals[set], a + s * next_step, b + s * next_step + plane * (S::plane_bytes / 16));
    }
    wgmma_commit();
    for (int set = 0; set < sets; set++) wgmma_done(totals[set]);
    slot.set_empty(r);
  }
}

template <int rows, int planes, bool dense>
__device__ __forceinline__ void consume(const Product& p, const Tile& t, const Ring& r) {
  Sums<rows> totals[sets] = {};
  if constexpr (dense) {
    multiply_dense<rows, planes>(r, totals);
  } else {
    const auto whole = [](const Weight& w) { return halves_of_group(w) % 2 == 0; };
    if (whole(matrix_of(p, t, false)) && whole(matrix_of(p, t, true)))
      multiply_codes<rows, planes, true>(p, t, r, totals);
    else
      multiply_codes<rows, planes, false>(p, t, r, totals);
  }
  float* result = reinterpret_cast<float*>(r.memory);
  const int lane = threadIdx.x % 32;
  barrier_of<1, tile_threads>();  // the last stages have been read
#pragma unroll
  for (int set = 0; set < sets; set++)
#pragma unroll
    for (int i = 0; i < rows / 2; i++)
      result[(i / 4 * 8 + lane % 4 * 2 + i % 2) * result_stride + consumer_panel(set) * unit_rows + lane / 4 + i / 2 % 2 * 8] =
          totals[set][i];
  barrier_of<1, tile_threads>();
  write_tile(p, t, result);
}

template <int planes, bool dense> __device__ __forceinline__ void run(const Product& p) {
  using S = Shape<planes, dense>;
  __shared__ uint64_t full[S::stages], empty[S::stages];
  Tile t;
  if (!find_tile(p, tile_channels(p), t)) return;
  if (threadIdx.x < S::stages) signal_create(full + threadIdx.x, 4), signal_create(empty + threadIdx.x, tile_threads / 32);
  __syncthreads();
  unsigned char* memory = dynamic_shared<unsigned char>();
  const int units = int(units_of(matrix_of(p, t, false).cols)), slice = int(blockIdx.y), slices = int(gridDim.y);
  const Ring r{memory + (0u - shared_address(memory)) % 1024, full, empty, int(int64_t(units) * slice / slices),
               int(int64_t(units) * (slice + 1) / slices)};
  if (threadIdx.x >= tile_threads) {
    give_registers<56>();
    produce<planes, dense>(p, t, r);
  } else {
    take_registers<224>();
    if (t.rows > 64)
      consume<128, planes, dense>(p, t, r);
    else
      consume<64, planes, dense>(p, t, r);
  }
}

template <int planes, bool dense> __global__ __launch_bounds__(threads, 1) void warpgroup_tiles_kernel(Product p) {
  wait_for_earlier();
  if (on_hopper) run<planes, dense>(p);  // else nothing is left of it
}

template <int planes, bool dense> void launch_tiles(Context& c, const Product& p, int64_t pairs) {
  const int64_t blocks = most_tiles(p, pairs, tile_channels(p));
  launch<warpgroup_tiles_kernel<planes, dense>>(
      c, {dim3(unsigned(blocks), unsigned(p.slices)), dim3(threads), Shape<planes, dense>::shared}, p);
}

}  // namespace

void multiply_warpgroup_tiles(Context& c, const Product& p, int64_t pairs) {
  const bool exact = p.in.low != nullptr;
  if (p.path == Path::bf16)
    exact ? launch_tiles<2, true>(c, p, pairs) : launch_tiles<1, true>(c, p, pairs);
  else
    exact ? launch_tiles<2, false>(c, p, pairs) : launch_tiles<1, false>(c, p, pairs);
}

}  // namespace eac::cuda
