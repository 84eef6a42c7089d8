// Integer dot products by AVX-512 VNNI: vpdpbusd adds four products of an unsigned and a signed
// byte to each 32-bit lane.

#include "backend/cpu/transpose_avx512.inl"

// Sums of weight * value over four columns for each of kLanes rows; x holds the four values.
template <int Bits>
FLASHMOE_INLINE Ints dot_four(Ints sums, Ints weight, int32_t x) {
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(weight), _mm512_set1_epi32(x)));
}

// 64 bytes of a row with their values: lane l holds the sum over bytes 4 * l to 4 * l + 3.
template <int Bits>
FLASHMOE_INLINE __m512i dot_bytes(__m512i packed, const int8_t* values) {
  const auto plane = [&](int p) __attribute__((always_inline)) {
    return _mm512_loadu_si512(values + p * 64);
  };
  __m512i sums = _mm512_setzero_si512();
  if constexpr (Bits == 8) {
    sums = _mm512_dpbusd_epi32(sums, packed, plane(0));
  } else {
    const __m512i mask = _mm512_set1_epi8((1 << Bits) - 1);
    sums = _mm512_dpbusd_epi32(sums, _mm512_and_si512(packed, mask), plane(0));
    for (int p = 1; p < 8 / Bits; ++p) {
      const __m512i shifted = _mm512_srli_epi16(packed, static_cast<unsigned>(p * Bits));
      sums = _mm512_dpbusd_epi32(sums, _mm512_and_si512(shifted, mask), plane(p));
    }
  }
  return sums;
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
template <int Bits, int Group, bool Whole>
FLASHMOE_INLINE __m512i group_dots_avx512(const uint8_t* weight, int bytes, const int8_t* values) {
  constexpr int kPlanes = 8 / Bits;
  constexpr int kGroupLanes = Group * Bits / 32;
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
      const __m512i dots = dot_bytes<Bits>(packed, values + at * kPlanes);
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

template <int Bits, int Group>
FLASHMOE_INLINE Block<Ints> group_dots(const uint8_t* weight, int count, const int8_t* values) {
  const int bytes = count * Group * Bits / 8;
  if (count == 16) {
    return {{reinterpret_cast<Ints>(group_dots_avx512<Bits, Group, true>(weight, bytes, values))}};
  }
  return {{reinterpret_cast<Ints>(group_dots_avx512<Bits, Group, false>(weight, bytes, values))}};
}
