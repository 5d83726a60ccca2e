// Runs the CUDA kernels on the CPU, so that their logic is tested where no GPU is: every thread of a block is a fiber, blocks run one after
// the other. It shows wrong indices, missing barriers (fibers run in several orders, see EAC_EMULATION_ORDER), reads of memory that nothing wrote
// (allocations are poisoned with NaN) and copies that were not waited for. It shows nothing about speed or the memory model.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace eac::emulation {

struct Index {
  unsigned x, y, z;
};
struct Size {
  unsigned x, y, z;
  constexpr Size(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// What a running fiber sees.
Index thread_index();
Index block_index();
Size block_size();
Size grid_size();
unsigned char* dynamic_memory();

void barrier_block();
void barrier_warp();
// Every lane of a warp gives `size` <= 64 bytes; returns the array of what the 32 lanes gave (stride 64), valid until leave_exchange().
const unsigned char* exchange(const void* mine, size_t size);
void leave_exchange();
int lane();
// Bit l: lane l of this warp has not ended.
uint32_t live_lanes();

void queue_copy(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_copies(int groups);

// Runs body once a thread of every block. Returns an error text, or null.
const char* run(Size grid, Size block, size_t shared, const std::function<void()>& body);

}  // namespace eac::emulation
