// Runs the CUDA kernels on the CPU, so that their logic is tested where no GPU is: every thread of a block is a fiber, blocks run one after
// the other, but some of a launch before those of the launch before, up to where they wait for it. It shows wrong indices, missing barriers (fibers run in several orders, see EAC_EMULATION_ORDER), reads of memory that nothing wrote
// (allocations are poisoned with NaN), copies and products that were not waited for or not published. It shows nothing about speed or the rest of
// the memory model.
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
uint32_t shared_address(const void* p);
void* shared_pointer(uint32_t address);
// What publish_shared() has shown to the tensor cores, at a shared_address().
const unsigned char* published(uint32_t address);

void barrier_block();
void barrier_warp();
void barrier_of(int number, int threads);
// Barriers in memory: a phase ends when `count` arrivals have come.
void signal_create(uint64_t* signal, int count);
void signal_arrive(uint64_t* signal);
void signal_wait(uint64_t* signal, int parity);
void wait_for_earlier();
// Every lane of a warp gives `size` <= 64 bytes; returns the array of what the 32 lanes gave (stride 64), valid until leave_exchange().
const unsigned char* exchange(const void* mine, size_t size);
void leave_exchange();
int lane();
// Bit l: lane l of this warp has not ended.
uint32_t live_lanes();

void queue_copy(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_copies(int groups);
// Of the copies that this thread has waited for.
void publish_shared();

// Asynchronous work of the thread on n registers, which are NaN until it is done: when it is waited for.
using Work = std::function<void(float* registers)>;
void queue_work(float* registers, int n, Work work);
void commit_work();
void wait_work(int groups);
// Registers have been ordered before the work that follows.
void fence_work();
// The launch fails with this text.
void fail(const char* why);

// Runs body once a thread of every block. Returns an error text, or null. overlap: the launch may begin before the one before it has
// finished; then its last blocks run when something else is queued, or by finish().
const char* run(Size grid, Size block, size_t shared, bool overlap, std::function<void()> body);
const char* finish();

}  // namespace eac::emulation
