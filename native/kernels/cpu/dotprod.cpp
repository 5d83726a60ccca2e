// NEON with dot products (Armv8.2: Cortex-A55 and A76, Neoverse N1, Apple M1 and later). Compiled with
// -march=armv8.2-a+dotprod.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "kernels/cpu/isa.h"

#define EAC_LANES 4
#define EAC_PRIMITIVES "kernels/cpu/neon.inl"
#define EAC_DOTPROD
#define EAC_ISA_NAME "dotprod"
#define EAC_ISA_TABLE isa_dotprod
#define EAC_K_BLOCK 512
#define EAC_MR 12
#define EAC_NV 2
#define EAC_TOKEN_TILE 5
#define EAC_INT8_PANELS 1
#define EAC_INT8_TOKENS 5
#define EAC_INT8_PANELS_ONE 1
#define EAC_INT8_PREFETCH 1024

namespace eac {
namespace {
#include "kernels/cpu/simd.inl"
#include "kernels/cpu/kernels.inl"
#endif
