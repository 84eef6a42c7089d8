#include "backend/cpu/kernels.h"

#ifdef __ARM_FEATURE_MATMUL_INT8
#include <arm_neon.h>
#include <math.h>

namespace flashmoe {
namespace {
constexpr int kLanes = 4;
constexpr const char* kName = "neon-i8mm";
#define FLASHMOE_NEON
#define FLASHMOE_INT8_DOTS "backend/cpu/int8_neon.inl"
#include "backend/cpu/table.inl"
}  // namespace

const Kernels* neon_i8mm_kernels() {
  return &kTable;
}

}  // namespace flashmoe
#endif
