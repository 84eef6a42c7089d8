// Integer dot products by NEON, with sdot where the file is compiled for it. Weights of 4 bits or
// fewer are signed bytes as they are; those of 8 bits are taken as two halves of 4.
#pragma once

#include "backend/cpu/int8_format.inl"
#include "backend/cpu/simd.inl"

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

template <int Largest>
FLASHMOE_INLINE int32x4_t dot_any(int32x4_t sums, uint8x16_t weight, int8x16_t values) {
  if constexpr (Largest > 127) {
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

constexpr int kTileTokens = 4, kTileBlocks = 1;  // see int8_batch.inl
constexpr bool kHalves = false;

// Sums of products of `Largest` at most and an input's value, four to a lane.
template <int Largest>
struct Dots {
  static constexpr int kRun = 1 << 16;  // how often may be added before closing
  FLASHMOE_INLINE static Ints add(Ints run, Ints weight, Ints x) {
    return reinterpret_cast<Ints>(dot_any<Largest>(reinterpret_cast<int32x4_t>(run),
                                                   reinterpret_cast<uint8x16_t>(weight),
                                                   reinterpret_cast<int8x16_t>(x)));
  }
  FLASHMOE_INLINE static Ints close(Ints run) { return run; }
};

// 4 rows of 4 lanes, `stride` bytes apart, as columns.
FLASHMOE_INLINE void load_transposed(const uint8_t* from, ptrdiff_t stride, Ints (&columns)[4]) {
  int32x4_t rows[4];
  for (int i = 0; i < 4; ++i) rows[i] = vreinterpretq_s32_u8(vld1q_u8(from + i * stride));
  const auto pairs = [](int32x4_t x) { return vreinterpretq_s64_s32(x); };
  const int64x2_t ab02 = pairs(vtrn1q_s32(rows[0], rows[1]));
  const int64x2_t ab13 = pairs(vtrn2q_s32(rows[0], rows[1]));
  const int64x2_t cd02 = pairs(vtrn1q_s32(rows[2], rows[3]));
  const int64x2_t cd13 = pairs(vtrn2q_s32(rows[2], rows[3]));
  columns[0] = reinterpret_cast<Ints>(vtrn1q_s64(ab02, cd02));
  columns[1] = reinterpret_cast<Ints>(vtrn1q_s64(ab13, cd13));
  columns[2] = reinterpret_cast<Ints>(vtrn2q_s64(ab02, cd02));
  columns[3] = reinterpret_cast<Ints>(vtrn2q_s64(ab13, cd13));
}

// Adds the dot products of 16 bytes of a row, of four bytes to a lane.
template <class Format>
FLASHMOE_INLINE int32x4_t dot_bytes(int32x4_t sums, uint8x16_t packed, const int8_t* values) {
  for (int p = 0; p < Format::kPlanes; ++p) {
    const auto weights =
        reinterpret_cast<uint8x16_t>(Format::values(reinterpret_cast<Ints>(packed), p));
    sums = dot_any<Format::kLargest>(sums, weights, vld1q_s8(values + p * 64));
  }
  return sums;
}

template <class Format>
FLASHMOE_INLINE Block<Ints> group_dots(const uint8_t* weight, int count, const int8_t* values) {
  constexpr int kGroupLanes = Format::kGroupBytes / 4;
  constexpr int kVectors = kGroupLanes < 4 ? kGroupLanes : 4;  // 4 groups before the adding
  constexpr int kLoads = kGroupLanes / kVectors;               // of 16 bytes for each of them
  const int bytes = count * Format::kGroupBytes;
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
      sums = dot_bytes<Format>(sums, packed, values + plane_offset<Format>(at));
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
