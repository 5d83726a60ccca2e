// The kernels as functions: arguments are parsed on the JavaScript thread into native values, the work runs as a job.
#include "addon/arguments.h"
#include "kernels/matmul/gemm.h"
#include "kernels/nn/output.h"

#include <cmath>
#include <cstdio>
#include <numeric>

namespace eac::addon {
namespace {

Napi::Value f64_value(Napi::Env env, std::vector<double>& v) {
  auto a = Napi::Float64Array::New(env, v.size());
  std::copy(v.begin(), v.end(), a.Data());
  return a;
}

Napi::Value cast(Info info) {
  const auto t = float_matrix_from(info[0], "tensor");
  const DType to = dtype_from(info[1]);
  return Job<Tensor>::start(
      info.Env(), info[2],
      [t, to] {
        Tensor out = Tensor::zeros(to, t->shape);
        const int64_t n = t->size(), block = 1 << 16;
        parallel_for((n + block - 1) / block, [&](int64_t b) {
          for (int64_t i = b * block; i < std::min(n, (b + 1) * block); i++) {
            const double v = element(*t, i);
            if (to == DType::f32)
              out.f32()[i] = float(v);
            else if (to == DType::bf16)
              out.as<uint16_t>()[i] = f32_to_bf16(float(v));
            else if (to == DType::f16)
              out.as<uint16_t>()[i] = f32_to_f16(float(v));
            else if (to == DType::f64)
              out.as<double>()[i] = v;
          }
        });
        return out;
      },
      tensor_value);
}

struct Scan {
  int64_t non_finite;
  uint64_t hash;
};

// First NaN or infinity of elements [begin, end), or -1: an exponent of all ones, one integer test an element in whatever width.
int64_t first_non_finite(const Tensor& t, int64_t begin, int64_t end) {
  bool bad = false;
  if (t.dtype == DType::f32) {
    for (int64_t i = begin; i < end; i++) bad |= (t.as<uint32_t>()[i] & 0x7f800000u) == 0x7f800000u;
  } else {
    const uint16_t mask = t.dtype == DType::f16 ? 0x7c00 : 0x7f80;
    for (int64_t i = begin; i < end; i++) bad |= (t.as<uint16_t>()[i] & mask) == mask;
  }
  for (int64_t i = begin; bad && i < end; i++)
    if (!std::isfinite(element(t, i))) return i;
  return -1;
}

// 64-bit hash of bytes: multiply and fold, 8 bytes a step (as in wyhash). Tells files apart; no defence against forgery.
uint64_t hash_bytes(const uint8_t* p, size_t n, uint64_t h) {
  const auto mix = [](uint64_t a, uint64_t b) {
    const unsigned __int128 m = static_cast<unsigned __int128>(a) * b;
    return uint64_t(m) ^ uint64_t(m >> 64);
  };
  for (; n > 0;) {
    uint64_t word = 0;
    const size_t step = n < 8 ? n : 8;
    std::memcpy(&word, p, step);
    h = mix(h ^ word ^ 0xa0761d6478bd642full, 0xe7037ed1a0b428dbull + step);
    p += step, n -= step;
  }
  return h;
}

Napi::Value scan_tensor(Info info) {
  const auto t = float_matrix_from(info[0], "tensor");
  return Job<Scan>::start(
      info.Env(), info[1],
      [t]() -> Scan {
        const int64_t n = t->size(), block = 1 << 18, blocks = (n + block - 1) / block;
        const size_t size = dtype_size(t->dtype);
        std::vector<Scan> parts(static_cast<size_t>(blocks));
        parallel_for(blocks, [&](int64_t b) {
          const int64_t begin = b * block, end = std::min(n, begin + block);
          parts[size_t(b)] = {first_non_finite(*t, begin, end),
                              hash_bytes(t->as<uint8_t>() + size_t(begin) * size, size_t(end - begin) * size, uint64_t(n))};
        });
        Scan all{-1, uint64_t(n)};
        for (const Scan& part : parts) {
          if (all.non_finite < 0) all.non_finite = part.non_finite;
          all.hash = hash_bytes(reinterpret_cast<const uint8_t*>(&part.hash), sizeof part.hash, all.hash);
        }
        return all;
      },
      [](Napi::Env env, Scan& scan) -> Napi::Value {
        char hex[17];
        std::snprintf(hex, sizeof hex, "%016llx", static_cast<unsigned long long>(scan.hash));
        Napi::Object o = Napi::Object::New(env);
        o["nonFinite"] = double(scan.non_finite);
        o["hash"] = hex;
        return o;
      });
}

Napi::Value js_quantize_rtn(Info info) {
  const auto w = float_matrix_from(info[0], "w");
  const QuantOptions o = quant_options(info[1]);
  auto importance = weights_from(info[2], w->cols(), "importance");
  return Job<QuantMatrix>::start(
      info.Env(), info[3],
      [w, o, importance = std::move(importance)] {
        return quantize_rtn(*w, o, importance.empty() ? nullptr : importance.data());
      },
      quant_matrix_value);
}

Napi::Value js_pack_codes(Info info) {
  const auto codes = host_tensor_from(info[0], "codes"), scales = host_tensor_from(info[1], "scales"),
             zeros = host_tensor_from(info[2], "zeros");
  Napi::Object o = info[3].As<Napi::Object>();
  o["clipSearch"] = false;
  const QuantOptions q = quant_options(o);
  const int64_t groups = (codes->cols() + q.group_size - 1) / q.group_size;
  if (codes->dtype != DType::u8 || scales->dtype != DType::f16 || zeros->dtype != DType::u8)
    throw_invalid("expected codes u8, scales f16 and zeros u8");
  for (const auto& t : {scales, zeros})
    same_width(t->rows(), codes->rows(), "rows of scales and zeros"), same_width(t->cols(), groups, "groups of scales and zeros");
  return Job<QuantMatrix>::start(
      info.Env(), info[4],
      [codes, scales, zeros, q] {
        for (const auto& t : {codes, zeros})
          for (int64_t i = 0; i < t->size(); i++)
            if (t->as<uint8_t>()[i] >> q.bits)
              throw_invalid("a code or zero point does not fit " + std::to_string(q.bits) + " bits");
        return pack_codes(*codes, *scales, *zeros, q.bits, q.group_size, q.symmetric);
      },
      quant_matrix_value);
}

Napi::Value js_from_gptq(Info info) {
  const Napi::Object t = info[0].As<Napi::Object>();
  Napi::Object o = info[1].As<Napi::Object>();
  o["clipSearch"] = false;
  const QuantOptions q = quant_options(o);
  const int64_t rows = int64_t(number_from(o, "rows")), cols = int64_t(number_from(o, "cols")),
                groups = (cols + q.group_size - 1) / q.group_size;
  const auto part = [&](const char* key, DType dtype, int64_t r, int64_t c) {
    const auto tensor = host_tensor_from(t.Get(key), key);
    if (tensor->dtype != dtype || tensor->rows() != r || tensor->cols() != c)
      throw Error("INVALID_TENSOR", std::string(key) + " must be " + dtype_name(dtype) + " [" + std::to_string(r) + ", " +
                                        std::to_string(c) + "], found " + dtype_name(tensor->dtype) + " [" +
                                        std::to_string(tensor->rows()) + ", " + std::to_string(tensor->cols()) + "]");
    return *tensor;
  };
  GptqTensors g{part("qweight", DType::i32, (cols + 31) / 32 * q.bits, rows),
                part("qzeros", DType::i32, groups, (rows + 31) / 32 * q.bits), part("scales", DType::f16, groups, rows),
                part("gIdx", DType::i32, 1, cols)};
  return Job<QuantMatrix>::start(
      info.Env(), info[2],
      [g = std::move(g), rows, cols, q] { return from_gptq(g, rows, cols, q.bits, q.group_size, q.symmetric); },
      quant_matrix_value);
}

Napi::Value js_linear(Info info) {
  const auto x = float_matrix_from(info[0], "x", DType::f32);
  auto w = std::make_shared<Matrix>(matrix_from(info[1], "w"));
  std::shared_ptr<Tensor> bias;
  if (!info[2].IsUndefined() && !info[2].IsNull()) bias = float_matrix_from(info[2], "bias");
  const Activations activations = activations_from(info[3]);
  same_width(x->cols(), in_features(*w), "width of x");
  if (bias) same_width(bias->size(), out_features(*w), "size of bias");
  return Job<Tensor>::start(
      info.Env(), info[4],
      [x, w, bias, activations] {
        Tensor y = Tensor::zeros(DType::f32, {x->rows(), out_features(*w)});
        linear(x->f32(), x->cols(), x->rows(), *w, bias.get(), 0, y.f32(), y.cols(), activations);
        return y;
      },
      tensor_value);
}

Napi::Value js_token_nll(Info info) {
  const auto logits = matrix_anywhere(info[0], "logits", DType::f32);
  auto targets = i32_from(info[1], "targets");
  same_width(int64_t(targets.size()), logits->rows(), "number of targets");
  for (int32_t t : targets)
    if (t < -1 || t >= logits->cols()) throw_invalid("target " + std::to_string(t) + " is outside the vocabulary");
  return Job<std::vector<double>>::start(
      info.Env(), info[2],
      [logits, targets = std::move(targets)] {
        std::vector<double> nll(targets.size());
        const Tensor host = logits->on_host();
        token_nll(host.f32(), logits->rows(), logits->cols(), targets.data(), nll.data());
        return nll;
      },
      f64_value);
}

Napi::Value js_kl_divergence(Info info) {
  const auto p = matrix_anywhere(info[0], "p", DType::f32), q = matrix_anywhere(info[1], "q", DType::f32);
  same_width(p->rows(), q->rows(), "rows of q"), same_width(p->cols(), q->cols(), "width of q");
  return Job<std::vector<double>>::start(
      info.Env(), info[2],
      [p, q] {
        std::vector<double> kl(static_cast<size_t>(p->rows()));
        const Tensor a = p->on_host(), b = q->on_host();
        kl_divergence(a.f32(), b.f32(), p->rows(), p->cols(), kl.data());
        return kl;
      },
      f64_value);
}

}  // namespace

void define_kernels(Napi::Object exports) {
  define<cast>(exports, "cast");
  define<scan_tensor>(exports, "scanTensor");
  define<js_quantize_rtn>(exports, "quantizeRtn");
  define<js_pack_codes>(exports, "packCodes");
  define<js_from_gptq>(exports, "fromGptq");
  define<js_linear>(exports, "linear");
  define<js_token_nll>(exports, "tokenNll");
  define<js_kl_divergence>(exports, "klDivergence");
}

}  // namespace eac::addon
