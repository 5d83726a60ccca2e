#include "program/cuda/device.h"

namespace eac::cuda {

Stream::Stream(const Table& table) : table_(table) {
  const Status status = table_.open(0, &context_);
  try {
    (*this)(status);
  } catch (const Error& e) {
    if (context_) table_.close(context_);
    throw Error(e.code, std::string("the GPU cannot be opened: ") + e.what());
  }
}
Stream::~Stream() { table_.close(context_); }

std::shared_ptr<void> Gpu::room(size_t bytes) {
  void* memory = nullptr;
  run([&](const Stream& s) {
    const auto allocate = [&] { return s.table().allocate(s.context(), std::max<size_t>(bytes, 16), &memory); };
    Status status = allocate();
    if (status == Status::out_of_memory) {
      s(s.table().trim(s.context()));
      status = allocate();
    }
    s(status);
  });
  return std::shared_ptr<void>(memory, table().free);
}
std::shared_ptr<void> Gpu::allocate(size_t bytes) {
  auto memory = room(bytes);
  run([&](const Stream& s) { s(s.table().zero(s.context(), memory.get(), bytes)); });
  return memory;
}
void Gpu::to_host(void* host, const void* device, size_t bytes) {
  run([&](const Stream& s) { s(s.table().download(s.context(), host, device, bytes)); });
}
void Gpu::from_host(void* device, const void* host, size_t bytes) {
  run([&](const Stream& s) { s.upload(device, host, bytes); });
}
void Gpu::copy(void* to, const void* from, size_t bytes) {
  run([&](const Stream& s) { s(s.table().copy(s.context(), to, from, bytes)); });
}

DeviceInfo Gpu::info() {
  DeviceInfo info{};
  const Status status = table().describe(0, &info);
  if (status != Status::ok) run([](const Stream&) {});  // its error says what is the matter
  check(table(), nullptr, status);
  return info;
}

void Gpu::trim() {
  run([](const Stream& s) { s(s.table().trim(s.context())); });
}

Tensor Gpu::take(const Tensor& t) {
  if (t.device == this) return t;
  Tensor copy{t.dtype, t.shape, nullptr, room(t.bytes()), this};
  copy.data = copy.owner.get();
  from_host(copy.data, t.data, t.bytes());
  return copy;
}

Gpu& gpu() {
  // Never destroyed: handles may outlive every static object.
  static Gpu& found = *new Gpu(library());
  return found;
}

}  // namespace eac::cuda
