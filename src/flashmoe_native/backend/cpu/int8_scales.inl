// Scales and biases of a quantized matrix.
#pragma once

#include "backend/cpu/simd.inl"

// kLanes scales or biases of one dtype as float32.
template <DType D>
FLASHMOE_INLINE Floats widen(const std::byte* from) {
  if constexpr (D == DType::F32) {
    return load(reinterpret_cast<const float*>(from));
  } else {
    typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
    Halves halves;
    __builtin_memcpy(&halves, from, sizeof halves);
    const Ints bits = __builtin_convertvector(halves, Ints);
    if constexpr (D == DType::BF16) return reinterpret_cast<Floats>(bits << 16);
    // As f16_to_float().
    const Floats scaled = reinterpret_cast<Floats>((bits & 0x7fff) << 13) * 0x1p112f;
    const Ints infinite = (bits & 0x7c00) == 0x7c00 ? Ints{} + 0x7f800000 : Ints{};
    return reinterpret_cast<Floats>(reinterpret_cast<Ints>(scaled) | infinite |
                                    ((bits & 0x8000) << 16));
  }
}

// The scales or biases of `count` <= 16 groups, the others zero.
template <DType D>
FLASHMOE_INLINE Block<Floats> load_block(const std::byte* array, int64_t first, int count) {
  const std::byte* from = array + first * static_cast<int64_t>(size_of(D));
  std::byte whole[64];
  if (count < 16) {
    __builtin_memset(whole, 0, sizeof whole);
    __builtin_memcpy(whole, from, static_cast<size_t>(count) * size_of(D));
    from = whole;
  }
  Block<Floats> block;
  for (int i = 0; i < kParts; ++i) {
    block.part[i] = widen<D>(from + i * kLanes * static_cast<int>(size_of(D)));
  }
  return block;
}
