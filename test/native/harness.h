// What the native test programs share: named tests, failures counted, random data.
// EAC_MOE_TEST_SMALL=1 leaves out what takes long on an emulated processor or under ThreadSanitizer.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "core/tensor.h"
#include "kernels/cpu/isa.h"

namespace eac::test {

inline int failures = 0;
inline const bool small = std::getenv("EAC_MOE_TEST_SMALL") != nullptr;

inline void check(bool ok, const std::string& what) {
  if (ok) return;
  failures++;
  std::printf("FAILED %s\n", what.c_str());
}

inline void run(const char* name, const std::function<void()>& test) {
  const int before = failures;
  try {
    test();
  } catch (const std::exception& e) { check(false, std::string(name) + " threw: " + e.what()); }
  if (failures == before) std::printf("ok %s\n", name);
}

// The test on every instruction set that this machine has.
inline void run_on_isas(const char* name, const std::function<void()>& test) {
  const Isa &before = isa(), *levels[max_isas];
  for (int i = 0, n = available_isas(levels); i < n; i++) {
    set_isa(levels[i]->name);
    run((std::string(levels[i]->name) + ": " + name).c_str(), test);
  }
  set_isa(before.name);
}

// The code of the error that f throws, or nothing.
inline std::string error_code(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) { return e.code; }
  return "";
}

inline Tensor random_matrix(int64_t rows, int64_t cols, unsigned seed, float scale = 1) {
  std::mt19937 gen(seed);
  std::normal_distribution<float> normal(0, scale);
  Tensor t = Tensor::zeros(DType::f32, {rows, cols});
  for (int64_t i = 0; i < t.size(); i++) t.f32()[i] = normal(gen);
  return t;
}

inline void check_close(const std::vector<float>& got, const std::vector<double>& want, double tolerance,
                        const std::string& what) {
  for (size_t i = 0; i < want.size(); i++)
    if (!(std::fabs(double(got[i]) - want[i]) <= tolerance))
      return check(false, what + ": element " + std::to_string(i) + " is " + std::to_string(got[i]) + ", expected " +
                              std::to_string(want[i]));
}

}  // namespace eac::test
