#include "kernels/cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace eac {

extern const Isa isa_baseline;
#if defined(__x86_64__)
extern const Isa isa_avx2, isa_avx512;
#endif

namespace {

#if defined(__x86_64__)
struct Features {
  bool avx2 = false, avx512 = false;
};

// CPUID says what the processor has, XGETBV which registers the operating system saves.
Features detect() {
  Features f;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  constexpr unsigned fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
  if ((c & (fma | osxsave | avx | f16c)) != (fma | osxsave | avx | f16c)) return f;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  constexpr unsigned avx2 = 1u << 5, avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, vnni = 1u << 11;  // F, DQ, BW, VL
  f.avx2 = (low & 0x6) == 0x6 && (b & avx2);
  f.avx512 = f.avx2 && (low & 0xe6) == 0xe6 && (b & avx512) == avx512 && (c & vnni);
  return f;
}
#endif

struct Levels {
  const Isa* table[3];
  int count = 0;
  Levels() {
    table[count++] = &isa_baseline;
#if defined(__x86_64__)
    const Features f = detect();
    if (f.avx2) table[count++] = &isa_avx2;
    if (f.avx512) table[count++] = &isa_avx512;
#endif
  }
};

const Levels& levels() {
  static const Levels l;
  return l;
}

// Strength by name: what EAC_MOE_ISA means on a machine that lacks the level it names.
int rank(const char* name) {
  static const char* const names[] = {"baseline", "avx2", "avx512"};
  for (int i = 0; i < 3; i++)
    if (std::strcmp(name, names[i]) == 0) return i;
  return 2;
}

const Isa* initial() {
  const Levels& l = levels();
  const char* cap = std::getenv("EAC_MOE_ISA");
  const int limit = cap ? rank(cap) : 2;
  int i = l.count - 1;
  while (i > 0 && rank(l.table[i]->name) > limit) i--;
  return l.table[i];
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> table{initial()};
  return table;
}

}  // namespace

const Isa& isa() { return *current().load(std::memory_order_relaxed); }

bool set_isa(const char* name) {
  const Levels& l = levels();
  for (int i = 0; i < l.count; i++)
    if (std::strcmp(l.table[i]->name, name) == 0) {
      current().store(l.table[i], std::memory_order_relaxed);
      return true;
    }
  return false;
}

int available_isas(const Isa** out) {
  const Levels& l = levels();
  for (int i = 0; i < l.count; i++) out[i] = l.table[i];
  return l.count;
}

}  // namespace eac
