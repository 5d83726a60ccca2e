// The level that every machine has: SSE2 on x86-64, NEON on aarch64, whatever the compiler makes of 16-byte vectors elsewhere.
#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#include "kernels/cpu/isa.h"

#define EAC_LANES 4
#define EAC_ISA_NAME "baseline"
#define EAC_ISA_TABLE isa_baseline
#define EAC_K_BLOCK 512
#if defined(__aarch64__)  // 32 vector registers instead of 16
#define EAC_PRIMITIVES "kernels/cpu/neon.inl"
#define EAC_MR 12
#define EAC_NV 2
#define EAC_TOKEN_TILE 5
#define EAC_INT8_TOKENS 2
#else
#define EAC_PRIMITIVES "kernels/cpu/portable.inl"
#define EAC_MR 4
#define EAC_NV 2
#define EAC_TOKEN_TILE 2
#define EAC_INT8_TOKENS 4
#endif
#define EAC_INT8_PANELS 1
#define EAC_INT8_PANELS_ONE 1
#define EAC_INT8_PREFETCH 1024

namespace eac {
namespace {
#include "kernels/cpu/simd.inl"
#include "kernels/cpu/kernels.inl"
