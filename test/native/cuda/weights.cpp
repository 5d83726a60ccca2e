#include "cuda/weights.h"

#include "kernels/bench/random_matrix.h"
#include "kernels/quant/quantize.h"

namespace eac::cuda::check {
namespace {

std::vector<uint8_t> bytes_of(const Tensor& t) { return {t.as<uint8_t>(), t.as<uint8_t>() + t.bytes()}; }

}  // namespace

DeviceMatrix::DeviceMatrix(Matrix m) : host(std::move(m)) {
  weight.rows = out_features(host), weight.cols = in_features(host);
  if (const Tensor* t = std::get_if<Tensor>(&host)) {
    weight.storage = t->dtype == DType::f32 ? Storage::f32 : t->dtype == DType::f16 ? Storage::f16 : Storage::bf16;
    data_ = std::make_unique<Buffer<uint8_t>>(bytes_of(*t));
    weight.data = data_->data();
    return;
  }
  const QuantMatrix& q = std::get<QuantMatrix>(host);
  weight.storage = Storage::quantized, weight.bits = q.bits, weight.group_size = q.group_size;
  const WeightBytes size = device().table.weight_bytes(q.bits, q.rows, q.cols, q.group_size);
  data_ = std::make_unique<Buffer<uint8_t>>(size.data);
  params_ = std::make_unique<Buffer<uint8_t>>(size.params);
  const Buffer<uint8_t> codes(bytes_of(q.codes)), scales(bytes_of(q.scales)), zeros(bytes_of(q.zeros));
  const PackWeight pack{q.bits,       q.rows,        q.cols,
                        q.group_size, codes,         reinterpret_cast<const uint16_t*>(scales.data()),
                        zeros,        data_->data(), params_->data()};
  device()(device().table.pack_weight(device().context, &pack));
  device().synchronize();
  weight.data = data_->data(), weight.params = params_->data();
}

DeviceMatrix DeviceMatrix::copy() const {
  DeviceMatrix m;
  m.host = host, m.weight = weight;
  m.data_ = std::make_unique<Buffer<uint8_t>>(data_->copy());
  m.weight.data = m.data_->data();
  if (params_) {
    m.params_ = std::make_unique<Buffer<uint8_t>>(params_->copy());
    m.weight.params = m.params_->data();
  }
  return m;
}

Matrix any_matrix(int64_t rows, int64_t cols, int kind, int64_t group_size, bool symmetric, unsigned seed) {
  if (kind > 4) return random_matrix(rows, cols, kind == 32 ? DType::f32 : kind == 17 ? DType::f16 : DType::bf16, seed);
  if (cols % 32 == 0) return random_quant_matrix(rows, cols, kind, group_size, symmetric, seed);
  return quantize_rtn(random_matrix(rows, cols, DType::f32, seed), {kind, group_size, symmetric, false}, nullptr);
}

std::string kind_name(int kind) {
  return kind == 32 ? "f32" : kind == 17 ? "f16" : kind == 16 ? "bf16" : "int" + std::to_string(kind);
}

std::vector<float> rounded(std::vector<float> x) {
  for (float& v : x) v = bf16_to_f32(f32_to_bf16(v));
  return x;
}

}  // namespace eac::cuda::check
