// Weights as published, made into float matrices: see kernels/convert/convert.h.
#include "kernels/convert/convert.h"
#include "addon/handles.h"

namespace eac::addon {
namespace {

int64_t count_from(const Napi::Object& o, const char* key, int64_t least) {
  const double d = number_from(o, key);
  if (!(d >= double(least) && d <= 0x1p52) || d != double(int64_t(d)))
    throw_invalid(std::string("expected a whole number >= ") + std::to_string(least) + " for " + key);
  return int64_t(d);
}
// A range within a matrix of `available` rows.
RowRange range_from(const Napi::Value& v, int64_t available) {
  const Napi::Object o = v.As<Napi::Object>();
  const RowRange r{count_from(o, "from", 0), count_from(o, "step", 1), count_from(o, "rows", 0)};
  // Divided, not multiplied: no overflow.
  if (r.rows > 0 && (r.from >= available || r.rows - 1 > (available - 1 - r.from) / r.step))
    throw_invalid(std::to_string(r.rows) + " rows from " + std::to_string(r.from) + " in steps of " + std::to_string(r.step) +
                  " of a matrix with " + std::to_string(available));
  return r;
}
std::shared_ptr<Tensor> bytes_from(const Napi::Value& v, const char* what) {
  auto t = host_tensor_from(v, what);
  if (t->dtype != DType::u8) throw_invalid(std::string(what) + " has dtype " + dtype_name(t->dtype) + "; expected u8");
  return t;
}
void same_shape(const Tensor& t, int64_t rows, int64_t cols, const char* what) {
  if (t.rows() != rows || t.cols() != cols)
    throw_invalid(std::string(what) + " must be [" + std::to_string(rows) + ", " + std::to_string(cols) + "], found [" +
                  std::to_string(t.rows()) + ", " + std::to_string(t.cols()) + "]");
}
Napi::Value start(Info info, int control, std::function<Tensor()> compute) {
  return Job<Tensor>::start(info.Env(), info[size_t(control)], std::move(compute),
                            [](Napi::Env env, Tensor& t) { return wrap_tensor(env, std::move(t)); });
}

Napi::Value js_copy_part(Info info) {
  const auto m = host_tensor_from(info[0], "m");
  const bool transposed = bool_from(info[1].As<Napi::Object>(), "transposed");
  const RowRange part = range_from(info[1], transposed ? m->cols() : m->rows());
  return start(info, 2, [m, part, transposed] { return copy_part(*m, part, transposed); });
}

Napi::Value js_decode_fp8(Info info) {
  const auto codes = bytes_from(info[0], "codes"), scales = float_matrix_from(info[1], "scales");
  if (!info[2].IsArray() || info[2].As<Napi::Array>().Length() != 2) throw_invalid("expected [rows, cols] for block");
  const auto block = shape_from(info[2]);
  if (block[0] < 1 || block[1] < 1) throw_invalid("expected positive sizes for block");
  same_shape(*scales, (codes->rows() + block[0] - 1) / block[0], (codes->cols() + block[1] - 1) / block[1], "scales");
  return start(info, 3, [codes, scales, block] { return decode_fp8(*codes, *scales, block[0], block[1]); });
}

Napi::Value js_decode_mxfp4(Info info) {
  const auto blocks = bytes_from(info[0], "blocks"), scales = bytes_from(info[1], "scales");
  same_shape(*blocks, scales->rows(), 16 * scales->cols(), "blocks");
  const RowRange part = range_from(info[2], scales->rows());
  return start(info, 3, [blocks, scales, part] { return decode_mxfp4(*blocks, *scales, part); });
}

}  // namespace

void define_convert(Napi::Object exports) {
  define<js_copy_part>(exports, "copyPart");
  define<js_decode_fp8>(exports, "decodeFp8");
  define<js_decode_mxfp4>(exports, "decodeMxfp4");
}

}  // namespace eac::addon
