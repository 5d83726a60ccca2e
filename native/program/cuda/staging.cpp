#include "program/cuda/staging.h"

#include <algorithm>

namespace eac::cuda {
namespace {

// Null stays null.
const void* moved(const void* p, const void* from, const void* to) {
  return p ? static_cast<const char*>(to) + (static_cast<const char*>(p) - static_cast<const char*>(from)) : nullptr;
}

}  // namespace

Staging::Staging(Gpu& gpu, std::vector<HostExperts> layers) : gpu_(gpu), copies_(gpu.table()), layers_(std::move(layers)) {
  size_t bytes = 0;
  for (const HostExperts& l : layers_) {
    bytes = std::max(bytes, l.bytes);
    host_lists_.push_back(gpu_.upload(l.experts));
  }
  for (size_t i = 0; i < 2; i++) {
    places_[i].memory = gpu_.room(bytes);
    for (const HostExperts& l : layers_) {
      std::vector<Expert> list = l.experts;
      for (Expert& e : list)
        for (Weight* w : {&e.gate, &e.up, &e.down}) {
          w->data = moved(w->data, l.block.get(), places_[i].memory.get());
          w->params = moved(w->params, l.block.get(), places_[i].memory.get());
        }
      lists_[i].push_back(gpu_.upload(list));
    }
  }
}

Staging::~Staging() {
  const Table& t = gpu_.table();
  t.synchronize(copies_.context());  // a run that was given up may have left copies under way
  for (const Place& p : places_)
    for (Event* e : {p.copied, p.left})
      if (e) t.free_event(e);
}

size_t Staging::layer_of(size_t op) const {
  const auto at = std::find_if(layers_.begin(), layers_.end(), [&](const HostExperts& l) { return l.op == op; });
  return size_t(at - layers_.begin());
}

void Staging::start(const Stream& s, size_t from, size_t to) {
  const auto before = [&](size_t op) {
    return size_t(std::count_if(layers_.begin(), layers_.end(), [&](const HostExperts& l) { return l.op < op; }));
  };
  next_ = before(from), end_ = before(to);
  // An earlier run may have ended early, with both places in use.
  for (Place& p : places_) s(s.table().record(s.context(), &p.left));
  for (int i = 0; i < 2; i++) fetch();
}

void Staging::fetch() {
  if (next_ >= end_) return;
  const HostExperts& layer = layers_[next_];
  Place& p = places_[next_++ % 2];
  const Table& t = copies_.table();
  copies_(t.wait(copies_.context(), p.left));
  copies_.upload(p.memory.get(), layer.block.get(), layer.bytes);
  copies_(t.record(copies_.context(), &p.copied));
}

const Expert* Staging::arrive(const Stream& s, size_t op) {
  const size_t layer = layer_of(op);
  s(s.table().wait(s.context(), places_[layer % 2].copied));
  return lists_[layer % 2][layer].get();
}

void Staging::leave(const Stream& s, size_t op) {
  s(s.table().record(s.context(), &places_[layer_of(op) % 2].left));
  fetch();
}

}  // namespace eac::cuda
