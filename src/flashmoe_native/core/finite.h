// Finds infinite and NaN elements in stored tensors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/dtype.h"

namespace flashmoe {
namespace detail {

// A value is not finite where all bits of its exponent are set.
template <typename Word>
int64_t first_not_finite(const std::byte* data, int64_t count, Word exponent) {
  constexpr int64_t kBlock = 4096;  // a block is scanned without branches
  const auto word = [data](int64_t i) {
    Word bits;
    std::memcpy(&bits, data + i * static_cast<int64_t>(sizeof bits), sizeof bits);
    return bits;
  };
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock);
    bool bad = false;
    for (int64_t i = begin; i < end; ++i) bad |= (word(i) & exponent) == exponent;
    for (int64_t i = begin; bad && i < end; ++i) {
      if ((word(i) & exponent) == exponent) return i;
    }
  }
  return -1;
}

}  // namespace detail

// Index of the first element of `length` bytes that is infinite or NaN, or -1.
inline int64_t first_not_finite(const std::byte* data, int64_t length, DType dtype) {
  switch (dtype) {
    case DType::F32:
      return detail::first_not_finite<uint32_t>(data, length / 4, 0x7f800000);
    case DType::F16:
      return detail::first_not_finite<uint16_t>(data, length / 2, 0x7c00);
    case DType::BF16:
      break;
  }
  return detail::first_not_finite<uint16_t>(data, length / 2, 0x7f80);
}

}  // namespace flashmoe
