// See stream.cuh.
//
// METHOD      The rows are columns of one operand b of mma_bf16: 8 fast ones, or 4 exact ones as pairs of planes. A block has 64 channels (32 of
//             gate and up each), half of its warps each half of them; four warps share the units of two panels. A warp copies its units
//             through a ring in shared memory of its own, so that no warp waits for another before the sums are added; it fills the ring
//             before the launches that make its inputs have ended. Inputs come from the L1, where blocks of the same slice find them again.
// BOUND       Memory: codes and params once. Under way are 4 to 6 KB a warp, 24 warps an SM. A unit of 1024 weights takes 64 (2 bit), 73 and 68
//             instructions of a warp, which an SM issues in 16 to 18 cycles; at 4.1 TB/s on 132 SMs of 1.9 GHz a unit comes every 18 cycles
//             (2 bit), 25 and 33.
#include "kernels/cuda/matmul/stream.cuh"

#include <algorithm>

namespace eac::cuda {
namespace {

constexpr int threads = 256, parts = 4, panels = 2, block_channels = 64, ring_bytes = 7680;
constexpr int pair_units = 2;             // of a row that a warp takes at a time: 128 channels, mostly a group
constexpr int step = parts * pair_units;  // units from a warp's pair to its next

// What a block multiplies.
struct Job {
  Weight weight;       // of this warp
  int64_t panel, row;  // row: of the input's planes
  int begin, end;      // units; begin is even
};

// What a lane gives to the operand b of a pair of units, by halves of units.
template <int tiles> using Operand = uint4[tiles][2 * pair_units];

template <int tiles, bool exact> class Inputs {
 public:
  __device__ __forceinline__ Inputs(const Planes& in, int64_t row, int64_t n, int lane) {
    const int column = lane / 4;
    for (int t = 0; t < tiles; t++) {
      const int64_t token = exact ? t * 4 + column / 2 : t * 8 + column;
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

// A warp's pairs of units on their way through a ring in shared memory of its own. groups: of a pair, 1 or 4.
template <int bits, int groups> class Units {
 public:
  static constexpr int slot_bytes = panels * (pair_units * unit_bytes(bits) + groups * 64);
  static constexpr int slots = ring_bytes / slot_bytes;

  __device__ __forceinline__ Units(const Job& j, int first, unsigned char* ring, int lane)
      : ring_(ring), lane_(lane), to_(fixed(shared_address(ring) + lane * 16)), next_(first), row_end_(j.end) {
    const int64_t units = units_of(j.weight.cols), last = panels_of(j.weight.rows) - 1;
    part_of_half_ = (1u << 31) / uint32_t(halves_of_group(j.weight)) + 1;
    last_group_ = int(groups_of(j.weight.cols, j.weight.group_size)) - 1;
    // Padding repeats the last panel, in vain.
#pragma unroll
    for (int i = 0; i < copies; i++) {
      const int64_t panel = min(j.panel + chunk(i) / panel_chunks, last);
      codes_[i] = static_cast<const unsigned char*>(j.weight.data) + (panel * units + first) * unit_bytes(bits) +
                  chunk(i) % panel_chunks * 16;
      end_[i] = j.end - chunk(i) % panel_chunks / unit_chunks;
    }
    params_ = reinterpret_cast<const unsigned char*>(params_of(j.weight, min(j.panel + lane / (4 * groups) % panels, last), 0)) +
              lane % 4 * 16;
  }
  // The next pair. Beyond the end of a row nothing is copied: codes are finite whatever they are, and their inputs are zeros.
  __device__ __forceinline__ void copy(int slot) {
#pragma unroll
    for (int i = 0; i < copies; i++) {
      if (next_ < end_[i]) copy_async(to_ + slot + i * 512, codes_[i]);
      codes_[i] += step * unit_bytes(bits);
    }
    if (lane_ < panels * groups * 4 && next_ < row_end_) {
      // half / halves_of_group, exact while (2 units)^2 < 2^31
      const int group = int(__umulhi(uint32_t(next_ * 2 + lane_ / 4 % groups) * 2, part_of_half_));
      copy_async(to_ + slot + panels * pair_units * unit_bytes(bits), params_ + min(group, last_group_) * 64);
    }
    next_ += step;
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
                       copies = panels * panel_chunks / 32;
  __device__ __forceinline__ int chunk(int i) const { return lane_ + i * 32; }

  unsigned char* ring_;
  int lane_;
  uint32_t to_;
  int next_, row_end_, last_group_;
  uint32_t part_of_half_;  // in 2^-31
  const unsigned char *codes_[copies], *params_;
  int end_[copies];  // of the units that have these codes
};

template <int tiles> using Totals = float[panels][tiles][4];

// totals += one panel's pair of units times the inputs.
template <int bits, int groups, int tiles>
__device__ __forceinline__ void multiply_pair(const Units<bits, groups>& units, int slot, int panel, const Operand<tiles>& b,
                                              float (&totals)[tiles][4]) {
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

template <int bits, int groups, int tiles, bool exact>
__device__ __forceinline__ void multiply(const Job& j, const Stream& s, Totals<tiles>& totals) {
  using U = Units<bits, groups>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = j.begin + warp % parts * pair_units, end = j.end;
  U units(j, first, dynamic_shared<unsigned char>() + warp * ring_bytes, lane);
  for (int i = 0; i < U::slots - 1; i++) {
    units.copy(i * U::slot_bytes);
    copy_commit();
  }
  wait_for_earlier();
  const Inputs<tiles, exact> inputs(s.in, j.row, s.n, lane);
  Operand<tiles> b = {};
  if (first < end) inputs.load(first, b);
  int slot = 0, read = (U::slots - 1) * U::slot_bytes;
  for (int unit = first; unit < end; unit += step) {
    copy_wait<U::slots - 2>();
    __syncwarp();  // every lane's copies are here, and every lane has read the slot that is filled next
    units.copy(read);
    copy_commit();  // also an empty one: the wait counts groups
#pragma unroll
    for (int p = 0; p < panels; p++) multiply_pair<bits, groups, tiles>(units, slot, p, b, totals[p]);
    if (unit + step < end) inputs.load(unit + step, b);  // other warps work meanwhile
    read = slot;
    slot = slot + U::slot_bytes == U::slots * U::slot_bytes ? 0 : slot + U::slot_bytes;
  }
}

struct Spot {
  int place, channel, slice;
  const Expert* expert;
};

// Blocks of gate_up: up to the end of the last pair of units, whose padding they write.
__host__ __device__ inline int hidden_blocks(int64_t channels) {
  return int(plane_stride(channels, Order::lanes) / (block_channels / 2));
}

// False: no expert is there.
__device__ __forceinline__ bool find_job(const Stream& s, Spot& at, Job& j) {
  const int half = int(threadIdx.x) / 32 / parts, b = int(blockIdx.x), slices = int(s.slices), places = int(s.places);
  int part = int(blockIdx.y), cut = slices;
  at = {0, b * block_channels, part, nullptr};
  j.row = 0;
  if (s.role == Role::gate_up) {
    const int blocks = hidden_blocks(s.channels);  // of a routed expert
    at.place = min(b / blocks, places);
    at.channel = (b - at.place * blocks) * (block_channels / 2);
  } else if (s.role == Role::down) {
    at.place = min(part / slices, places);
    part -= at.place * slices;
    if (at.place == places) cut = int(s.shared_slices);
    j.row = at.place * s.n;
  }
  if (s.role == Role::plain) {
    j.weight = s.weight;
  } else {
    const int expert = at.place == places ? int(s.choice.experts) : expert_at(s.choice, at.place);
    if (expert < 0) return false;
    at.expert = s.list + expert;
    j.weight = s.role == Role::down ? at.expert->down : half ? at.expert->up : at.expert->gate;
  }
  const int units = int(units_of(j.weight.cols)), pairs = (units + pair_units - 1) / pair_units;
  j.panel = at.channel / unit_rows + (s.role == Role::gate_up ? 0 : half * panels);
  j.begin = pairs * part / cut * pair_units, j.end = min(pairs * (part + 1) / cut * pair_units, units);
  return true;
}

// Sums of the block's channels: of four warps, in order.
struct Results {
  float sums[threads / 32][panels * unit_rows][stream_rows + 1];

  template <int tiles, bool exact> __device__ __forceinline__ void put(const Totals<tiles>& totals) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = lane % 4;
#pragma unroll
    for (int i = 0; i < panels; i++)
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
    for (int i = 0; i < parts; i++) v += sums[half * parts + i][channel][row];
    return v;
  }
};

__device__ __forceinline__ void store_hidden(const Stream& s, const Spot& at, const Results& r) {
  constexpr int width = block_channels / 2;
  const Expert* expert = at.expert;
  const int64_t channels = at.place < s.places ? s.channels : s.shared_channels;
  for (int i = threadIdx.x; i < width * s.n; i += threads) {
    const int row = i / width, k = i % width;
    const int64_t channel = at.channel + k;
    const float factor = s.factor[at.place * s.n + row];
    float v = 0;  // also the padding, and what no token chose
    if (channel < channels && factor != 0) {
      const float gate = r.get(0, k, row) + (expert->gate_bias ? expert->gate_bias[channel] : 0.f);
      const float up = r.get(1, k, row) + (expert->up_bias ? expert->up_bias[channel] : 0.f);
      v = glu_value(s.activation, gate, up) * factor;
    }
    store_split(s.hidden, at.place * s.n + row, channel, v);
  }
}

__device__ __forceinline__ void store_out(const Stream& s, const Spot& at, const Results& r) {
  for (int i = threadIdx.x; i < block_channels * s.n; i += threads) {
    const int row = i / block_channels, k = i % block_channels;
    const int64_t channel = at.channel + k;
    if (channel >= s.channels) continue;
    float v = r.get(k / (panels * unit_rows), k % (panels * unit_rows), row);
    if (s.bias && at.slice == 0) v += load_float(s.bias_storage, s.bias, channel);
    float* to = s.out + (at.slice * s.n + row) * s.channels + channel;
    *to = s.add ? *to + v : v;
  }
}

template <int tiles, bool exact> __global__ __launch_bounds__(threads, tiles == 1 ? 3 : 2) void stream_kernel(Stream s) {
  Spot at;
  Job j;
  if (!find_job(s, at, j)) return wait_for_earlier();
  Totals<tiles> totals = {};
  const Weight& w = j.weight;
  const bool whole = halves_of_group(w) % (2 * pair_units) == 0;
  if (w.bits == 2) whole ? multiply<2, 1, tiles, exact>(j, s, totals) : multiply<2, 4, tiles, exact>(j, s, totals);
  if (w.bits == 3) whole ? multiply<3, 1, tiles, exact>(j, s, totals) : multiply<3, 4, tiles, exact>(j, s, totals);
  if (w.bits == 4) whole ? multiply<4, 1, tiles, exact>(j, s, totals) : multiply<4, 4, tiles, exact>(j, s, totals);
  Results& results = *dynamic_shared<Results>();
  __syncthreads();  // the last units have been read
  results.put<tiles, exact>(totals);
  __syncthreads();
  if (s.role == Role::gate_up)
    store_hidden(s, at, results);
  else
    store_out(s, at, results);
}

}  // namespace

int64_t stream_slices(const Context& c, int64_t products, int64_t channels, int64_t cols) {
  const int64_t blocks = products * ceil_div<int64_t>(channels, block_channels), wanted = 3 * c.multiprocessors / blocks;
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, units_of(cols) / step));
}

void multiply_stream(Context& c, const Stream& s) {
  dim3 blocks;
  if (s.role == Role::gate_up) {
    blocks.x = unsigned(s.places * hidden_blocks(s.channels) + (s.shared ? hidden_blocks(s.shared_channels) : 0));
  } else {
    blocks.x = unsigned(ceil_div<int64_t>(s.channels, block_channels));
    blocks.y = unsigned(s.role == Role::plain ? s.slices : s.places * s.slices + (s.shared ? s.shared_slices : 0));
  }
  const Grid grid{blocks, dim3(threads), ring_bytes * (threads / 32)};
  if (!s.in.low)
    launch<stream_kernel<1, false>>(c, grid, s);
  else if (s.n <= stream_rows / 2)
    launch<stream_kernel<1, true>>(c, grid, s);
  else
    launch<stream_kernel<2, true>>(c, grid, s);
}

}  // namespace eac::cuda
