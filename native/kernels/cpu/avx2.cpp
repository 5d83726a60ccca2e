// AVX2, FMA and F16C (Haswell, Zen and later). Compiled with -mavx2 -mfma -mf16c.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/isa.h"

#define EAC_LANES 8
#define EAC_PRIMITIVES "kernels/cpu/avx2.inl"
#define EAC_ISA_NAME "avx2"
#define EAC_ISA_TABLE isa_avx2
#define EAC_K_BLOCK 512
#define EAC_NV 2
#define EAC_MR 6
#define EAC_TOKEN_TILE 3
#define EAC_INT8_PANELS 1
#define EAC_INT8_TOKENS 6
#define EAC_INT8_PANELS_ONE 4
#define EAC_INT8_PREFETCH 2048

namespace eac {
namespace {
#include "kernels/cpu/simd.inl"
#include "kernels/cpu/kernels.inl"
#endif
