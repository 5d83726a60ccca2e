// C = alpha A B^T from operands split in bf16: see gemm.cuh.
//
// A block of four warps computes a tile of 128 × 128, a warp 64 × 64 of it: 16 ldmatrix feed 96 mma, so that shared memory (768 cycles a
// step of 32) allows half of Hopper's dense rate and all of Ampere's. Three stages of 32 KB; two blocks an SM where it has 192 KB.
// Where there are fewer tiles than blocks run at once, k is cut into slices whose sums are added by a second kernel, in order.
#include "kernels/cuda/matmul/gemm.cuh"

#include <algorithm>

namespace eac::cuda {
namespace {

constexpr int tile = 128, stages = 3, threads = 128;
constexpr int segment = 8;                        // 16-byte pieces a row and step
constexpr int stage_pieces = 2 * tile * segment;  // A, then B
constexpr int64_t longest_sum = 4096, shortest_slice = 512;
constexpr int64_t split_elements = int64_t(1) << 26;  // rows of A are taken in pieces of about this size

struct Split {
  Operand from;
  int64_t rows, k, steps;
  uint16_t* to;
};

// Row and column of a thread's element i of 64 × 32: neighbours of a warp lie along the operand's lines.
__device__ __forceinline__ int2 place_of(const Operand& x, int i) {
  const int at = int(threadIdx.x) + 256 * i;
  return x.transposed ? make_int2(at % 64, at / 64) : make_int2(at / 32, at % 32);
}

// All loads of a kind are issued before one is waited for.
__device__ __forceinline__ void load_part(const Operand& x, int64_t row0, int64_t k0, int64_t rows, int64_t k, float (&v)[8]) {
  int64_t from[8];  // -1: outside
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int2 at = place_of(x, i);
    const int64_t row = row0 + at.x, column = k0 + at.y;
    from[i] = row >= rows || column >= k ? -1 : x.transposed ? column * x.ld + row : row * x.ld + column;
  }
  if (x.storage == Storage::f32) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = from[i] < 0 ? 0.f : static_cast<const float*>(x.data)[from[i]];
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = from[i] < 0 ? 0.f : load_float(x.storage, x.data, from[i]);
  }
  if (x.minus) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] -= from[i] < 0 ? 0.f : x.minus[from[i]];
  }
  if (x.weights) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= from[i] < 0 ? 0.f : x.weights[k0 + place_of(x, i).y];
  }
}

// A block splits 64 rows × 32 columns, through shared memory so that both sides are read and written along their lines.
__global__ __launch_bounds__(256) void split_kernel(Split s) {
  wait_for_earlier();
  __shared__ float part[64][33];
  const int64_t row0 = int64_t(blockIdx.x) * 64, k0 = int64_t(blockIdx.y) * split_step;
  const Operand& x = s.from;
  float v[8];
  load_part(x, row0, k0, s.rows, s.k, v);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int2 at = place_of(x, i);
    part[at.x][at.y] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = int(threadIdx.x) + 256 * i, r = at / 16, j = at % 16 * 2;
    const float low = part[r][j], high = part[r][j + 1];
    const uint32_t hi = pack_bf16(low, high), lo = pack_bf16(low - bf16_low(hi), high - bf16_high(hi));
    uint32_t* to = reinterpret_cast<uint32_t*>(s.to) + ((row0 + r) * s.steps + blockIdx.y) * split_step + j / 2;
    to[0] = hi;
    to[split_step / 2] = lo;
  }
}

struct Tiles {
  const uint4 *a, *b;
  int64_t steps, slice;   // of the operands; of a slice
  int64_t m, n, columns;  // columns: of tiles
  bool lower;
  float alpha;
  bool add;
  float* c;
  int64_t ldc;
  float* partial;  // (slices, m, n): plain sums instead of c
};

__device__ __forceinline__ void tile_of(const Tiles& t, int64_t& row, int64_t& column) {
  if (t.lower) return lower_tile(blockIdx.x, row, column);
  row = blockIdx.x / t.columns, column = blockIdx.x % t.columns;
}

// The step's 128 bytes of every row of both tiles; piece p of row r lies at p ^ (r % 8), so that eight rows of a piece meet all banks.
__device__ __forceinline__ void load_stage(uint4* stage, const uint4* a, const uint4* b, int64_t steps) {
#pragma unroll
  for (int i = 0; i < tile * segment / threads; i++) {
    const int at = int(threadIdx.x) + threads * i, r = at / segment, p = at % segment;
    const int to = r * segment + (p ^ (r % 8));
    copy_async(stage + to, a + r * steps * segment + p);
    copy_async(stage + tile * segment + to, b + r * steps * segment + p);
  }
}

struct Fragments {
  uint32_t a[2][4][4], b[2][8][2];  // hi and lo; four tiles of 16 rows, eight of 8 columns
};

// k: which half of the step.
__device__ __forceinline__ void load_fragments(Fragments& f, const uint4* stage, int k) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, bit3 = lane / 8 % 2, bit4 = lane / 16;
#pragma unroll
  for (int part = 0; part < 2; part++) {
    const int piece = 4 * part + 2 * k;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int r = warp / 2 * 64 + i * 16 + lane % 8 + 8 * bit3;
      load_matrices(f.a[part][i], stage + r * segment + ((piece + bit4) ^ (r % 8)));
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int r = warp % 2 * 64 + j * 16 + lane % 8 + 8 * bit4;
      uint32_t two[4];
      load_matrices(two, stage + tile * segment + r * segment + ((piece + bit3) ^ (r % 8)));
      f.b[part][2 * j][0] = two[0], f.b[part][2 * j][1] = two[1];
      f.b[part][2 * j + 1][0] = two[2], f.b[part][2 * j + 1][1] = two[3];
    }
  }
}

__device__ __forceinline__ void multiply(float (&sum)[4][8][4], const Fragments& f) {
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 8; j++) mma_bf16(sum[i][j], f.a[0][i], f.b[0][j]);
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 8; j++) mma_bf16(sum[i][j], f.a[0][i], f.b[1][j]);
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 8; j++) mma_bf16(sum[i][j], f.a[1][i], f.b[0][j]);
}

// Two neighbours of row `at`, of which `count` exist; pairs: they are aligned.
__device__ __forceinline__ float2 load_two(const float* at, int64_t count, bool pairs) {
  if (pairs && count > 1) return *reinterpret_cast<const float2*>(at);
  return make_float2(count > 0 ? at[0] : 0.f, count > 1 ? at[1] : 0.f);
}
__device__ __forceinline__ void store_two(float* at, float2 v, int64_t count, bool pairs) {
  if (pairs && count > 1) {
    *reinterpret_cast<float2*>(at) = v;
  } else {
    if (count > 0) at[0] = v.x;
    if (count > 1) at[1] = v.y;
  }
}

// What C holds is read for 16 rows at a time before any of it is written, so that its way from memory is waited for four times only.
__device__ __forceinline__ void store_tile(const Tiles& t, const float (&sum)[4][8][4], int64_t row0, int64_t column0) {
  float* c = t.partial ? t.partial + blockIdx.z * t.m * t.n : t.c;
  const int64_t ld = t.partial ? t.n : t.ldc;
  const float alpha = t.partial ? 1.f : t.alpha;
  const bool add = t.add && !t.partial, pairs = ld % 2 == 0 && reinterpret_cast<uintptr_t>(c) % 8 == 0;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = column0 + warp % 2 * 64 + 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int64_t row = row0 + warp / 2 * 64 + i * 16 + lane / 4;
    float* at = c + row * ld + column;
    float2 old[2][8] = {};
#pragma unroll
    for (int j = 0; j < 16; j++)
      if (add && row + j / 8 * 8 < t.m)
        old[j / 8][j % 8] = load_two(at + j / 8 * 8 * ld + j % 8 * 8, t.n - column - j % 8 * 8, pairs);
#pragma unroll
    for (int j = 0; j < 16; j++) {
      const int half = j / 8, k = j % 8;
      const float2 v =
          make_float2(alpha * sum[i][k][2 * half] + old[half][k].x, alpha * sum[i][k][2 * half + 1] + old[half][k].y);
      if (row + half * 8 < t.m) store_two(at + half * 8 * ld + k * 8, v, t.n - column - k * 8, pairs);
    }
  }
}

__global__ __launch_bounds__(threads, 2) void product_kernel(Tiles t) {
  wait_for_earlier();
  uint4* shared = dynamic_shared<uint4>();
  int64_t row, column;
  tile_of(t, row, column);
  const int64_t first = blockIdx.z * t.slice;
  const int count = int(min(t.slice, t.steps - first));
  const uint4* a = t.a + (row * tile * t.steps + first) * segment;
  const uint4* b = t.b + (column * tile * t.steps + first) * segment;
  const int warp = threadIdx.x / 32;
  const bool inside = row * tile + warp / 2 * 64 < t.m && column * tile + warp % 2 * 64 < t.n;  // else this warp only copies
  float sum[4][8][4] = {};
  for (int s = 0; s < stages - 1; s++) {
    if (s < count) load_stage(shared + s * stage_pieces, a + s * segment, b + s * segment, t.steps);
    copy_commit();
  }
  for (int s = 0, slot = 0; s < count; s++) {
    copy_wait<stages - 2>();
    __syncthreads();  // step s is there for all; all have read the step whose place the next load takes
    const int ahead = s + stages - 1, to = slot == 0 ? stages - 1 : slot - 1;
    if (ahead < count) load_stage(shared + to * stage_pieces, a + ahead * segment, b + ahead * segment, t.steps);
    copy_commit();
#pragma unroll
    for (int k = 0; k < 2 && inside; k++) {
      Fragments f;
      load_fragments(f, shared + slot * stage_pieces, k);
      multiply(sum, f);
    }
    slot = slot == stages - 1 ? 0 : slot + 1;
  }
  if (inside) store_tile(t, sum, row * tile, column * tile);
}

__global__ void add_slices_kernel(Tiles t, int slices) {
  wait_for_earlier();
  const int64_t i = global_thread(), row = i / t.n, column = i % t.n;
  if (row >= t.m || (t.lower && column / tile > row / tile)) return;
  float sum = 0;
  for (int s = 0; s < slices; s++) sum += t.partial[s * t.m * t.n + i];
  float* at = t.c + row * t.ldc + column;
  *at = t.alpha * sum + (t.add ? *at : 0.f);
}

// Rows [first, first + rows), columns [k0, k0 + k) of the operand.
Split split_of(const Operand& from, int64_t first, int64_t rows, int64_t k0, int64_t k, uint16_t* to) {
  Operand x = from;
  const int64_t offset = x.transposed ? k0 * x.ld + first : first * x.ld + k0;
  x.data = static_cast<const char*>(x.data) + offset * (x.storage == Storage::f32 ? 4 : 2);
  if (x.minus) x.minus += offset;
  if (x.weights) x.weights += k0;
  return {x, rows, k, split_steps(k), to};
}

void split(Context& c, const Split& s) {
  launch<split_kernel>(c, {dim3(unsigned(padded_rows(s.rows) / 64), unsigned(s.steps)), dim3(256)}, s);
}

// How one launch covers its part of the product.
struct Shape {
  int64_t tiles, slice, slices;  // slice: of k
  Shape(const Context& c, const Product& p, int64_t m) {
    const int64_t rows = ceil_div<int64_t>(m, tile), columns = ceil_div<int64_t>(p.n, tile);
    tiles = p.lower ? rows * (rows + 1) / 2 : rows * columns;
    const int64_t wanted = ceil_div<int64_t>(2 * c.multiprocessors, tiles);
    slices = std::clamp<int64_t>(p.k / shortest_slice, 1, wanted);
    slice = ceil_div(std::min(ceil_div(p.k, slices), longest_sum), split_step) * split_step;
  }
};

void multiply_split(Context& c, const Product& p, const Shape& s, Tiles t) {
  const int64_t slices = ceil_div(t.steps, t.slice);
  if (slices > 1) t.partial = c.scratch[slot_partial].get<float>(slices * t.m * t.n);
  const Grid grid{dim3(unsigned(s.tiles), 1, unsigned(slices)), dim3(threads), stages * stage_pieces * sizeof(uint4)};
  launch<product_kernel>(c, grid, t);
  if (slices > 1) launch<add_slices_kernel>(c, per_element(t.m * p.n), t, int(slices));
}

}  // namespace

void product(Context& c, const Product& p) {
  if (p.m == 0 || p.n == 0) return;
  require(p.k > 0, "a product needs an inner dimension");
  const int64_t most_rows = p.lower || p.split_a ? p.m : split_elements / longest_sum;
  const Shape whole(c, p, std::min(p.m, most_rows));
  const int64_t chunk = p.split_a ? p.k : std::min(p.k, whole.slice * whole.slices);
  const bool same = p.m == p.n && p.a.data == p.b.data && p.a.transposed == p.b.transposed && !p.a.minus && !p.a.weights &&
                    most_rows >= p.m && !p.split_a;
  uint16_t* b = c.scratch[slot_split_b].get<uint16_t>(split_size(p.n, chunk));
  uint16_t* a = same || p.split_a ? b : c.scratch[slot_split_a].get<uint16_t>(split_size(std::min(p.m, most_rows), chunk));
  for (int64_t k0 = 0; k0 < p.k; k0 += chunk) {
    const int64_t k = std::min(chunk, p.k - k0);
    split(c, split_of(p.b, 0, p.n, k0, k, b));
    for (int64_t first = 0; first < p.m; first += most_rows) {
      const int64_t rows = std::min(most_rows, p.m - first);
      if (!same && !p.split_a) split(c, split_of(p.a, first, rows, k0, k, a));
      multiply_split(c, p, Shape(c, p, rows),
                     {.a = reinterpret_cast<const uint4*>(p.split_a ? p.split_a : a),
                      .b = reinterpret_cast<const uint4*>(b),
                      .steps = split_steps(k),
                      .slice = whole.slice / split_step,
                      .m = rows,
                      .n = p.n,
                      .columns = ceil_div<int64_t>(p.n, tile),
                      .lower = p.lower,
                      .alpha = p.alpha,
                      .add = p.add || k0 > 0,
                      .c = p.c + first * p.ldc,
                      .ldc = p.ldc,
                      .partial = nullptr});
    }
  }
}

}  // namespace eac::cuda
