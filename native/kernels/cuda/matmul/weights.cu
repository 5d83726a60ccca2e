// Repacking for the GPU. Bound: memory, the codes once in and once out.
#include "kernels/cuda/matmul/weights.cuh"

namespace eac::cuda {
namespace {

constexpr int block_cols = 32;  // of quant_matrix.h

// Code (row, channel) of a block of 16 rows × 32 channels in the layout of quant_matrix.h.
__device__ uint32_t code_at(const uint8_t* block, int bits, int row, int channel) {
  const int i = row * 4 + channel % 4, step = channel / 4, steps = 8 / bits;
  if (bits == 3 && step >= 6) return (block[(step - 6) * 64 + i] >> 6) | (block[128 + i] >> step & 1) << 2;
  return block[step / steps * 64 + i] >> (step % steps * bits) & ((1 << bits) - 1);
}

// A thread packs a lane's share of a unit.
template <int bits> __global__ void pack_codes_kernel(PackWeight p) {
  wait_for_earlier();
  const int64_t units = units_of(p.cols), blocks = (p.cols + block_cols - 1) / block_cols, i = global_thread();
  if (i >= panels_of(p.rows) * units * 32) return;
  const int64_t panel = i / 32 / units, unit = i / 32 % units;
  const int lane = int(i % 32);
  uint32_t word[bits] = {};
  for (int pair = 0; pair < 16; pair++) {
    const int row = lane / 4 + pair % 2 * 8, in_unit = pair / 4 * 16 + pair % 4 / 2 * 8 + lane % 4 * 2;
    const int64_t block = unit * 2 + in_unit / block_cols;
    if (block >= blocks) continue;
    const uint8_t* from = p.codes + (panel * blocks + block) * (bits * 64);
    for (int half = 0; half < 2; half++) {
      const uint32_t code = code_at(from, bits, row, in_unit % block_cols + half);
      const Place at = place_of<bits>(pair);
      for (int w = 0; w < bits; w++) {  // constant indices keep the words in registers
        if (bits == 3 && pair == 15) word[w] |= (code >> w & 1) << (15 + 16 * half);
        if (!(bits == 3 && pair == 15) && w == at.word) word[w] |= code << (at.bit + 16 * half);
      }
    }
  }
  unsigned char* out = static_cast<unsigned char*>(p.data) + (panel * units + unit) * unit_bytes(bits);
  constexpr int first = bits == 4 ? 4 : 2;
  for (int w = 0; w < bits; w++) {
    uint32_t* at = reinterpret_cast<uint32_t*>(out) + (w < first ? lane * first + w : first * 32 + lane);
    *at = word[w];
  }
}

__global__ void pack_params_kernel(PackWeight p) {
  wait_for_earlier();
  const int64_t i = global_thread();
  if (i >= panels_of(p.rows) * groups_of(p.cols, p.group_size) * unit_rows) return;
  const int64_t row = i % unit_rows, to = i - row + row % 8 * 2 + row / 8;
  static_cast<uint32_t*>(p.params)[to] = p.scales[i] | uint32_t(p.zeros[i]) << 16;
}

}  // namespace

WeightBytes weight_bytes(int32_t bits, int64_t rows, int64_t cols, int64_t group_size) {
  const int64_t panels = panels_of(rows);
  return {size_t(panels * units_of(cols) * unit_bytes(bits)),
          size_t(panels * groups_of(cols, group_size) * unit_rows) * sizeof(uint32_t)};
}

void pack_weight(Context& c, const PackWeight& p) {
  require(p.bits >= 2 && p.bits <= 4, "quantized weights have 2, 3 or 4 bits");
  require(p.group_size > 0 && (p.group_size % 32 == 0 || p.group_size >= p.cols),
          "the group size must be a positive multiple of 32, or at least the number of columns");
  const Grid codes = per_element(panels_of(p.rows) * units_of(p.cols) * 32);
  if (p.bits == 2) launch<pack_codes_kernel<2>>(c, codes, p);
  if (p.bits == 3) launch<pack_codes_kernel<3>>(c, codes, p);
  if (p.bits == 4) launch<pack_codes_kernel<4>>(c, codes, p);
  launch<pack_params_kernel>(c, per_element(panels_of(p.rows) * groups_of(p.cols, p.group_size) * unit_rows), p);
}

}  // namespace eac::cuda
