// What a warp does where weights are streamed past few rows, for stream.cu and stream_linear.cu.
//
// METHOD      The rows are columns of one operand b of mma_bf16: 8 fast ones, or 4 exact ones as pairs of planes. A warp copies its units of codes
//             through a ring in shared memory of its own, so that no warp waits for another before the sums are added; it fills the ring
//             before the launches that make its inputs have ended. Inputs come from the L1, where blocks of the same slice find them again.
// BOUND       Memory: codes and params once. Of two panels a unit of 1024 weights takes 62 (2 bit), 72 and 67 instructions of a warp, which an SM
//             issues in 16 to 18 cycles; at 4.1 TB/s on 132 SMs of 1.9 GHz a unit comes every 18 cycles (2 bit), 25 and 33.
#pragma once
#include "kernels/cuda/matmul/stream.cuh"

namespace eac::cuda {

inline constexpr int stream_warps = 8, stream_threads = 32 * stream_warps;
inline constexpr int pair_units = 2;  // of a row that a warp takes at a time: 128 channels, mostly a group

// What the warps of a block do: each of `halves_` of them has `panels_` panels, whose units they share.
template <int halves_, int panels_> struct Layout {
  static constexpr int halves = halves_, panels = panels_, parts = stream_warps / halves;
  static constexpr int channels = halves * panels * unit_rows;
  static constexpr int step = parts * pair_units;  // units from a warp's pair to its next
  static constexpr int ring_bytes = panels * 3840;

  static __device__ __forceinline__ int half() { return int(threadIdx.x) / 32 / parts; }
  static Grid grid(dim3 blocks) { return {blocks, dim3(stream_threads), ring_bytes * stream_warps}; }
};

using Wide = Layout<2, 2>;
using Narrow = Layout<1, 1>;

// Calls f<tiles, exact>() with the tiles of columns that n rows take.
template <class F> void with_tiles(bool exact, int64_t n, const F& f) {
  if (!exact)
    f.template operator()<1, false>();
  else if (n <= few_rows / 2)
    f.template operator()<1, true>();
  else
    f.template operator()<2, true>();
}

// What a warp multiplies.
struct Job {
  Weight weight;
  int panel, begin, end;  // begin and end in units; begin is even
};

// What a lane gives to the operand b of a pair of units, by halves of units.
template <int tiles> using Operand = uint4[tiles][2 * pair_units];

template <bool exact> __device__ __forceinline__ int token_of(int tile, int column) {
  return exact ? tile * 4 + column / 2 : tile * 8 + column;
}

// From planes. Column c of a tile is token c, or (exact) plane c % 2 of token c / 2.
template <int tiles, bool exact> class PlaneInputs {
 public:
  __device__ __forceinline__ PlaneInputs(const Planes& in, int64_t row, int64_t n, int lane) {
    const int column = lane / 4;
    for (int t = 0; t < tiles; t++) {
      const int64_t token = token_of<exact>(t, column);
      const uint16_t* plane = exact && column % 2 ? in.low : in.high;
      at_[t] = token < n ? plane + (row + token) * in.stride + lane % 4 * 16 : nullptr;
    }
  }
  // b: zeros before the first call, where a lane has no row.
  __device__ __forceinline__ void load(int unit, Operand<tiles>& b) const {
#pragma unroll
    for (int t = 0; t < tiles; t++) {
      if (!at_[t]) continue;
      const uint4* at = reinterpret_cast<const uint4*>(at_[t] + unit * unit_cols);
      b[t][0] = at[0], b[t][1] = at[1], b[t][2] = at[8], b[t][3] = at[9];
    }
  }

 private:
  const uint16_t* at_[tiles];
};

// The same from float32: rows of whole pairs of units, at multiples of 8 bytes.
template <int tiles, bool exact> class FloatInputs {
 public:
  __device__ __forceinline__ FloatInputs(const float* x, int64_t cols, int64_t n, int lane) : low_(exact && lane / 4 % 2) {
    for (int t = 0; t < tiles; t++) {
      const int64_t token = token_of<exact>(t, lane / 4);
      at_[t] = token < n ? x + token * cols + lane % 4 * 2 : nullptr;
    }
  }
  __device__ __forceinline__ void load(int unit, Operand<tiles>& b) const {
#pragma unroll
    for (int t = 0; t < tiles; t++) {
      if (!at_[t]) continue;
      const float2* at = reinterpret_cast<const float2*>(at_[t] + unit * unit_cols);
#pragma unroll
      for (int half = 0; half < 2 * pair_units; half++)
        b[t][half] = {part(at[half * 16]), part(at[half * 16 + 4]), part(at[half * 16 + 8]), part(at[half * 16 + 12])};
    }
  }

 private:
  __device__ __forceinline__ uint32_t part(float2 v) const {
    const uint32_t high = pack_bf16(v.x, v.y);
    return low_ ? pack_bf16(v.x - bf16_low(high), v.y - bf16_high(high)) : high;
  }
  const float* at_[tiles];
  bool low_;
};

// A warp's pairs of units on their way through a ring in shared memory of its own. groups: of a pair, 1 or 4.
template <class Layout, int bits, int groups> class Units {
  static constexpr int panels = Layout::panels;

 public:
  static constexpr int slot_bytes = panels * (pair_units * unit_bytes(bits) + groups * 64);
  static constexpr int slots = Layout::ring_bytes / slot_bytes;

  __device__ __forceinline__ Units(const Job& j, int first, unsigned char* ring, int lane)
      : ring_(ring), lane_(lane), to_(fixed(shared_address(ring) + lane * 16)), next_(first) {
    // 32 bits suffice, and are fewer instructions.
    const uint32_t cols = uint32_t(j.weight.cols);
    const int units = int((cols + unit_cols - 1) / unit_cols),
              last = int((uint32_t(j.weight.rows) + unit_rows - 1) / unit_rows) - 1;
    const uint32_t halves = j.weight.group_size < j.weight.cols ? uint32_t(j.weight.group_size) / 32 : 2 * units;
    part_of_half_ = (1u << 31) / halves + 1;
    last_group_ = divided((cols + 31) / 32 - 1);
    // Padding repeats the last panel, in vain.
    const auto* data = static_cast<const unsigned char*>(j.weight.data);
    const unsigned char* from[panels];
#pragma unroll
    for (int p = 0; p < panels; p++)
      from[p] = data + uint64_t(uint32_t(min(j.panel + p, last) * units + first)) * unit_bytes(bits);
#pragma unroll
    for (int i = 0; i < copies; i++) {
      const int chunk = lane + i * 32, panel = chunk >= panel_chunks, at = chunk - panel * panel_chunks;
      codes_[i] = (panel ? from[panels - 1] : from[0]) + at * 16;
      end_[i] = chunk < panels * panel_chunks ? j.end - (at >= unit_chunks) : 0;
    }
    params_ = static_cast<const unsigned char*>(j.weight.params) +
              uint64_t(uint32_t(min(j.panel + lane / (4 * groups) % panels, last)) * (last_group_ + 1)) * 64 + lane % 4 * 16;
    params_end_ = lane < panels * groups * 4 ? j.end : 0;
  }
  // The next pair. Beyond the end of a row nothing is copied: codes are finite whatever they are, and their inputs are zeros.
  __device__ __forceinline__ void copy(int slot) {
#pragma unroll
    for (int i = 0; i < copies; i++) {
      if (next_ < end_[i]) copy_async(to_ + slot + i * 512, codes_[i]);
      codes_[i] += Layout::step * unit_bytes(bits);
    }
    if (next_ < params_end_) {
      const uint32_t half = next_ * 2 + lane_ / 4 % groups;
      const uint32_t group = groups == 1 ? divided(half) : min(divided(half), last_group_);
      copy_async(to_ + slot + panels * pair_units * unit_bytes(bits), params_ + uint64_t(group) * 64);
    }
    next_ += Layout::step;
  }
  __device__ __forceinline__ Codes<bits> codes(int slot, int panel, int unit) const {
    Codes<bits> c;
    c.load_shared(ring_ + slot + (panel * pair_units + unit) * unit_bytes(bits), lane_);
    return c;
  }
  __device__ __forceinline__ GroupParams params(int slot, int panel, int group) const {
    const unsigned char* at = ring_ + slot + panels * pair_units * unit_bytes(bits) + (panel * groups + group) * 64;
    return GroupParams(reinterpret_cast<const uint2*>(at)[lane_ / 4]);
  }

 private:
  static constexpr int unit_chunks = unit_bytes(bits) / 16, panel_chunks = pair_units * unit_chunks,
                       copies = (panels * panel_chunks + 31) / 32;
  static_assert(panels <= 2 && pair_units == 2);
  // The group of a half; exact while a row has less than 2^15 halves.
  __device__ __forceinline__ uint32_t divided(uint32_t half) const { return __umulhi(half * 2, part_of_half_); }

  unsigned char* ring_;
  int lane_;
  uint32_t to_;
  int next_, params_end_;
  uint32_t last_group_, part_of_half_;  // in 2^-31
  const unsigned char *codes_[copies], *params_;
  int end_[copies];  // of the units that have these codes
};

// totals += one panel's pair of units times the inputs.
template <class Layout, int bits, int groups, int tiles>
__device__ __forceinline__ void multiply_pair(const Units<Layout, bits, groups>& units, int slot, int panel,
                                              const Operand<tiles>& b, float (&totals)[tiles][4]) {
  constexpr int halves = 2 * pair_units / groups;  // of a group
#pragma unroll
  for (int group = 0; group < groups; group++) {
    const GroupParams params = units.params(slot, panel, group);
    float sums[tiles][4] = {};
#pragma unroll
    for (int half = group * halves; half < (group + 1) * halves; half++) {
      const Codes<bits> codes = units.codes(slot, panel, half / 2);
      uint32_t a[2][4];
      if (half % 2 == 0)
        operand<bits, 0>(codes, params, a[0]), operand<bits, 4>(codes, params, a[1]);
      else
        operand<bits, 8>(codes, params, a[0]), operand<bits, 12>(codes, params, a[1]);
#pragma unroll
      for (int t = 0; t < tiles; t++) {
        mma_bf16(sums[t], a[0], {b[t][half].x, b[t][half].y});
        mma_bf16(sums[t], a[1], {b[t][half].z, b[t][half].w});
      }
    }
#pragma unroll
    for (int t = 0; t < tiles; t++)
#pragma unroll
      for (int d = 0; d < 4; d++) totals[t][d] += params.scale[d / 2] * sums[t][d];
  }
}

template <class Layout, int bits, int groups, class Inputs, int tiles, class Begin>
__device__ __forceinline__ void multiply_units(const Job& j, const Inputs& inputs, float (&totals)[Layout::panels][tiles][4],
                                               const Begin& begin) {
  using U = Units<Layout, bits, groups>;
  constexpr int step = Layout::step;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = j.begin + warp % Layout::parts * pair_units, end = j.end;
  U units(j, first, dynamic_shared<unsigned char>() + warp * Layout::ring_bytes, lane);
  for (int i = 0; i < U::slots - 1; i++) {
    units.copy(i * U::slot_bytes);
    copy_commit();
  }
  wait_for_earlier();
  begin();
  Operand<tiles> b = {};
  if (first < end) inputs.load(first, b);
  int slot = 0, read = (U::slots - 1) * U::slot_bytes;
  for (int unit = first; unit < end; unit += step) {
    copy_wait<U::slots - 2>();
    __syncwarp();  // every lane's copies are here, and every lane has read the slot that is filled next
    units.copy(read);
    copy_commit();  // also an empty one: the wait counts groups
#pragma unroll
    for (int p = 0; p < Layout::panels; p++) multiply_pair(units, slot, p, b, totals[p]);
    if (unit + step < end) inputs.load(unit + step, b);  // other warps work meanwhile
    read = slot;
    slot = slot + U::slot_bytes == U::slots * U::slot_bytes ? 0 : slot + U::slot_bytes;
  }
}

// totals += this warp's job; waits for earlier launches when its first codes are under way. begin(): then, for what else the results need, which
// is there when they are.
template <class Layout, class Inputs, int tiles, class Begin>
__device__ __forceinline__ void multiply(const Job& j, const Inputs& inputs, float (&totals)[Layout::panels][tiles][4],
                                         const Begin& begin) {
  // Groups end where pairs do, or there is one.
  const bool whole = j.weight.group_size >= j.weight.cols || uint32_t(j.weight.group_size) / 32 % (2 * pair_units) == 0;
  const auto run = [&]<int bits>() {
    if (whole)
      multiply_units<Layout, bits, 1>(j, inputs, totals, begin);
    else
      multiply_units<Layout, bits, 4>(j, inputs, totals, begin);
  };
  if (j.weight.bits == 2) run.template operator()<2>();
  if (j.weight.bits == 3) run.template operator()<3>();
  if (j.weight.bits == 4) run.template operator()<4>();
}

// Sums of the block's channels: of the warps that share them, in order. In the memory of the rings.
template <class Layout> struct Results {
  float sums[stream_warps][Layout::panels * unit_rows][few_rows + 1];

  template <bool exact, int tiles> __device__ __forceinline__ void put(const float (&totals)[Layout::panels][tiles][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = lane % 4;
#pragma unroll
    for (int i = 0; i < Layout::panels; i++)
#pragma unroll
      for (int t = 0; t < tiles; t++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          float* row = sums[warp][i * unit_rows + r * 8 + lane / 4];
          const float first = totals[i][t][r * 2], second = totals[i][t][r * 2 + 1];
          if (exact)
            row[t * 4 + c] = first + second;
          else
            row[t * 8 + c * 2] = first, row[t * 8 + c * 2 + 1] = second;
        }
  }
  __device__ __forceinline__ float get(int half, int channel, int row) const {
    float v = 0;
    for (int i = 0; i < Layout::parts; i++) v += sums[half * Layout::parts + i][channel][row];
    return v;
  }
};
template <class Layout, bool exact, int tiles>
__device__ __forceinline__ const Results<Layout>& results_of(const float (&totals)[Layout::panels][tiles][4]) {
  auto& results = *dynamic_shared<Results<Layout>>();
  __syncthreads();  // the last units have been read
  results.template put<exact>(totals);
  __syncthreads();
  return results;
}

}  // namespace eac::cuda
