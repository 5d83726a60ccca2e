#include <algorithm>

#include "core/thread_pool.h"
#include "kernels/convert/convert.h"

namespace eac {
namespace {

constexpr int64_t tile = 64;

// Rows of the result [begin, end): columns of m, read tile by tile so that each cache line of m is fetched once.
template <class T> void transpose_band(const Tensor& m, const RowRange& part, int64_t begin, int64_t end, T* out) {
  const int64_t a = m.rows(), b = m.cols();
  for (int64_t c0 = 0; c0 < a; c0 += tile)
    for (int64_t r = begin; r < end; r++) {
      const T* in = m.as<T>() + part.from + r * part.step;
      for (int64_t c = c0; c < std::min(a, c0 + tile); c++) out[r * a + c] = in[c * b];
    }
}

}  // namespace

Tensor copy_part(const Tensor& m, const RowRange& part, bool transposed) {
  const int64_t width = transposed ? m.rows() : m.cols();
  const size_t size = dtype_size(m.dtype);
  Tensor out = Tensor::zeros(m.dtype, {part.rows, width});
  parallel_for((part.rows + tile - 1) / tile, [&](int64_t band) {
    const int64_t begin = band * tile, end = std::min(part.rows, begin + tile);
    if (!transposed) {
      const size_t bytes = size_t(width) * size;
      for (int64_t r = begin; r < end; r++)
        std::memcpy(out.as<char>() + size_t(r) * bytes, m.as<char>() + size_t(part.from + r * part.step) * bytes, bytes);
    } else if (size == 1) {
      transpose_band(m, part, begin, end, out.as<uint8_t>());
    } else if (size == 2) {
      transpose_band(m, part, begin, end, out.as<uint16_t>());
    } else if (size == 4) {
      transpose_band(m, part, begin, end, out.as<uint32_t>());
    } else {
      transpose_band(m, part, begin, end, out.as<uint64_t>());
    }
  });
  return out;
}

}  // namespace eac
