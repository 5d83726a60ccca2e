// Memory, and life after errors.
#include <cstring>

#include "cuda/check.h"

namespace eac::cuda::check {
namespace {

int64_t free_memory() {
  DeviceInfo info{};
  device()(device().table.describe(0, &info));
  return info.free_memory;
}

void check_works(const std::string& after) {
  const Buffer<float> x(std::vector<float>{1, 2, 3});
  const Scale s{x, 2, 3};
  device()(device().table.scale(device().context, &s));
  equal("an operation after " + after, x.read(), {2, 4, 6});
}

void check_errors() {
  const Table& t = device().table;
  Context* const c = device().context;
  void* memory = nullptr;
  const Status status = t.allocate(c, size_t(1) << 50, &memory);
  report("too much memory", status == Status::out_of_memory && std::strstr(t.error(c), "1125899906842624 bytes"), t.error(c));
  check_works("too much memory was asked for");
  const Buffer<float> x(4);
  const Norm wrong{x, 1, 0, Storage::f32, x, nullptr, 0, x};
  const Status refused = t.norm(c, &wrong);
  report("a wrong argument", refused == Status::invalid_argument, t.error(c));
  check_works("a wrong argument");
  if (device().emulated()) return;  // it knows no misuse of captures
  Graph* graph = nullptr;
  const Status ended = t.end_capture(c, &graph);
  report("the end of a capture that did not begin", ended == Status::failed, t.error(c));
  check_works("the end of a capture that did not begin");
}

// Greedy sampling of many rows takes 11 MB of scratch memory and no time.
void check_trim() {
  constexpr int64_t rows = 64, vocabulary = 4, least = 8 << 20;
  const Table& t = device().table;
  Context* const c = device().context;
  std::vector<float> logits(size_t(rows * vocabulary), 0);
  std::vector<int32_t> want;
  for (int64_t r = 0; r < rows; r++) logits[size_t(r * vocabulary + r % 3)] = 1, want.push_back(int32_t(r % 3));
  const Buffer<float> x(logits);
  for (int i = 0; i < 2; i++) {
    const Buffer<int32_t> ids(want.size());
    const Sample s{x, rows, vocabulary, 0, 0, 1, nullptr, ids};
    device()(t.sample(c, &s));
    equal("sampling, scratch memory taken " + std::to_string(i + 1), ids.read(), want);
    const int64_t free = free_memory();
    const uint64_t moves = t.scratch_moves(c);
    device()(t.trim(c));
    report("scratch memory given back " + std::to_string(i + 1), free_memory() - free >= least && t.scratch_moves(c) != moves,
           std::to_string(free_memory() - free) + " bytes");
  }
}

void check_device() {
  if (device().emulated() || !device().slow()) check_errors();  // compute-sanitizer counts errors that are meant, too
  check_trim();
}

const Group group("device", check_device, [] {});

}  // namespace
}  // namespace eac::cuda::check
