// NEON with dot products and int8 matrix multiplication (Cortex-A510 and A710, Neoverse V1 and N2, Apple M2 and later).
// Compiled with -march=armv8.2-a+dotprod+i8mm.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "kernels/cpu/isa.h"

#define EAC_LANES 4
#define EAC_PRIMITIVES "kernels/cpu/neon.inl"
#define EAC_DOTPROD
#define EAC_I8MM
#define EAC_ISA_NAME "i8mm"
#define EAC_ISA_TABLE isa_i8mm
#define EAC_K_BLOCK 512
#define EAC_MR 12
#define EAC_NV 2
#define EAC_TOKEN_TILE 5
#define EAC_INT8_PANELS 1
#define EAC_INT8_TOKENS 6
#define EAC_INT8_PANELS_ONE 1
#define EAC_INT8_PREFETCH 1024

namespace eac {
namespace {
#include "kernels/cpu/simd.inl"
#include "kernels/cpu/kernels.inl"
#endif
