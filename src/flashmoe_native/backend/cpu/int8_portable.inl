// Integer dot products in plain C++.
#pragma once

#include "backend/cpu/int8_format.inl"
#include "backend/cpu/simd.inl"

constexpr int kTileTokens = 4, kTileBlocks = 1;  // see int8_batch.inl
constexpr bool kHalves = false;

// Sums of products of a weight and an input's value, four to a lane.
template <int Largest>
struct Dots {
  static constexpr int kRun = 1 << 16;  // how often may be added before closing
  FLASHMOE_INLINE static Ints add(Ints run, Ints weight, Ints x) {
    for (int byte = 0; byte < 4; ++byte) {
      run += ((weight >> (8 * byte)) & 255) * ((x << (24 - 8 * byte)) >> 24);
    }
    return run;
  }
  FLASHMOE_INLINE static Ints close(Ints run) { return run; }
};

// 4 rows of 4 lanes, `stride` bytes apart, as columns.
FLASHMOE_INLINE void load_transposed(const uint8_t* from, ptrdiff_t stride, Ints (&columns)[4]) {
  int32_t rows[4][4];
  for (int r = 0; r < 4; ++r) __builtin_memcpy(rows[r], from + r * stride, 16);
  for (int c = 0; c < 4; ++c) columns[c] = Ints{rows[0][c], rows[1][c], rows[2][c], rows[3][c]};
}

template <class Format>
FLASHMOE_INLINE Block<Ints> group_dots(const uint8_t* weight, int count, const int8_t* values) {
  Block<Ints> dots = {};
  for (int g = 0; g < count; ++g) {
    Ints sums = {};
    for (int at = g * Format::kGroupBytes; at < (g + 1) * Format::kGroupBytes; at += 4) {
      int32_t packed;
      __builtin_memcpy(&packed, weight + at, 4);
      for (int p = 0; p < Format::kPlanes; ++p) {
        int32_t x;
        __builtin_memcpy(&x, values + plane_offset<Format>(at) + p * 64, 4);
        const Ints weights = Format::values(Ints{packed}, p);
        sums = Dots<Format::kLargest>::add(sums, weights, Ints{x});
      }
    }
    dots.part[g / kLanes][g % kLanes] = sums[0];
  }
  return dots;
}
