#include "program/cuda/weights.h"

#include "core/thread_pool.h"

namespace eac::cuda {
namespace {

Storage storage_of(DType dtype) {
  switch (dtype) {
    case DType::f16: return Storage::f16;
    case DType::bf16: return Storage::bf16;
    default: return Storage::f32;
  }
}

}  // namespace

DeviceMatrix Weights::dense(const Tensor& t) {
  const Tensor copy = gpu_.take(t);
  return {{storage_of(t.dtype), 0, t.rows(), t.cols(), t.cols(), copy.data, nullptr}, copy.owner, nullptr};
}

DeviceMatrix Weights::quantized(const QuantMatrix& q) {
  const Table& table = gpu_.table();
  const WeightBytes bytes = table.weight_bytes(q.bits, q.rows, q.cols, q.group_size);
  DeviceMatrix m{{Storage::quantized, q.bits, q.rows, q.cols, q.group_size, nullptr, nullptr},
                 gpu_.allocate(bytes.data),
                 gpu_.allocate(bytes.params)};
  m.weight.data = m.data.get(), m.weight.params = m.params.get();
  const Tensor codes = gpu_.take(q.codes), scales = gpu_.take(q.scales), zeros = gpu_.take(q.zeros);
  const PackWeight pack{
      q.bits,       q.rows,        q.cols, q.group_size, codes.as<uint8_t>(), scales.as<uint16_t>(), zeros.as<uint8_t>(),
      m.data.get(), m.params.get()};
  gpu_.run([&](const Stream& s) { s(table.pack_weight(s.context(), &pack)); });
  return m;
}

std::shared_ptr<const DeviceMatrix> Weights::cached(const Key& key, const std::shared_ptr<void>& source, const Matrix& m) {
  Entry& entry = entries_[key];
  auto found = entry.matrix.lock();
  if (found && !entry.source.expired()) return found;
  found = std::make_shared<DeviceMatrix>(std::holds_alternative<Tensor>(m) ? dense(std::get<Tensor>(m))
                                                                           : quantized(std::get<QuantMatrix>(m)));
  entry = {source, found};
  return found;
}

std::shared_ptr<const DeviceMatrix> Weights::matrix(const Matrix& m) {
  if (const auto* q = std::get_if<QuantMatrix>(&m)) return cached({q->codes.data, q->rows, q->cols, q->bits}, q->codes.owner, m);
  const Tensor& t = std::get<Tensor>(m);
  return cached({t.data, t.rows(), t.cols(), 16 + int32_t(t.dtype)}, t.owner, m);
}

// One operation's entry.
struct Preparer {
  Weights& w;
  Prepared p;

  Weight matrix(const Matrix& m) {
    const auto found = w.matrix(m);
    p.keep.push_back(found);
    return found->weight;
  }
  const void* tensor(const Tensor& t) { return matrix(Matrix(t)).data; }
  const float* floats(const std::vector<float>& v) {
    if (v.empty()) return nullptr;
    const auto memory = w.gpu_.upload(v);
    p.keep.push_back(memory);
    return memory.get();
  }
  void router(const RouterSpec& r) { p.first = floats(r.correction); }

  void operator()(const op::Embed& o) { p.tensor = tensor(o.table), p.storage = storage_of(o.table.dtype); }
  void operator()(const op::RmsNorm& o) { p.tensor = tensor(o.weight), p.storage = storage_of(o.weight.dtype); }
  void operator()(const op::LayerNorm& o) {
    // The library takes one storage for both.
    const auto both = [&](const Tensor& t) {
      std::vector<float> v(size_t(t.size()));
      for (size_t i = 0; i < v.size(); i++) v[i] = float(element(t, int64_t(i)));
      return floats(v);
    };
    p.tensor = both(o.weight), p.bias = both(o.bias);
  }
  void operator()(const op::Linear& o) {
    p.weight = matrix(o.weight);
    if (o.bias) p.bias = tensor(*o.bias), p.bias_storage = storage_of(o.bias->dtype);
  }
  void operator()(const op::Rope& o) { p.first = floats(o.rope.frequencies), p.second = floats(o.rope.long_frequencies); }
  void operator()(const op::Attention& o) { p.first = floats(o.attention.sinks); }
  void operator()(const op::Route& o) { router(o.router); }
  void operator()(const op::Reselect& o) { router(o.router); }
  void operator()(const op::HeadLinear& o) { p.weight = matrix(Matrix(o.weights->dense())); }
  void operator()(const op::Experts& o) {
    const auto& e = o.experts;
    const auto bias = [&](size_t i, std::vector<Tensor> ExpertBiases::*which) {
      const Tensor* t = e.bias_of(i, which);
      return t ? static_cast<const float*>(tensor(*t)) : nullptr;
    };
    for (size_t i = 0; i < e.count() + (e.shared ? 1 : 0); i++)
      p.experts.push_back({matrix(e.gate_of(i)), matrix(e.up_of(i)), matrix(e.down_of(i)), bias(i, &ExpertBiases::gate),
                           bias(i, &ExpertBiases::up), bias(i, &ExpertBiases::down)});
    const auto list = w.gpu_.upload(p.experts);
    p.keep.push_back(list);
    p.list = list.get();
    if (e.shared && e.shared->output_gate) p.output_gate = matrix(*e.shared->output_gate);
  }
  template <class Op> void operator()(const Op&) {}
};

std::shared_ptr<const std::vector<Prepared>> Weights::prepare(const Program& program) {
  const std::lock_guard lock(mutex_);
  if (program.prepared) return std::static_pointer_cast<const std::vector<Prepared>>(program.prepared);
  std::erase_if(entries_, [](const auto& e) { return e.second.matrix.expired(); });
  auto all = std::make_shared<std::vector<Prepared>>();
  for (const op::Op& o : program.ops) {
    throw_if_cancelled();
    Preparer preparer{*this, {}};
    std::visit(preparer, o);
    all->push_back(std::move(preparer.p));
  }
  program.prepared = all;
  return all;
}

}  // namespace eac::cuda
