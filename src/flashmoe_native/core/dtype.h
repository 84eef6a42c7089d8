// Element types of stored tensors, and their conversion to and from float. The conversions are
// always inlined: files compiled for different instruction sets use them, and of a copy in each the
// linker might keep one that this machine cannot run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace flashmoe {

enum class DType : uint8_t { F32, F16, BF16 };

// Named as in a safetensors header: "F32", "F16", "BF16".
inline DType parse_dtype(std::string_view name) {
  if (name == "F32") return DType::F32;
  if (name == "F16") return DType::F16;
  if (name == "BF16") return DType::BF16;
  throw std::invalid_argument("dtype is not F32, F16 or BF16: " + std::string(name));
}

constexpr size_t size_of(DType dtype) {
  return dtype == DType::F32 ? 4 : 2;
}

[[gnu::always_inline]] inline float bf16_to_float(uint16_t bits) {
  return __builtin_bit_cast(float, uint32_t{bits} << 16);
}

// Round to nearest, ties to even; NaN stays NaN.
[[gnu::always_inline]] inline uint16_t float_to_bf16(float value) {
  uint32_t bits = __builtin_bit_cast(uint32_t, value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

[[gnu::always_inline]] inline float f16_to_float(uint16_t half) {
  // Shift exponent and mantissa into place, then let one multiplication rebias the exponent
  // (2^112), which also normalises subnormals; infinities and NaN keep an all-ones exponent.
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{half & 0x7fffu} << 13;
  const float scaled =
      __builtin_bit_cast(float, magnitude) * __builtin_bit_cast(float, uint32_t{0x77800000});
  uint32_t bits = __builtin_bit_cast(uint32_t, scaled);
  if ((half & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  return __builtin_bit_cast(float, bits | sign);
}

// Round to nearest, ties to even; past 65504 infinity; NaN stays NaN.
[[gnu::always_inline]] inline uint16_t float_to_f16(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds past 65504
  if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, which adding 0.5 rounds to
    const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (__builtin_bit_cast(uint32_t, shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// Element `index` of an array of `dtype` that need not be aligned.
[[gnu::always_inline]] inline float load_float(const void* data, DType dtype, size_t index) {
  const auto* bytes = static_cast<const std::byte*>(data);
  if (dtype == DType::F32) {
    float value;
    __builtin_memcpy(&value, bytes + 4 * index, 4);
    return value;
  }
  uint16_t half;
  __builtin_memcpy(&half, bytes + 2 * index, 2);
  return dtype == DType::BF16 ? bf16_to_float(half) : f16_to_float(half);
}

}  // namespace flashmoe
