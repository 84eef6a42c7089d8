#include <utility>

#include "backend/cpu/kernels.h"

#ifdef __AVXVNNI__
#include <immintrin.h>
#include <math.h>

namespace flashmoe {
namespace {
constexpr int kLanes = 8;
constexpr const char* kName = "avx-vnni";
#define FLASHMOE_INT8_DOTS "backend/cpu/int8_avx2.inl"
#include "backend/cpu/table.inl"
}  // namespace

const Kernels* avx_vnni_kernels() {
  return &kTable;
}

}  // namespace flashmoe
#endif
