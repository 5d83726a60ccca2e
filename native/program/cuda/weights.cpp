#include "program/cuda/weights.h"

#include <algorithm>
#include <cstdio>
#include <set>

#include "core/thread_pool.h"

namespace eac::cuda {
namespace {

WeightBytes bytes_of(const Table& table, const Matrix& m) {
  if (const auto* t = std::get_if<Tensor>(&m)) return {t->bytes(), 0};
  const auto& q = std::get<QuantMatrix>(m);
  return table.weight_bytes(q.bits, q.rows, q.cols, q.group_size);
}
size_t total(const WeightBytes& b) { return b.data + b.params; }

// Calls f with every matrix of the routed and the shared experts.
template <class F> void each_matrix(const eac::Experts& e, F f) {
  for (size_t i = 0; i < e.count_with_shared(); i++) f(e.gate_of(i)), f(e.up_of(i)), f(e.down_of(i));
}

std::string size_text(size_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f %s", double(bytes) / (bytes < 1000000000 ? 1e6 : 1e9), bytes < 1000000000 ? "MB" : "GB");
  return text;
}

}  // namespace

Weights::Key Weights::key_of(const Matrix& m) {
  if (const auto* q = std::get_if<QuantMatrix>(&m)) return {q->codes.data, q->rows, q->cols, q->bits};
  const Tensor& t = std::get<Tensor>(m);
  return {t.data, t.rows(), t.cols(), 16 + int32_t(t.dtype)};
}

DeviceMatrix Weights::copy(const Matrix& m) {
  if (const auto* t = std::get_if<Tensor>(&m)) {
    const Tensor taken = gpu_.take(*t);
    return {{storage_of(t->dtype), 0, t->rows(), t->cols(), t->cols(), taken.data, nullptr}, taken.owner, nullptr};
  }
  const auto& q = std::get<QuantMatrix>(m);
  const Table& table = gpu_.table();
  const WeightBytes bytes = bytes_of(table, q);
  DeviceMatrix made{{Storage::quantized, q.bits, q.rows, q.cols, q.group_size, nullptr, nullptr},
                    gpu_.room(bytes.data),
                    gpu_.room(bytes.params)};
  made.weight.data = made.data.get(), made.weight.params = made.params.get();
  const Tensor codes = gpu_.take(q.codes), scales = gpu_.take(q.scales), zeros = gpu_.take(q.zeros);
  const PackWeight pack{
      q.bits,          q.rows,           q.cols, q.group_size, codes.as<uint8_t>(), scales.as<uint16_t>(), zeros.as<uint8_t>(),
      made.data.get(), made.params.get()};
  gpu_.run([&](const Stream& s) { s(table.pack_weight(s.context(), &pack)); });
  return made;
}

std::shared_ptr<const DeviceMatrix> Weights::find(const Matrix& m) const {
  const auto entry = entries_.find(key_of(m));
  return entry == entries_.end() || entry->second.source.expired() ? nullptr : entry->second.matrix.lock();
}

std::shared_ptr<const DeviceMatrix> Weights::matrix(const Matrix& m) {
  if (auto found = find(m)) return found;
  const auto made = std::make_shared<const DeviceMatrix>(copy(m));
  const auto* t = std::get_if<Tensor>(&m);
  entries_[key_of(m)] = {t ? t->owner : std::get<QuantMatrix>(m).codes.owner, made};
  return made;
}

// One operation's entry.
struct Preparer {
  Weights& w;
  bool staged;
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
    p.tensor = floats(elements(o.weight)), p.bias = floats(elements(o.bias));  // the library takes one storage for both
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
    if (e.shared && e.shared->output_gate) p.output_gate = matrix(*e.shared->output_gate);
    if (staged) return;
    for (size_t i = 0; i < e.count_with_shared(); i++)
      p.experts.push_back({matrix(e.gate_of(i)), matrix(e.up_of(i)), matrix(e.down_of(i)), nullptr, nullptr, nullptr});
    add_biases(e, p.experts);
    const auto list = w.gpu_.upload(p.experts);
    p.keep.push_back(list);
    p.list = list.get();
  }
  template <class Op> void operator()(const Op&) {}

  // They are small: on the device even where the matrices are not.
  void add_biases(const eac::Experts& e, std::vector<Expert>& list) {
    const auto bias = [&](size_t i, std::vector<Tensor> ExpertBiases::*which) {
      const Tensor* t = e.bias_of(i, which);
      return t ? static_cast<const float*>(tensor(*t)) : nullptr;
    };
    for (size_t i = 0; i < list.size(); i++) {
      list[i].gate_bias = bias(i, &ExpertBiases::gate);
      list[i].up_bias = bias(i, &ExpertBiases::up);
      list[i].down_bias = bias(i, &ExpertBiases::down);
    }
  }
};

std::vector<size_t> Weights::first_with(const Program& program) {
  std::map<std::vector<Key>, size_t> seen;
  std::vector<size_t> first(program.ops.size());
  for (size_t i = 0; i < first.size(); i++) {
    first[i] = i;
    const auto* e = std::get_if<op::Experts>(&program.ops[i]);
    if (!e) continue;
    std::vector<Key> keys;
    each_matrix(e->experts, [&](const Matrix& m) { keys.push_back(key_of(m)); });
    first[i] = seen.try_emplace(std::move(keys), i).first->second;
  }
  return first;
}

std::vector<bool> Weights::choose_staged(const Program& program, const std::vector<size_t>& first, size_t limit) const {
  const auto room_now = [&] {
    const DeviceInfo info = gpu_.info();
    const size_t reserve = size_t(info.total_memory) / 20, free = size_t(info.free_memory);
    return std::min(limit > 0 ? limit : free, free > reserve ? free - reserve : 0);
  };
  size_t fixed = 0, all = 0, largest = 0;
  std::vector<size_t> experts(program.ops.size(), 0);
  std::set<Key> seen;  // a program may use a matrix several times
  const auto add = [&](const Matrix& m, size_t& sum) {
    if (seen.insert(key_of(m)).second && !find(m)) sum += total(bytes_of(gpu_.table(), m));
  };
  for (size_t i = 0; i < program.ops.size(); i++) {
    if (const auto* l = std::get_if<op::Linear>(&program.ops[i])) add(l->weight, fixed);
    if (const auto* e = std::get_if<op::Embed>(&program.ops[i])) add(Matrix(e->table), fixed);
    if (const auto* h = std::get_if<op::HeadLinear>(&program.ops[i])) add(Matrix(h->weights->dense()), fixed);
    if (const auto* e = std::get_if<op::Experts>(&program.ops[i]))
      each_matrix(e->experts, [&](const Matrix& m) { add(m, experts[i]); });
    all += experts[i];
    largest = std::max(largest, experts[i]);
  }
  std::vector<bool> staged(program.ops.size(), false);
  if (fixed + all <= room_now()) return staged;
  gpu_.trim();
  const size_t room = room_now();
  if (fixed + all <= room) return staged;
  const size_t least = fixed + 2 * largest;
  if (least > room)
    throw Error("OUT_OF_MEMORY", "the model needs at least " + size_text(least) + " of GPU memory (" + size_text(fixed) +
                                     " that stay, and the experts of two layers, " + size_text(2 * largest) + "), " +
                                     size_text(fixed + all) + " to lie there as a whole; it may use " + size_text(room) +
                                     ". Use fewer bits, a GPU with more memory, or device 'cpu'");
  size_t left = room - least;
  for (size_t i = 0; i < program.ops.size(); i++) {
    staged[i] = first[i] < i ? staged[first[i]] : experts[i] > left;
    left -= staged[i] ? left : experts[i];  // from the first that does not fit on, none does
  }
  return staged;
}

// Packs on the device, keeps the result on the host.
HostExperts Weights::to_host(const eac::Experts& e, size_t op) {
  constexpr size_t align = 256;
  const auto place = [](size_t& end, size_t bytes) {
    const size_t at = end;
    end += (bytes + align - 1) / align * align;
    return at;
  };
  HostExperts host;
  host.op = op;
  each_matrix(e, [&](const Matrix& m) {
    const WeightBytes b = bytes_of(gpu_.table(), m);
    place(host.bytes, b.data), place(host.bytes, b.params);
  });
  gpu_.run([&](const Stream& s) {
    void* block = nullptr;
    s(s.table().allocate_host(s.context(), host.bytes, &block));
    host.block = std::shared_ptr<void>(block, s.table().free_host);
  });
  size_t end = 0;
  const auto store = [&](const Matrix& m) {
    const DeviceMatrix d = copy(m);
    const WeightBytes b = bytes_of(gpu_.table(), m);
    Weight w = d.weight;
    const auto keep = [&](const void*& p, size_t bytes) {
      char* const to = static_cast<char*>(host.block.get()) + place(end, bytes);
      if (!p) return;
      gpu_.to_host(to, p, bytes);
      p = to;
    };
    keep(w.data, b.data), keep(w.params, b.params);
    return w;
  };
  for (size_t i = 0; i < e.count_with_shared(); i++) {
    throw_if_cancelled();
    Expert x{};
    x.gate = store(e.gate_of(i)), x.up = store(e.up_of(i)), x.down = store(e.down_of(i));
    host.experts.push_back(x);
  }
  return host;
}

std::shared_ptr<const PreparedProgram> Weights::prepare(const Program& program, size_t limit) {
  const std::lock_guard lock(mutex_);
  if (program.prepared) return std::static_pointer_cast<const PreparedProgram>(program.prepared);
  std::erase_if(entries_, [](const auto& e) { return e.second.matrix.expired(); });
  const std::vector<size_t> first = first_with(program);
  const std::vector<bool> staged = choose_staged(program, first, limit);
  auto all = std::make_shared<PreparedProgram>();
  std::vector<HostExperts> on_host;
  for (size_t i = 0; i < program.ops.size(); i++) {
    throw_if_cancelled();
    Preparer preparer{*this, staged[i], {}};
    std::visit(preparer, program.ops[i]);
    if (staged[i]) {
      const auto& experts = std::get<op::Experts>(program.ops[i]).experts;
      const auto same = std::find_if(on_host.begin(), on_host.end(), [&](const HostExperts& h) { return h.op == first[i]; });
      HostExperts host = same == on_host.end() ? to_host(experts, i) : *same;  // which shares its block
      host.op = i;
      preparer.add_biases(experts, host.experts);
      preparer.p.experts = host.experts;
      on_host.push_back(std::move(host));
    }
    all->ops.push_back(std::move(preparer.p));
  }
  if (!on_host.empty()) all->staging = std::make_unique<Staging>(gpu_, std::move(on_host));
  program.prepared = all;
  return all;
}

}  // namespace eac::cuda
