// Integer dot products by AVX2: vpmaddubsw multiplies unsigned by signed bytes and adds pairs in 16
// bits, where 8-bit weights would saturate; they are taken as two halves of 4 bits.

FLASHMOE_INLINE __m256i dot_small(__m256i weight, __m256i values) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(weight, values), _mm256_set1_epi16(1));
}

template <int Bits>
FLASHMOE_INLINE __m256i dot_any(__m256i weight, __m256i values) {
  if constexpr (Bits == 8) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(weight, 4), mask);
    return _mm256_add_epi32(dot_small(_mm256_and_si256(weight, mask), values),
                            _mm256_slli_epi32(dot_small(high, values), 4));
  } else {
    return dot_small(weight, values);
  }
}

// Sums of weight * value over four columns for each of kLanes rows; x holds the four values.
template <int Bits>
FLASHMOE_INLINE Ints dot_four(Ints sums, Ints weight, int32_t x) {
  return sums + reinterpret_cast<Ints>(
                    dot_any<Bits>(reinterpret_cast<__m256i>(weight), _mm256_set1_epi32(x)));
}

FLASHMOE_INLINE void transpose(Ints (&rows)[kLanes]) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = reinterpret_cast<__m256i>(rows[i]);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
  // a[4 * i + j]: in each 128-bit lane l, column 4 * l + j of rows 4 * i to 4 * i + 3.
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    rows[j] = reinterpret_cast<Ints>(_mm256_permute2x128_si256(a[j], a[4 + j], 0x20));
    rows[4 + j] = reinterpret_cast<Ints>(_mm256_permute2x128_si256(a[j], a[4 + j], 0x31));
  }
}

// 32 bytes of a row with their values: lane l holds the sum over bytes 4 * l to 4 * l + 3.
template <int Bits>
FLASHMOE_INLINE __m256i dot_bytes(__m256i packed, const int8_t* values) {
  const auto plane = [&](int p) __attribute__((always_inline)) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + p * 64));
  };
  if constexpr (Bits == 8) {
    return dot_any<8>(packed, plane(0));
  } else {
    // Products of at most 15 * 127, so that the planes' pairs can be added in 16 bits.
    const __m256i mask = _mm256_set1_epi8((1 << Bits) - 1);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_and_si256(packed, mask), plane(0));
    for (int p = 1; p < 8 / Bits; ++p) {
      const __m256i shifted = _mm256_srli_epi16(packed, p * Bits);
      pairs =
          _mm256_add_epi16(pairs, _mm256_maddubs_epi16(_mm256_and_si256(shifted, mask), plane(p)));
    }
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
}

template <int Bits, int Group>
FLASHMOE_INLINE Block<Ints> group_dots(const uint8_t* weight, int count, const int8_t* values) {
  constexpr int kPlanes = 8 / Bits;
  constexpr int kGroupLanes = Group * Bits / 32;
  constexpr int kVectors = kGroupLanes < 8 ? kGroupLanes : 8;  // 8 groups before the adding
  constexpr int kLoads = kGroupLanes / kVectors;               // of 32 bytes for each of them
  const int bytes = count * Group * Bits / 8;
  const auto vector = [&](int index) __attribute__((always_inline)) {
    __m256i sums = _mm256_setzero_si256();
    for (int i = 0; i < kLoads; ++i) {
      const int at = (index * kLoads + i) * 32;
      if (at >= bytes) break;
      __m256i packed = _mm256_setzero_si256();
      if (bytes - at >= 32) {
        packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + at));
      } else {
        __builtin_memcpy(&packed, weight + at, static_cast<size_t>(bytes - at));
      }
      const int8_t* planes = values + at / 64 * 64 * kPlanes + at % 64;
      sums = _mm256_add_epi32(sums, dot_bytes<Bits>(packed, planes));
    }
    return sums;
  };
  const auto four = [&](int index) __attribute__((always_inline)) {
    return _mm256_hadd_epi32(_mm256_hadd_epi32(vector(index), vector(index + 1)),
                             _mm256_hadd_epi32(vector(index + 2), vector(index + 3)));
  };
  Block<Ints> dots = {};
  for (int half = 0; half < 2 && half * 8 < count; ++half) {
    const int first = half * kVectors;
    __m256i sums;
    if constexpr (kVectors == 2) {
      sums = _mm256_permutevar8x32_epi32(_mm256_hadd_epi32(vector(first), vector(first + 1)),
                                         _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7));
    } else if constexpr (kVectors == 4) {
      sums = _mm256_permutevar8x32_epi32(four(first), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    } else {
      const __m256i low = four(first), high = four(first + 4);
      sums = _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20),
                              _mm256_permute2x128_si256(low, high, 0x31));
    }
    dots.part[half] = reinterpret_cast<Ints>(sums);
  }
  return dots;
}
