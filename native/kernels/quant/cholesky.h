// Cholesky factorisation and triangular inverse in f64, in place, recursive: the bulk of the work is in gemm_f64.
//
// SHAPES      A (n × n), row-major, row stride ld. Only the lower triangle is read; the strict upper one is scratch.
// DEFINITION  cholesky_lower: A = L L^T, L lower, written over A.   invert_lower: L^-1, written over L.
// LIMITS      needs no memory beyond A (1.6 GB at n = 14336). Every element is computed in an order that depends on n alone, not on threads.
#pragma once
#include <cstdint>

namespace eac {

// Throws Error("NOT_POSITIVE_DEFINITE") at a pivot that is not a positive finite number.
void cholesky_lower(double* a, int64_t n, int64_t ld);
void invert_lower(double* l, int64_t n, int64_t ld);

}  // namespace eac
