#include "kernels/matmul/head_linear.h"

#include <algorithm>

#include "core/thread_pool.h"
#include "kernels/convert/convert.h"
#include "kernels/matmul/gemm.h"
#include "kernels/quant/quantize.h"

namespace eac {

HeadWeights::HeadWeights(Matrix w, int64_t heads, int64_t begin, int64_t count, bool transposed)
    : source_(std::move(w)), heads_(heads), begin_(begin), count_(count), cols_(in_features(source_)), transposed_(transposed) {
  const int64_t rows = out_features(source_);
  require(heads > 0 && rows % heads == 0 && begin >= 0 && count > 0 && begin + count <= rows / heads,
          "the rows of a head are not among those of its block of the matrix");
}

const Tensor& HeadWeights::dense() const {
  std::call_once(made_, [&] {
    const QuantMatrix* q = std::get_if<QuantMatrix>(&source_);
    const Tensor w = q ? dequantize(*q) : std::get<Tensor>(source_);
    const int64_t block = w.rows() / heads_;
    dense_ = Tensor::zeros(w.dtype, {heads_ * out(), in()});
    for (int64_t h = 0; h < heads_; h++) {
      const Tensor rows = w.row_range(h * block + begin_, h * block + begin_ + count_);
      const Tensor head = copy_part(rows, {0, 1, out()}, transposed_);
      std::memcpy(dense_.as<char>() + size_t(h) * head.bytes(), head.data, head.bytes());
    }
    source_ = Tensor{};
  });
  return dense_;
}

void head_linear(const float* x, int64_t x_width, int64_t n, const HeadWeights& w, float* out, int64_t out_width) {
  const Matrix weights = w.dense();
  const int64_t step = 64, pieces = (w.out() + step - 1) / step;
  parallel_for(w.heads() * pieces, [&](int64_t task) {
    const int64_t h = task / pieces, begin = h * w.out() + task % pieces * step, end = std::min(begin + step, (h + 1) * w.out());
    // linear_serial writes column r of its result for row r of W.
    linear_serial(x + h * x_width, w.heads() * x_width, n, weights, nullptr, begin, end, 0, out + h * (out_width - w.out()),
                  w.heads() * out_width);
  });
}

}  // namespace eac
