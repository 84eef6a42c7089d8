#include <utility>

#include "backend/cpu/kernels.h"

#ifdef __AVX512VNNI__
// GCC 12 takes its own header's deliberately undefined operands for a mistake.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#include <math.h>

namespace flashmoe {
namespace {
constexpr int kLanes = 16;
constexpr const char* kName = "avx512";
#define FLASHMOE_INT8_DOTS "backend/cpu/int8_avx512.inl"
#include "backend/cpu/table.inl"
}  // namespace

const Kernels* avx512_kernels() {
  return &kTable;
}

}  // namespace flashmoe
#endif
