// What the kernels ask of a format of quantized matrices, w = scale * q + bias for each group: how
// a group lies in memory, its values as unsigned bytes, its scales and biases as float32. A new
// format is another such type and its case in matmul_int8().
#pragma once

#include "backend/cpu/int8_scales.inl"
#include "backend/cpu/simd.inl"

// MLX's affine quantization: byte j of a row holds elements j * kPlanes + p for p < kPlanes, low
// end first; scales and biases of dtype D.
template <int Bits, int Group, DType D>
struct Affine {
  static constexpr int kPlanes = 8 / Bits;
  static constexpr int kLargest = (1 << Bits) - 1;
  static constexpr int kGroupBytes = Group * Bits / 8;
  static constexpr int kScaleBytes = static_cast<int>(size_of(D));  // and as many of a bias

  // The values of plane `plane`, a byte each.
  FLASHMOE_INLINE static Ints values(Ints packed, int plane) {
    if constexpr (Bits == 8) return packed;
    return (packed >> (plane * Bits)) & static_cast<int32_t>(0x01010101u * kLargest);
  }
  FLASHMOE_INLINE static Block<Floats> scales(const Matrix& m, int64_t group, int count) {
    return load_block<D>(m.scales, group, count);
  }
  FLASHMOE_INLINE static Block<Floats> biases(const Matrix& m, int64_t group, int count) {
    return load_block<D>(m.biases, group, count);
  }
};

// Where the planes begin in a token's values that belong to byte `at` of a row; see Int8Input.
template <class Format>
constexpr ptrdiff_t plane_offset(ptrdiff_t at) {
  return at / 64 * 64 * Format::kPlanes + at % 64;
}
