// AVX-512 F, BW, DQ, VL and VNNI (Cascade Lake, Zen 4 and later).
// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx2 -mfma -mf16c -mprefer-vector-width=512.
#if defined(__x86_64__)
#if !defined(__clang__)  // GCC 12 warns inside its own header (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "kernels/cpu/isa.h"

#define EAC_LANES 16
#define EAC_PRIMITIVES "kernels/cpu/avx512.inl"
#define EAC_ISA_NAME "avx512"
#define EAC_ISA_TABLE isa_avx512
#define EAC_K_BLOCK 1024
#define EAC_NV 2
#define EAC_MR 14
#define EAC_TOKEN_TILE 6
#define EAC_INT8_PANELS 4
#define EAC_INT8_TOKENS 6
#define EAC_INT8_PANELS_ONE 4
#define EAC_INT8_PREFETCH 2048
#define EAC_INT8_IN_PLACE

namespace eac {
namespace {
#include "kernels/cpu/simd.inl"
#include "kernels/cpu/kernels.inl"
#endif
