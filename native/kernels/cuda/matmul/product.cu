#include "kernels/cuda/matmul/product.cuh"

#include <algorithm>

namespace eac::cuda {
namespace {

constexpr int warpgroup_rows = 128;

}  // namespace

int tile_rows_for(const Context& c, bool tensor_cores, int64_t each) {
  return each <= 40 ? 16 : c.wgmma && tensor_cores ? warpgroup_rows : 64;
}

int64_t tile_slices(const Context& c, const Product& p, int64_t pairs) {
  const bool scalar = p.path == Path::scalar;
  const int64_t slots = c.multiprocessors * (scalar ? 4 : p.tile_rows == 16 ? 2 : 1);  // blocks that run at a time
  const int64_t slab = scalar ? scalar_slab : tile_slab;
  // An expert's last tile is there every other time.
  const int64_t blocks =
      most_tiles(p, pairs, slab) - (p.role == Role::plain ? 0 : std::min(pairs, p.routed) / 2 * slabs_of(p.channels, slab));
  const auto time = [&](int64_t slices) { return double(ceil_div(blocks * slices, slots)) / double(slices); };
  int64_t best = 1;
  // A slice costs writing and adding sums: it has to be worth it, and long enough.
  for (int64_t s = 2; s <= 16 && s * 8 <= units_of(p.cols); s++)
    if (time(s) < 0.85 * time(best)) best = s;
  return best;
}

void multiply_product(Context& c, const Product& p, int64_t pairs) {
  if (p.path == Path::scalar)
    multiply_scalar(c, p, pairs);
  else
    p.tile_rows == warpgroup_rows ? multiply_warpgroup_tiles(c, p, pairs) : multiply_tiles(c, p, pairs);
}

}  // namespace eac::cuda
