#include <utility>

#include "backend/cpu/kernels.h"

#ifdef __AVX2__
#include <immintrin.h>
#include <math.h>

namespace flashmoe {
namespace {
constexpr int kLanes = 8;
constexpr const char* kName = "avx2";
#define FLASHMOE_INT8_DOTS "backend/cpu/int8_avx2.inl"
#include "backend/cpu/table.inl"
}  // namespace

const Kernels* avx2_kernels() {
  return &kTable;
}

}  // namespace flashmoe
#endif
