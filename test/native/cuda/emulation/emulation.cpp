#include "cuda_runtime.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

namespace eac::emulation {

thread_local Queue* capturing = nullptr;

namespace {

constexpr size_t stack_bytes = 96 * 1024, slot_bytes = 64;

enum class State { fresh, ready, at_warp, at_block, ended };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  jmp_buf at;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  State state = State::fresh;
  Index index{};
  int number = 0;
  std::vector<Copy> open;                 // copies not yet committed
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

struct Block {
  Size grid, size;
  Index index{};
  std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch
  int count = 0;
  std::vector<unsigned char> shared;
  std::vector<unsigned char> slots;  // (warps, 32, slot_bytes)
  Fiber* current = nullptr;
  ucontext_t scheduler;
  jmp_buf back;
  const std::function<void()>* body = nullptr;
  const char* error = nullptr;
} block;

std::mutex one_launch;

void finish(std::vector<Copy>& copies) {
  for (const Copy& c : copies)
    if (c.from)
      std::memcpy(c.to, c.from, c.bytes);
    else
      std::memset(c.to, 0, c.bytes);
  copies.clear();
}

void enter() {
  (*block.body)();
  Fiber& f = *block.current;
  finish(f.open);
  for (auto& g : f.groups) finish(g);
  f.groups.clear();
  f.state = State::ended;
  _longjmp(block.back, 1);
}

void resume(Fiber& f) {
  block.current = &f;
  if (_setjmp(block.back)) return;
  if (f.state == State::fresh) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = stack_bytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
    f.state = State::ready;
    setcontext(&f.context);
  }
  _longjmp(f.at, 1);
}

void wait(State state) {
  Fiber& f = *block.current;
  f.state = state;
  if (!_setjmp(f.at)) _longjmp(block.back, 1);
}

// In which order fibers run between barriers: a kernel that lacks a barrier gives other results in another order.
std::vector<int> order(int n) {
  std::vector<int> o(static_cast<size_t>(n));
  std::iota(o.begin(), o.end(), 0);
  const char* how = std::getenv("EAC_EMULATION_ORDER");
  if (how && !std::strcmp(how, "reverse")) std::reverse(o.begin(), o.end());
  if (how && !std::strcmp(how, "shuffle")) std::shuffle(o.begin(), o.end(), std::mt19937(7));
  return o;
}

// Lets the warp's fibers go on if all of them wait for each other.
bool release_warp(int w) {
  int waiting = 0, live = 0;
  const int end = std::min(w + 32, block.count);
  for (int i = w; i < end; i++) {
    waiting += block.fibers[size_t(i)]->state == State::at_warp;
    live += block.fibers[size_t(i)]->state != State::ended;
  }
  if (waiting == 0 || waiting < live) return false;
  for (int i = w; i < end; i++)
    if (block.fibers[size_t(i)]->state == State::at_warp) block.fibers[size_t(i)]->state = State::ready;
  return true;
}

bool run_ready(Fiber& f) {
  const bool ready = f.state == State::fresh || f.state == State::ready;
  if (ready) resume(f);
  return ready;
}

// Each warp as far as it comes before the next one starts: what lacks a barrier of the block then reads too early.
bool run_warps(bool backwards) {
  bool ran = false;
  const int warps = (block.count + 31) / 32;
  for (int w = 0; w < warps; w++) {
    const int first = 32 * (backwards ? warps - 1 - w : w);
    do {
      for (int i = first; i < std::min(first + 32, block.count); i++) ran |= run_ready(*block.fibers[size_t(i)]);
    } while (release_warp(first));
  }
  return ran;
}

bool run_all(const std::vector<int>& sequence) {
  bool ran = false;
  for (int i : sequence) ran |= run_ready(*block.fibers[size_t(i)]);
  for (int w = 0; w < block.count; w += 32) ran |= release_warp(w);
  return ran;
}

void run_block(const std::vector<int>& sequence) {
  const char* how = std::getenv("EAC_EMULATION_ORDER");
  const bool forwards = how && !std::strcmp(how, "warps"), backwards = how && !std::strcmp(how, "warps-reverse");
  for (;;) {
    const bool ran = forwards || backwards ? run_warps(backwards) : run_all(sequence);
    int waiting = 0, live = 0;
    for (int i = 0; i < block.count; i++) {
      waiting += block.fibers[size_t(i)]->state == State::at_block;
      live += block.fibers[size_t(i)]->state != State::ended;
    }
    if (live == 0) return;
    if (waiting == live) {
      for (int i = 0; i < block.count; i++)
        if (block.fibers[size_t(i)]->state == State::at_block) block.fibers[size_t(i)]->state = State::ready;
      continue;
    }
    if (!ran) {
      block.error = "threads wait at different barriers for ever";
      return;
    }
  }
}

}  // namespace

Index thread_index() { return block.current->index; }
Index block_index() { return block.index; }
Size block_size() { return block.size; }
Size grid_size() { return block.grid; }
unsigned char* dynamic_memory() { return (unsigned char*)((uintptr_t(block.shared.data()) + 127) / 128 * 128); }
void barrier_block() { wait(State::at_block); }
void barrier_warp() { wait(State::at_warp); }
int lane() { return block.current->number % 32; }

uint32_t live_lanes() {
  uint32_t live = 0;
  const int first = block.current->number / 32 * 32;
  for (int i = first; i < std::min(first + 32, block.count); i++)
    if (block.fibers[size_t(i)]->state != State::ended) live |= 1u << (i - first);
  return live;
}

const unsigned char* exchange(const void* mine, size_t size) {
  unsigned char* warp = block.slots.data() + size_t(block.current->number / 32) * 32 * slot_bytes;
  std::memcpy(warp + size_t(lane()) * slot_bytes, mine, size);
  barrier_warp();
  return warp;
}
void leave_exchange() { barrier_warp(); }

void queue_copy(void* to, const void* from, size_t bytes) {
  std::memset(to, 0xff, bytes);  // NaN until it is waited for
  block.current->open.push_back({to, from, bytes});
}
void commit_copies() {
  Fiber& f = *block.current;
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}
void wait_copies(int groups) {
  Fiber& f = *block.current;
  while (int(f.groups.size()) > groups) {
    finish(f.groups.front());
    f.groups.erase(f.groups.begin());
  }
}

const char* run(Size grid, Size size, size_t shared, const std::function<void()>& body) {
  const std::lock_guard lock(one_launch);
  const size_t threads = size_t(size.x) * size.y * size.z;
  if (threads < 1 || threads > 1024 || size.z > 64) return "more threads a block than there may be";
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) return "more blocks than there may be";
  if (shared > 96 * 1024) return "more than 96 KB of shared memory, which some GPUs lack";
  block.grid = grid, block.size = size, block.count = int(threads), block.body = &body, block.error = nullptr;
  while (block.fibers.size() < threads) block.fibers.push_back(std::make_unique<Fiber>());
  block.slots.resize((threads + 31) / 32 * 32 * slot_bytes);
  const std::vector<int> sequence = order(block.count);
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x && !block.error; x++) {
        block.index = {x, y, z};
        block.shared.assign(shared + 256, 0xff);
        for (int i = 0; i < block.count; i++) {
          Fiber& f = *block.fibers[size_t(i)];
          f.state = State::fresh, f.number = i;
          f.index = {unsigned(i) % size.x, unsigned(i) / size.x % size.y, unsigned(i) / (size.x * size.y)};
        }
        run_block(sequence);
      }
  return block.error;
}

}  // namespace eac::emulation
