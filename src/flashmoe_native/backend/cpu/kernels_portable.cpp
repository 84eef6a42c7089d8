#include <math.h>

#include <utility>

#include "backend/cpu/kernels.h"

namespace flashmoe {
namespace {
constexpr int kLanes = 4;
constexpr const char* kName = "portable";
#define FLASHMOE_INT8_DOTS "backend/cpu/int8_portable.inl"
#include "backend/cpu/table.inl"
}  // namespace

const Kernels* portable_kernels() {
  return &kTable;
}

}  // namespace flashmoe
