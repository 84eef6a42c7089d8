#include "model/setting.h"

#include <algorithm>
#include <stdexcept>

#include "backend/cpu/cpu_backend.h"
#include "backend/metal/metal_backend.h"

namespace flashmoe {

WeightRules Setting::weight_rules() const {
  if (backend == "cpu") return kCpuWeights;
  if (backend == "metal") return kMetalWeights;
  throw std::invalid_argument("no such backend: " + backend);
}

// Keys and values at half size cost less accuracy than 8-bit activations do; the reference keeps
// them whole.
DType Setting::cache_dtype() const {
  return parse_precision(precision) == Precision::kFloat32 ? DType::F32 : DType::BF16;
}

SlotOptions Setting::slot_options(int experts_per_token) const {
  return {.min_slots = std::max(2 * experts_per_token, kReadsAtOnce),
          .cache_bytes = cache_bytes,
          .direct = cache_bytes > 0,
          .alignment = weight_rules().alignment};
}

}  // namespace flashmoe
