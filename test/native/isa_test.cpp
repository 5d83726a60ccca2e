// Choosing an instruction set. EAC_MOE_TEST_ISAS="baseline dotprod" states what this machine has: how the emulated runs
// (test/native/neon.sh) show that the detection is right.
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "harness.h"
#include "kernels/cpu/isa.h"

using namespace eac;
using namespace eac::test;

namespace {

std::vector<std::string> names() {
  const Isa* levels[max_isas];
  std::vector<std::string> list;
  for (int i = 0, n = available_isas(levels); i < n; i++) list.emplace_back(levels[i]->name);
  return list;
}

void detection() {
  std::string list;
  for (const std::string& name : names()) list += (list.empty() ? "" : " ") + name;
  std::printf("this machine has: %s\n", list.c_str());
  if (const char* expected = std::getenv("EAC_MOE_TEST_ISAS"))
    check(list == expected, "found \"" + list + "\", expected \"" + expected + "\"");
}

void choice_by_name() {
  const std::string before = isa().name;
  for (const std::string& name : names()) {
    check(set_isa(name.c_str()), name + " can be set");
    check(isa().name == name, name + " is used");
  }
  check(!set_isa("neon9000"), "an unknown level");
  check(isa().name == names().back(), "a failed choice changes nothing");
  set_isa(before.c_str());
}

void caps() {
  const std::vector<std::string> have = names();
  for (const std::string& name : have) check(strongest_isa(name.c_str()).name == name, "capped to " + name);
  for (const char* none : {(const char*)nullptr, "", "neon9000"}) check(strongest_isa(none).name == have.back(), "no cap");
#if defined(__x86_64__)
  const char* const ladder[] = {"baseline", "avx2", "avx512"};
#elif defined(__aarch64__)
  const char* const ladder[] = {"baseline", "dotprod", "i8mm"};
#else
  const char* const ladder[] = {"baseline"};
#endif
  std::string best;
  for (const char* name : ladder) {
    for (const std::string& h : have)
      if (h == name) best = name;
    check(strongest_isa(name).name == best, std::string(name) + " falls to the best level below it");
  }
  const char* cap = std::getenv("EAC_MOE_ISA");
  check(&isa() == &strongest_isa(cap), "EAC_MOE_ISA is obeyed");
}

}  // namespace

int main() {
  run("EAC_MOE_ISA and other caps", caps);
  run("the levels of this machine", detection);
  run("a level chosen by name", choice_by_name);
  return failures ? 1 : 0;
}
