#!/usr/bin/env bash
# The native tests for aarch64: cross-compiled, and run under emulation on processors with and without dot products and int8
# matrix multiplication. Without the cross compiler or the emulator it says so and succeeds.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=build-neon

missing=()
for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
  command -v "$tool" > /dev/null || missing+=("$tool")
done
if ((${#missing[@]})); then
  cat >&2 << END

  **********************************************************************
  SKIPPED: the aarch64 tests did not run. Missing: ${missing[*]}
  On Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user
  **********************************************************************

END
  exit 0
fi

generator=()
if command -v ninja > /dev/null; then generator=(-G Ninja); fi
cmake -S . -B "$out" "${generator[@]}" -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake -DEAC_MOE_TESTS=ON > /dev/null
cmake --build "$out" --target native_tests --parallel "$(nproc)"

# processor, the levels that it has, the tests
emulate() {
  echo "--- $1: $2"
  QEMU_CPU=$1 EAC_MOE_TEST_ISAS=$2 EAC_MOE_TEST_SMALL=1 \
    ctest --test-dir "$out" --output-on-failure --no-tests=error --parallel "$(nproc)" --tests-regex "$3"
}
emulate max "baseline dotprod i8mm" .
# A kernel that holds an instruction of a stronger level dies here.
emulate neoverse-n1 "baseline dotprod" "^(isa|matmul)_test"
emulate cortex-a72 "baseline" "^(isa|matmul)_test"
