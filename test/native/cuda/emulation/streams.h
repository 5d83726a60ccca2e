// Streams and events. By default work is done when it is queued. EAC_EMULATION_QUEUE makes it wait, as on a GPU, until somebody waits for it, so that
// whoever forgets to is found out:
//   late    nothing runs before it must
//   early   the same, but other streams first run as far as their events let them
// Environment besides, for tests:
//   EAC_EMULATION_LOST    a file; from when on it is there the GPU fails for good, as after an illegal memory access
//   EAC_EMULATION_COPIES  a file that gets a line, the number of bytes, for each copy from pinned memory
#pragma once
#include <cstddef>
#include <functional>

enum cudaError_t : int;
using cudaStream_t = struct EmulatedStream*;
using cudaEvent_t = struct EmulatedEvent*;

namespace eac::emulation {

using Task = std::function<cudaError_t()>;

cudaError_t submit(cudaStream_t stream, Task task);
// A copy whose source may be changed on return unless it is pinned. `copy` is to read from its argument.
cudaError_t submit_copy(cudaStream_t stream, const void* from, size_t bytes, std::function<cudaError_t(const void* from)> copy);
cudaError_t finish_stream(cudaStream_t stream);
// What frees memory waits for everything.
void finish_streams();
void note_pinned(const void* memory, size_t bytes);  // 0: no longer
bool lost();

// What is queued on the stream by now ends with a launch, which the next one may overlap.
void note_launch(cudaStream_t stream, bool launch);
bool behind_launch(cudaStream_t stream);

cudaStream_t make_stream();
cudaEvent_t make_event();
void free_event(cudaEvent_t event);
void record(cudaEvent_t event, cudaStream_t stream);
void wait_for(cudaStream_t stream, cudaEvent_t event);

}  // namespace eac::emulation
