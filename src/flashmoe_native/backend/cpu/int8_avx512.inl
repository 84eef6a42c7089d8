// Integer dot products by AVX-512 VNNI: vpdpbusd adds four products of an unsigned and a signed
// byte to each 32-bit lane.
#pragma once

#include "backend/cpu/int8_format.inl"
#include "backend/cpu/simd.inl"
#include "backend/cpu/transpose_avx512.inl"

constexpr int kTileTokens = 8, kTileBlocks = 2;  // see int8_batch.inl
constexpr bool kHalves = false;

// Sums of products of a weight and an input's value, four to a lane.
template <int Largest>
struct Dots {
  static constexpr int kRun = 1 << 16;  // how often may be added before closing
  FLASHMOE_INLINE static Ints add(Ints run, Ints weight, Ints x) {
    return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(run),
                                                      reinterpret_cast<__m512i>(weight),
                                                      reinterpret_cast<__m512i>(x)));
  }
  FLASHMOE_INLINE static Ints close(Ints run) { return run; }
};

// 16 rows of 16 lanes, `stride` bytes apart, as columns.
FLASHMOE_INLINE void load_transposed(const uint8_t* from, ptrdiff_t stride, Ints (&columns)[16]) {
  for (int i = 0; i < 16; ++i) __builtin_memcpy(&columns[i], from + i * stride, 64);
  transpose(columns);
}

// 64 bytes of a row with their values: lane l holds the sum over bytes 4 * l to 4 * l + 3.
template <class Format>
FLASHMOE_INLINE __m512i dot_bytes(Ints packed, const int8_t* values) {
  Ints sums = {};
  for (int p = 0; p < Format::kPlanes; ++p) {
    Ints x;
    __builtin_memcpy(&x, values + p * 64, sizeof x);
    sums = Dots<Format::kLargest>::add(sums, Format::values(packed, p), x);
  }
  return reinterpret_cast<__m512i>(sums);
}

// Adds neighbouring lanes: in each 128-bit lane a0 + a1, a2 + a3, b0 + b1, b2 + b3.
FLASHMOE_INLINE __m512i add_pairs(__m512i a, __m512i b) {
  const __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
  return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(x, y, 0x88)),
                          _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0xdd)));
}

// Adds neighbouring 128-bit lanes likewise.
FLASHMOE_INLINE __m512i add_quarters(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

// Dot products of `count` <= 16 groups: lanes are added pairwise until each holds one group, then
// put in the groups' order.
template <class Format, bool Whole>
FLASHMOE_INLINE __m512i group_dots_avx512(const uint8_t* weight, int bytes, const int8_t* values) {
  constexpr int kGroupLanes = Format::kGroupBytes / 4;
  constexpr int kVectors = kGroupLanes < 16 ? kGroupLanes : 16;  // 16 groups before the adding
  constexpr int kLoads = kGroupLanes / kVectors;                 // of 64 bytes for each of them
  const auto vector = [&](int index) __attribute__((always_inline)) {
    __m512i sums = _mm512_setzero_si512();
    for (int i = 0; i < kLoads; ++i) {
      const int at = (index * kLoads + i) * 64;
      if (!Whole && at >= bytes) break;
      const uint64_t mask =
          Whole || bytes - at >= 64 ? ~uint64_t{0} : ~(~uint64_t{0} << (bytes - at));
      const __m512i packed =
          Whole ? _mm512_loadu_si512(weight + at) : _mm512_maskz_loadu_epi8(mask, weight + at);
      const __m512i dots =
          dot_bytes<Format>(reinterpret_cast<Ints>(packed), values + plane_offset<Format>(at));
      sums = i == 0 ? dots : _mm512_add_epi32(sums, dots);
    }
    return sums;
  };
  const auto four = [&](int index) __attribute__((always_inline)) {
    return add_pairs(add_pairs(vector(index), vector(index + 1)),
                     add_pairs(vector(index + 2), vector(index + 3)));
  };
  if constexpr (kVectors == 2) {
    const __m512i order = _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    return _mm512_permutexvar_epi32(order, add_pairs(vector(0), vector(1)));
  } else if constexpr (kVectors == 4) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, four(0));
  } else if constexpr (kVectors == 8) {
    const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    return _mm512_permutexvar_epi32(order, add_quarters(four(0), four(4)));
  } else {
    return add_quarters(add_quarters(four(0), four(4)), add_quarters(four(8), four(12)));
  }
}

template <class Format>
FLASHMOE_INLINE Block<Ints> group_dots(const uint8_t* weight, int count, const int8_t* values) {
  const int bytes = count * Format::kGroupBytes;
  const __m512i dots = count == 16 ? group_dots_avx512<Format, true>(weight, bytes, values)
                                   : group_dots_avx512<Format, false>(weight, bytes, values);
  return {{reinterpret_cast<Ints>(dots)}};
}
