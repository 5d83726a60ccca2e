#include "cuda_runtime.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

namespace eac::emulation {

thread_local Queue* capturing = nullptr;

namespace {

constexpr size_t stack_bytes = 96 * 1024, slot_bytes = 64;
constexpr size_t dynamic_offset = 128;  // of dynamic memory in a block's: aligned no better than a GPU promises

enum class State { fresh, ready, at_warp, at_block, at_part, at_signal, at_earlier, ended };

struct Signal {
  uint16_t count, missing;
  uint32_t phase;
};
static_assert(sizeof(Signal) == sizeof(uint64_t));

struct Queued {
  float* registers;
  Work work;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  std::vector<unsigned char> seen{};  // what was there when the thread began to wait for earlier launches
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
  std::vector<Copy> arrived;              // but not published
  std::vector<Queued> open_work;
  std::vector<std::vector<Queued>> work;
  std::map<float*, std::vector<float>> registers;  // what those of work under way hold
  bool fenced = false;
  int part = 0, part_threads = 0;    // at_part
  const uint64_t* signal = nullptr;  // at_signal
  int parity = 0;
  bool waited = false;  // for earlier launches
};

struct Block {
  Size grid, size;
  Index index{};
  std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch
  int count = 0;
  std::vector<unsigned char> shared;
  std::vector<unsigned char> published;  // the same as the tensor cores see it
  bool hopper = false;                   // instructions that only Hopper has were used
  std::vector<unsigned char> slots;      // (warps, 32, slot_bytes)
  Fiber* current = nullptr;
  ucontext_t scheduler;
  jmp_buf back;
  const std::function<void()>* body = nullptr;
  const char* error = nullptr;
  bool early = false, overlap = false;  // of the launch; see run()
};
Block* block = nullptr;  // that runs

unsigned char* window() { return (unsigned char*)((uintptr_t(block->shared.data()) + 1023) / 1024 * 1024); }

void finish(std::vector<Copy>& copies) {
  for (const Copy& c : copies) {
    if (c.from)
      std::memcpy(c.to, c.seen.empty() ? c.from : c.seen.data(), c.bytes);
    else
      std::memset(c.to, 0, c.bytes);
    block->current->arrived.push_back(c);
  }
  copies.clear();
}

bool passed(const uint64_t* signal, int parity) {
  Signal s;
  std::memcpy(&s, signal, sizeof s);
  return int(s.phase & 1) != parity;
}

void enter() {
  (*block->body)();
  Fiber& f = *block->current;
  finish(f.open);
  for (auto& g : f.groups) finish(g);
  f.groups.clear(), f.arrived.clear();
  if (!f.open_work.empty() || !f.work.empty()) fail("a thread ended before its products");
  if (block->overlap && !f.waited) fail("a thread ended before it waited for earlier launches");
  f.open_work.clear(), f.work.clear(), f.registers.clear();
  f.state = State::ended;
  _longjmp(block->back, 1);
}

void resume(Fiber& f) {
  block->current = &f;
  if (_setjmp(block->back)) return;
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
  Fiber& f = *block->current;
  f.state = state;
  if (!_setjmp(f.at)) _longjmp(block->back, 1);
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
  const int end = std::min(w + 32, block->count);
  for (int i = w; i < end; i++) {
    waiting += block->fibers[size_t(i)]->state == State::at_warp;
    live += block->fibers[size_t(i)]->state != State::ended;
  }
  if (waiting == 0 || waiting < live) return false;
  for (int i = w; i < end; i++)
    if (block->fibers[size_t(i)]->state == State::at_warp) block->fibers[size_t(i)]->state = State::ready;
  return true;
}

bool run_ready(Fiber& f) {
  const bool ready =
      f.state == State::fresh || f.state == State::ready || (f.state == State::at_signal && passed(f.signal, f.parity));
  if (ready) resume(f);
  return ready;
}

// Each warp as far as it comes before the next one starts: what lacks a barrier of the block then reads too early.
bool run_warps(bool backwards) {
  bool ran = false;
  const int warps = (block->count + 31) / 32;
  for (int w = 0; w < warps; w++) {
    const int first = 32 * (backwards ? warps - 1 - w : w);
    do {
      for (int i = first; i < std::min(first + 32, block->count); i++) ran |= run_ready(*block->fibers[size_t(i)]);
    } while (release_warp(first));
  }
  return ran;
}

bool run_all(const std::vector<int>& sequence) {
  bool ran = false;
  for (int i : sequence) ran |= run_ready(*block->fibers[size_t(i)]);
  for (int w = 0; w < block->count; w += 32) ran |= release_warp(w);
  return ran;
}

// Barriers of some of the block's threads.
bool release_parts() {
  bool released = false;
  for (int i = 0; i < block->count; i++) {
    const Fiber& first = *block->fibers[size_t(i)];
    if (first.state != State::at_part) continue;
    const int part = first.part, threads = first.part_threads;
    std::vector<Fiber*> there;
    for (int j = i; j < block->count; j++)
      if (Fiber& f = *block->fibers[size_t(j)]; f.state == State::at_part && f.part == part) there.push_back(&f);
    if (int(there.size()) < threads) continue;
    for (Fiber* f : there) f->state = State::ready;
    released = true;
  }
  return released;
}

void run_block(const std::vector<int>& sequence) {
  const char* how = std::getenv("EAC_EMULATION_ORDER");
  const bool forwards = how && !std::strcmp(how, "warps"), backwards = how && !std::strcmp(how, "warps-reverse");
  for (;;) {
    bool ran = forwards || backwards ? run_warps(backwards) : run_all(sequence);
    ran |= release_parts();
    if (block->error) return;
    int waiting = 0, live = 0, held = 0;
    for (int i = 0; i < block->count; i++) {
      waiting += block->fibers[size_t(i)]->state == State::at_block;
      held += block->fibers[size_t(i)]->state == State::at_earlier;
      live += block->fibers[size_t(i)]->state != State::ended;
    }
    if (live == held) return;
    if (waiting == live) {
      for (int i = 0; i < block->count; i++)
        if (block->fibers[size_t(i)]->state == State::at_block) block->fibers[size_t(i)]->state = State::ready;
      continue;
    }
    if (!ran) {
      block->error = "threads wait at different barriers for ever";
      return;
    }
  }
}

}  // namespace

Index thread_index() { return block->current->index; }
Index block_index() { return block->index; }
Size block_size() { return block->size; }
Size grid_size() { return block->grid; }
unsigned char* dynamic_memory() { return window() + dynamic_offset; }
uint32_t shared_address(const void* p) { return uint32_t(static_cast<const unsigned char*>(p) - window()); }
void* shared_pointer(uint32_t address) { return window() + address; }
const unsigned char* published(uint32_t address) {
  return block->published.data() + std::min<size_t>(address, block->published.size() - 16);
}
void barrier_block() { wait(State::at_block); }
void barrier_warp() { wait(State::at_warp); }
void barrier_of(int number, int threads) {
  block->current->part = number, block->current->part_threads = threads;
  wait(State::at_part);
}
int lane() { return block->current->number % 32; }
void wait_for_earlier() {
  Fiber& f = *block->current;
  f.waited = true;
  if (!block->early) return;
  // Copies under way may have read already.
  const auto see = [](std::vector<Copy>& copies) {
    for (Copy& c : copies)
      if (const auto* from = static_cast<const unsigned char*>(c.from)) c.seen.assign(from, from + c.bytes);
  };
  see(f.open);
  for (auto& group : f.groups) see(group);
  wait(State::at_earlier);
}

void signal_create(uint64_t* signal, int count) {
  block->hopper = true;
  const Signal s{uint16_t(count), uint16_t(count), 0};
  std::memcpy(signal, &s, sizeof s);
}
void signal_arrive(uint64_t* signal) {
  Signal s;
  std::memcpy(&s, signal, sizeof s);
  if (--s.missing == 0) s.missing = s.count, s.phase++;
  std::memcpy(signal, &s, sizeof s);
}
void signal_wait(uint64_t* signal, int parity) {
  if (passed(signal, parity)) return;
  block->current->signal = signal, block->current->parity = parity;
  wait(State::at_signal);
}

uint32_t live_lanes() {
  uint32_t live = 0;
  const int first = block->current->number / 32 * 32;
  for (int i = first; i < std::min(first + 32, block->count); i++)
    if (block->fibers[size_t(i)]->state != State::ended) live |= 1u << (i - first);
  return live;
}

const unsigned char* exchange(const void* mine, size_t size) {
  unsigned char* warp = block->slots.data() + size_t(block->current->number / 32) * 32 * slot_bytes;
  std::memcpy(warp + size_t(lane()) * slot_bytes, mine, size);
  barrier_warp();
  return warp;
}
void leave_exchange() { barrier_warp(); }

void queue_copy(void* to, const void* from, size_t bytes) {
  std::memset(to, 0xff, bytes);  // NaN until it is waited for
  block->current->open.push_back({to, from, bytes});
}
void commit_copies() {
  Fiber& f = *block->current;
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}
void wait_copies(int groups) {
  Fiber& f = *block->current;
  while (int(f.groups.size()) > groups) {
    finish(f.groups.front());
    f.groups.erase(f.groups.begin());
  }
}

void publish_shared() {
  for (const Copy& c : block->current->arrived) std::memcpy(block->published.data() + shared_address(c.to), c.to, c.bytes);
  block->current->arrived.clear();
}

void queue_work(float* registers, int n, Work work) {
  Fiber& f = *block->current;
  if (!f.fenced) fail("a product before its fence");
  f.registers.try_emplace(registers, registers, registers + n);
  std::fill(registers, registers + n, NAN);
  f.open_work.push_back({registers, std::move(work)});
}
void commit_work() {
  Fiber& f = *block->current;
  f.work.push_back(std::move(f.open_work));
  f.open_work.clear();
}
void wait_work(int groups) {
  Fiber& f = *block->current;
  std::map<float*, int> left;
  for (const auto& group : f.work)
    for (const Queued& q : group) left[q.registers]++;
  while (int(f.work.size()) > groups) {
    const std::vector<Queued> group = std::move(f.work.front());
    f.work.erase(f.work.begin());
    for (const Queued& q : group) {
      std::vector<float>& held = f.registers.at(q.registers);
      q.work(held.data());
      if (--left[q.registers] > 0) continue;
      std::copy(held.begin(), held.end(), q.registers);
      f.registers.erase(q.registers);
    }
  }
  f.fenced = false;
}
void fence_work() { block->current->fenced = true; }
void fail(const char* why) {
  if (!block->error) block->error = why;
}

namespace {

std::mutex one_launch;

struct Launch {
  Size grid, size;
  size_t shared;
  bool overlap;
  std::function<void()> body;
  std::map<uint64_t, std::unique_ptr<Block>> begun;  // blocks that wait for earlier launches
  uint64_t blocks() const { return uint64_t(grid.x) * grid.y * grid.z; }
};
std::unique_ptr<Launch> last;                // begun, not finished
std::vector<std::unique_ptr<Block>> unused;  // with their fibers

std::unique_ptr<Block> make_block(const Launch& l, uint64_t number, bool early) {
  if (unused.empty()) unused.push_back(std::make_unique<Block>());
  std::unique_ptr<Block> b = std::move(unused.back());
  unused.pop_back();
  const Size size = l.size;
  b->grid = l.grid, b->size = size, b->count = int(size.x * size.y * size.z), b->body = &l.body, b->error = nullptr;
  b->hopper = false, b->early = early, b->overlap = l.overlap;
  b->index = {unsigned(number % l.grid.x), unsigned(number / l.grid.x % l.grid.y), unsigned(number / l.grid.x / l.grid.y)};
  while (b->fibers.size() < size_t(b->count)) b->fibers.push_back(std::make_unique<Fiber>());
  b->slots.resize(size_t(b->count + 31) / 32 * 32 * slot_bytes);
  b->shared.assign(dynamic_offset + l.shared + 1024, 0xff);
  b->published.assign(dynamic_offset + l.shared, 0xff);
  for (int i = 0; i < b->count; i++) {
    Fiber& f = *b->fibers[size_t(i)];
    f.state = State::fresh, f.number = i, f.waited = false;
    f.index = {unsigned(i) % size.x, unsigned(i) / size.x % size.y, unsigned(i) / (size.x * size.y)};
  }
  return b;
}

// Up to where it ends, or its threads wait for earlier launches.
const char* run_made(Block& b) {
  block = &b;
  run_block(order(b.count));
  return b.error;
}

const char* finish_launch(Launch& l) {
  const char* error = nullptr;
  bool hopper = false;
  for (uint64_t i = 0; i < l.blocks() && !error; i++) {
    std::unique_ptr<Block> b;
    if (const auto begun = l.begun.find(i); begun != l.begun.end()) {
      b = std::move(begun->second);
      b->early = false;
      for (int t = 0; t < b->count; t++)
        if (b->fibers[size_t(t)]->state == State::at_earlier) b->fibers[size_t(t)]->state = State::ready;
    } else {
      b = make_block(l, i, false);
    }
    error = run_made(*b);
    hopper |= b->hopper;
    if (!error) unused.push_back(std::move(b));  // after an error its threads have not ended
  }
  if (!error && l.shared > 96 * 1024 && !hopper) error = "more than 96 KB of shared memory, which some GPUs lack";
  return error;
}

const char* finish_last() {
  const std::unique_ptr<Launch> l = std::move(last);
  return l ? finish_launch(*l) : nullptr;
}

}  // namespace

const char* finish() {
  const std::lock_guard lock(one_launch);
  return finish_last();
}

const char* run(Size grid, Size size, size_t shared, bool overlap, std::function<void()> body) {
  const std::lock_guard lock(one_launch);
  const size_t threads = size_t(size.x) * size.y * size.z;
  if (threads < 1 || threads > 1024 || size.z > 64) return "more threads a block than there may be";
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) return "more blocks than there may be";
  if (shared > 227 * 1024) return "more shared memory than there is";
  auto next = std::make_unique<Launch>(grid, size, shared, overlap, std::move(body));
  const char* error = nullptr;
  for (const uint64_t i : {uint64_t(0), next->blocks() / 2, next->blocks() - 1})
    if (overlap && !error && !next->begun.contains(i)) error = run_made(*(next->begun[i] = make_block(*next, i, true)));
  if (const char* earlier = finish_last()) error = earlier;
  last = std::move(next);
  return !error && !overlap ? finish_last() : error;
}

}  // namespace eac::emulation
