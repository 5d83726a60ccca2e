#!/usr/bin/env bash
# The native tests (test/native/*_test.cpp) and a walk through the addon under AddressSanitizer (with leak detection) and
# UndefinedBehaviorSanitizer, then the native tests under ThreadSanitizer. Linux, g++, CMake; dist/ must be built.
set -euo pipefail
cd "$(dirname "$0")/../.."

generator=()
if command -v ninja > /dev/null; then generator=(-G Ninja); fi
build() { # directory, sanitizer, targets...
  local out=$1 sanitizer=$2
  CXX=${CXX:-g++} cmake -S . -B "$out" "${generator[@]}" -DEAC_MOE_SANITIZE="$sanitizer" -DCMAKE_BUILD_TYPE=Debug > /dev/null
  cmake --build "$out" --parallel "$(nproc)" "${@:3}"
}

out=build-sanitize
build "$out" address
export ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=1
export UBSAN_OPTIONS=print_stacktrace=1
export LSAN_OPTIONS=suppressions=$PWD/test/native/lsan.supp:print_suppressions=0
ctest --test-dir "$out" --parallel "$(nproc)" --output-on-failure --no-tests=error

# Stock node is not instrumented: the sanitizer's runtime and the C++ runtime whose exceptions it watches come first.
preload="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so.6)"
EAC_MOE_BINARY=$PWD/$out/Release/eac_moe.node LD_PRELOAD=$preload node --expose-gc test/native/addon_smoke.js

# Without the addon: node's own threads, not instrumented, would look like races.
build build-tsan thread --target native_tests
EAC_MOE_TEST_SMALL=1 ctest --test-dir build-tsan --parallel "$(nproc)" --output-on-failure --no-tests=error
