// What the files of this folder share.
#pragma once

#include <cstdint>

#include "backend/backend.h"
#include "backend/launch/plan.h"

namespace flashmoe {

inline uint32_t u32(int64_t value) {
  return static_cast<uint32_t>(value);
}

inline uint32_t divide_up(int64_t value, int64_t unit) {
  return u32((value + unit - 1) / unit);
}

inline uint32_t round_up(int64_t value, int64_t unit) {
  return u32(divide_up(value, unit) * unit);
}

inline bool same_format(const Matrix& a, const Matrix& b) {
  return a.bits == b.bits && a.group == b.group && a.dtype == b.dtype;
}

inline Constants format_of(const Matrix& matrix) {
  Constants constants{};
  constants[shaders::kBits] = u32(matrix.bits);
  constants[shaders::kGroup] = u32(matrix.group);
  constants[shaders::kDType] = static_cast<uint32_t>(matrix.dtype);
  return constants;
}

inline double bytes_of(const Matrix& matrix) {
  const double bits = matrix.bits ? matrix.bits + 32.0 / matrix.group : 8.0 * size_of(matrix.dtype);
  return bits / 8 * matrix.rows * matrix.cols;
}

}  // namespace flashmoe
