// Integer dot products by NEON, with sdot where the file is compiled for it. Weights of 4 bits or
// fewer are signed bytes as they are; those of 8 bits are taken as two halves of 4.

FLASHMOE_INLINE int32x4_t dot_small(int32x4_t sums, uint8x16_t weight, int8x16_t values) {
#ifdef __ARM_FEATURE_DOTPROD
  return vdotq_s32(sums, vreinterpretq_s8_u8(weight), values);
#else
  const int8x16_t w = vreinterpretq_s8_u8(weight);
  const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(values));
  const int16x8_t high = vmull_high_s8(w, values);
  return vaddq_s32(sums, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}

template <int Bits>
FLASHMOE_INLINE int32x4_t dot_any(int32x4_t sums, uint8x16_t weight, int8x16_t values) {
  if constexpr (Bits == 8) {
#ifdef __ARM_FEATURE_MATMUL_INT8
    return vusdotq_s32(sums, weight, values);
#else
    const int32x4_t high = dot_small(vdupq_n_s32(0), vshrq_n_u8(weight, 4), values);
    return vaddq_s32(dot_small(sums, vandq_u8(weight, vdupq_n_u8(15)), values),
                     vshlq_n_s32(high, 4));
#endif
  } else {
    return dot_small(sums, weight, values);
  }
}

// Sums of weight * value over four columns for each of kLanes rows; x holds the four values.
template <int Bits>
FLASHMOE_INLINE Ints dot_four(Ints sums, Ints weight, int32_t x) {
  return reinterpret_cast<Ints>(dot_any<Bits>(reinterpret_cast<int32x4_t>(sums),
                                              reinterpret_cast<uint8x16_t>(weight),
                                              vreinterpretq_s8_s32(vdupq_n_s32(x))));
}

FLASHMOE_INLINE void transpose(Ints (&rows)[kLanes]) {
  const int32x4_t a = reinterpret_cast<int32x4_t>(rows[0]);
  const int32x4_t b = reinterpret_cast<int32x4_t>(rows[1]);
  const int32x4_t c = reinterpret_cast<int32x4_t>(rows[2]);
  const int32x4_t d = reinterpret_cast<int32x4_t>(rows[3]);
  const auto pairs = [](int32x4_t x) { return vreinterpretq_s64_s32(x); };
  const int64x2_t ab02 = pairs(vtrn1q_s32(a, b)), ab13 = pairs(vtrn2q_s32(a, b));
  const int64x2_t cd02 = pairs(vtrn1q_s32(c, d)), cd13 = pairs(vtrn2q_s32(c, d));
  rows[0] = reinterpret_cast<Ints>(vtrn1q_s64(ab02, cd02));
  rows[1] = reinterpret_cast<Ints>(vtrn1q_s64(ab13, cd13));
  rows[2] = reinterpret_cast<Ints>(vtrn2q_s64(ab02, cd02));
  rows[3] = reinterpret_cast<Ints>(vtrn2q_s64(ab13, cd13));
}

// Adds the dot products of 16 bytes of a row, of four bytes to a lane.
template <int Bits>
FLASHMOE_INLINE int32x4_t dot_bytes(int32x4_t sums, uint8x16_t packed, const int8_t* values) {
  if constexpr (Bits == 8) {
    return dot_any<8>(sums, packed, vld1q_s8(values));
  } else {
    const uint8x16_t mask = vdupq_n_u8((1 << Bits) - 1);
    sums = dot_small(sums, vandq_u8(packed, mask), vld1q_s8(values));
    for (int p = 1; p < 8 / Bits; ++p) {
      const uint8x16_t shifted = vshlq_u8(packed, vdupq_n_s8(static_cast<int8_t>(-p * Bits)));
      sums = dot_small(sums, vandq_u8(shifted, mask), vld1q_s8(values + p * 64));
    }
    return sums;
  }
}

template <int Bits, int Group>
FLASHMOE_INLINE Block<Ints> group_dots(const uint8_t* weight, int count, const int8_t* values) {
  constexpr int kPlanes = 8 / Bits;
  constexpr int kGroupLanes = Group * Bits / 32;
  constexpr int kVectors = kGroupLanes < 4 ? kGroupLanes : 4;  // 4 groups before the adding
  constexpr int kLoads = kGroupLanes / kVectors;               // of 16 bytes for each of them
  const int bytes = count * Group * Bits / 8;
  const auto vector = [&](int index) __attribute__((always_inline)) {
    int32x4_t sums = vdupq_n_s32(0);
    for (int i = 0; i < kLoads; ++i) {
      const int at = (index * kLoads + i) * 16;
      if (at >= bytes) break;
      uint8x16_t packed = vdupq_n_u8(0);
      if (bytes - at >= 16) {
        packed = vld1q_u8(weight + at);
      } else {
        __builtin_memcpy(&packed, weight + at, static_cast<size_t>(bytes - at));
      }
      sums = dot_bytes<Bits>(sums, packed, values + at / 64 * 64 * kPlanes + at % 64);
    }
    return sums;
  };
  Block<Ints> dots = {};
  for (int part = 0; part < 4 && part * 4 < count; ++part) {
    const int first = part * kVectors;
    int32x4_t sums = vpaddq_s32(vector(first), vector(first + 1));
    if constexpr (kVectors == 4) {
      sums = vpaddq_s32(sums, vpaddq_s32(vector(first + 2), vector(first + 3)));
    }
    dots.part[part] = reinterpret_cast<Ints>(sums);
  }
  return dots;
}
