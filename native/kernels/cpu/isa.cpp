#include "kernels/cpu/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace eac {

extern const Isa isa_baseline;
#if defined(__x86_64__)
extern const Isa isa_avx2, isa_avx512;
#elif defined(__aarch64__)
extern const Isa isa_dotprod, isa_i8mm;
#endif

namespace {

// The levels of this architecture, weakest first; each includes those before it. detect() says how many this machine has.
#if defined(__x86_64__)
const Isa* const ladder[] = {&isa_baseline, &isa_avx2, &isa_avx512};

// CPUID says what the processor has, XGETBV which registers the operating system saves.
int detect() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 1;
  constexpr unsigned fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
  if ((c & (fma | osxsave | avx | f16c)) != (fma | osxsave | avx | f16c)) return 1;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 1;
  constexpr unsigned avx2 = 1u << 5, avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, vnni = 1u << 11;  // F, DQ, BW, VL
  if ((low & 0x6) != 0x6 || !(b & avx2)) return 1;
  return (low & 0xe6) == 0xe6 && (b & avx512) == avx512 && (c & vnni) ? 3 : 2;
}
#elif defined(__aarch64__)
const Isa* const ladder[] = {&isa_baseline, &isa_dotprod, &isa_i8mm};

#if defined(__linux__)
int detect() {
  constexpr unsigned long asimddp = 1ul << 20, i8mm = 1ul << 13;  // of AT_HWCAP, of AT_HWCAP2; old headers lack the names
  if (!(getauxval(AT_HWCAP) & asimddp)) return 1;
  return getauxval(AT_HWCAP2) & i8mm ? 3 : 2;
}
#elif defined(__APPLE__)
bool has(const char* feature) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}
int detect() {
  if (!has("hw.optional.arm.FEAT_DotProd")) return 1;
  return has("hw.optional.arm.FEAT_I8MM") ? 3 : 2;
}
#else
int detect() { return 1; }
#endif
#else
const Isa* const ladder[] = {&isa_baseline};
int detect() { return 1; }
#endif
static_assert(std::size(ladder) <= max_isas);

int available() {
  static const int count = detect();
  return count;
}

// The place of a name in the ladder; past its end for a name that is not there.
int rung(const char* name) {
  return int(std::find_if(std::begin(ladder), std::end(ladder), [&](const Isa* l) { return !std::strcmp(l->name, name); }) -
             std::begin(ladder));
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> table{&strongest_isa(std::getenv("EAC_MOE_ISA"))};
  return table;
}

}  // namespace

const Isa& isa() { return *current().load(std::memory_order_relaxed); }

bool set_isa(const char* name) {
  const int i = rung(name);
  if (i >= available()) return false;
  current().store(ladder[i], std::memory_order_relaxed);
  return true;
}

int available_isas(const Isa** out) {
  std::copy_n(ladder, available(), out);
  return available();
}

const Isa& strongest_isa(const char* cap) { return *ladder[cap ? std::min(rung(cap), available() - 1) : available() - 1]; }

}  // namespace eac
