#include "streams.h"

#include <sys/stat.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

struct EmulatedEvent {
  EmulatedStream* stream = nullptr;
  uint64_t after = 0;  // so many items of it
};

namespace {

struct Item {
  eac::emulation::Task task;
  EmulatedEvent wait;  // or of another stream, instead
};

}  // namespace

struct EmulatedStream {
  std::deque<Item> queue;
  uint64_t queued = 0, done = 0;
  cudaError_t error = cudaSuccess;  // of what ran since somebody asked
  bool behind_launch = false;
};

namespace eac::emulation {
namespace {

std::recursive_mutex mutex;
std::vector<std::unique_ptr<EmulatedStream>> streams;  // kept: events name them
std::map<const char*, size_t> pinned;

bool queueing() { return std::getenv("EAC_EMULATION_QUEUE"); }
bool others_first() {
  static const bool early = !std::strcmp(std::getenv("EAC_EMULATION_QUEUE"), "early");
  return early;
}

bool ready(const EmulatedStream& s) {
  if (s.queue.empty()) return false;
  const EmulatedEvent& wait = s.queue.front().wait;
  return !wait.stream || wait.stream->done >= wait.after;
}
void run_first(EmulatedStream& s) {
  const Item item = std::move(s.queue.front());
  s.queue.pop_front();
  if (const cudaError_t status = lost() ? cudaErrorIllegalAddress : item.task ? item.task() : cudaSuccess; status != cudaSuccess)
    s.error = status;
  s.done++;
}
void run_until(EmulatedStream& s, uint64_t count) {
  while (s.done < count) {
    if (others_first())
      for (const auto& other : streams)
        while (other.get() != &s && ready(*other)) run_first(*other);
    if (s.done >= count) return;
    if (ready(s))
      run_first(s);
    else
      run_until(*s.queue.front().wait.stream, s.queue.front().wait.after);
  }
}

void push(EmulatedStream& s, Item item) {
  s.queue.push_back(std::move(item));
  s.queued++;
}

bool is_pinned(const void* p) {
  const auto after = pinned.upper_bound(static_cast<const char*>(p));
  return after != pinned.begin() && std::prev(after)->first + std::prev(after)->second > p;
}

}  // namespace

bool lost() {
  static const char* const file = std::getenv("EAC_EMULATION_LOST");
  struct stat found;
  return file && stat(file, &found) == 0;
}

cudaError_t submit(cudaStream_t stream, Task task) {
  if (lost()) return cudaErrorIllegalAddress;
  if (!queueing()) return task();
  const std::lock_guard lock(mutex);
  push(*stream, {std::move(task), {}});
  return cudaSuccess;
}

cudaError_t submit_copy(cudaStream_t stream, const void* from, size_t bytes, std::function<cudaError_t(const void*)> copy) {
  const std::lock_guard lock(mutex);
  static const char* const file = std::getenv("EAC_EMULATION_COPIES");
  const bool stays = is_pinned(from);
  if (file && stays)
    if (FILE* f = std::fopen(file, "a")) std::fprintf(f, "%zu\n", bytes), std::fclose(f);
  if (stays || !queueing()) return submit(stream, [=] { return copy(from); });
  const char* const begin = static_cast<const char*>(from);
  const auto staged = std::make_shared<const std::vector<char>>(begin, begin + bytes);
  return submit(stream, [=] { return copy(staged->data()); });
}

cudaError_t finish_stream(cudaStream_t stream) {
  const std::lock_guard lock(mutex);
  run_until(*stream, stream->queued);
  return lost() ? cudaErrorIllegalAddress : std::exchange(stream->error, cudaSuccess);
}

void finish_streams() {
  const std::lock_guard lock(mutex);
  for (size_t i = 0; i < streams.size(); i++) run_until(*streams[i], streams[i]->queued);
}

void note_pinned(const void* memory, size_t bytes) {
  const std::lock_guard lock(mutex);
  if (bytes)
    pinned[static_cast<const char*>(memory)] = bytes;
  else
    pinned.erase(static_cast<const char*>(memory));
}

void note_launch(cudaStream_t stream, bool launch) {
  if (stream) stream->behind_launch = launch;
}
bool behind_launch(cudaStream_t stream) { return stream && stream->behind_launch; }

cudaStream_t make_stream() {
  const std::lock_guard lock(mutex);
  return streams.emplace_back(std::make_unique<EmulatedStream>()).get();
}
cudaEvent_t make_event() { return new EmulatedEvent; }
void free_event(cudaEvent_t event) { delete event; }

void record(cudaEvent_t event, cudaStream_t stream) {
  const std::lock_guard lock(mutex);
  *event = {stream, stream->queued};
}
void wait_for(cudaStream_t stream, cudaEvent_t event) {
  const std::lock_guard lock(mutex);
  if (event->stream && queueing()) push(*stream, {{}, *event});
}

}  // namespace eac::emulation
