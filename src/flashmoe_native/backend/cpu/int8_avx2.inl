// Integer dot products in 256 bits. Where the file is compiled for AVX-VNNI, vpdpbusd adds four
// products of an unsigned and a signed byte to each 32-bit lane. By AVX2 alone vpmaddubsw adds two
// products in 16 bits, which hold the sum of a few such pairs before they are widened; 8-bit
// weights, whose pairs would saturate, are taken as two halves of 4 bits.
#pragma once

#include "backend/cpu/int8_format.inl"
#include "backend/cpu/simd.inl"

#ifdef __AVXVNNI__
constexpr int kTileTokens = 6, kTileBlocks = 1;  // see int8_batch.inl
constexpr bool kHalves = false;
#else
constexpr int kTileTokens = 4, kTileBlocks = 1;
constexpr bool kHalves = true;
#endif

// Sums of products of `Largest` at most and an input's value, four to a lane.
template <int Largest>
struct Dots {
#ifdef __AVXVNNI__
  static constexpr int kRun = 1 << 16;
  FLASHMOE_INLINE static Ints add(Ints run, Ints weight, Ints x) {
    return reinterpret_cast<Ints>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(run),
                                                          reinterpret_cast<__m256i>(weight),
                                                          reinterpret_cast<__m256i>(x)));
  }
  FLASHMOE_INLINE static Ints close(Ints run) { return run; }
#else
  // How often may be added before closing; each time two products to 16 bits.
  static constexpr int kRun = 32767 / (2 * 127 * Largest);
  static_assert(kRun > 0);
  FLASHMOE_INLINE static Ints add(Ints run, Ints weight, Ints x) {
    const __m256i pairs =
        _mm256_maddubs_epi16(reinterpret_cast<__m256i>(weight), reinterpret_cast<__m256i>(x));
    __m256i sum = _mm256_add_epi16(reinterpret_cast<__m256i>(run), pairs);
    asm("" : "+x"(sum));  // GCC would first multiply all and then add, and run out of registers
    return reinterpret_cast<Ints>(sum);
  }
  FLASHMOE_INLINE static Ints close(Ints run) {
    return reinterpret_cast<Ints>(
        _mm256_madd_epi16(reinterpret_cast<__m256i>(run), _mm256_set1_epi16(1)));
  }
#endif
};

// 8 rows of 8 lanes, `stride` bytes apart, as columns. Halves of rows i and i + 4 are joined as
// they are loaded, which leaves only moves within 128 bits.
FLASHMOE_INLINE void load_transposed(const uint8_t* from, ptrdiff_t stride, Ints (&columns)[8]) {
  for (int half = 0; half < 2; ++half) {
    __m256i rows[4];
    for (int i = 0; i < 4; ++i) {
      const uint8_t* row = from + i * stride + 16 * half;
      rows[i] = _mm256_inserti128_si256(
          _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row))),
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 4 * stride)), 1);
    }
    const __m256i low01 = _mm256_unpacklo_epi32(rows[0], rows[1]);
    const __m256i low23 = _mm256_unpacklo_epi32(rows[2], rows[3]);
    const __m256i high01 = _mm256_unpackhi_epi32(rows[0], rows[1]);
    const __m256i high23 = _mm256_unpackhi_epi32(rows[2], rows[3]);
    columns[4 * half] = reinterpret_cast<Ints>(_mm256_unpacklo_epi64(low01, low23));
    columns[4 * half + 1] = reinterpret_cast<Ints>(_mm256_unpackhi_epi64(low01, low23));
    columns[4 * half + 2] = reinterpret_cast<Ints>(_mm256_unpacklo_epi64(high01, high23));
    columns[4 * half + 3] = reinterpret_cast<Ints>(_mm256_unpackhi_epi64(high01, high23));
  }
}

// 32 bytes of a row with their values: lane l holds the sum over bytes 4 * l to 4 * l + 3.
template <class Format>
FLASHMOE_INLINE Ints dot_bytes(Ints packed, const int8_t* values) {
  const auto plane = [&](int p) __attribute__((always_inline)) {
    Ints x;
    __builtin_memcpy(&x, values + p * 64, sizeof x);
    return x;
  };
  if constexpr (kHalves && Format::kLargest == 255) {
    using Half = Dots<15>;
    const Ints x = plane(0);
    const Ints high = Half::close(Half::add(Ints{}, packed >> 4 & 0x0f0f0f0f, x));
    return Half::close(Half::add(Ints{}, packed & 0x0f0f0f0f, x)) + (high << 4);
  } else {
    using Dot = Dots<Format::kLargest>;
    static_assert(Format::kPlanes <= Dot::kRun);
    Ints run = {};
    for (int p = 0; p < Format::kPlanes; ++p) {
      run = Dot::add(run, Format::values(packed, p), plane(p));
    }
    return Dot::close(run);
  }
}

// Adds the lanes of a and of b that are `Distance` apart, 128-bit lane by lane but for 4; the sums
// of a come first.
template <int Distance>
FLASHMOE_INLINE __m256i add_near(__m256i a, __m256i b) {
  const __m256 x = _mm256_castsi256_ps(a), y = _mm256_castsi256_ps(b);
  if constexpr (Distance == 1) {
    return _mm256_add_epi32(_mm256_castps_si256(_mm256_shuffle_ps(x, y, 0x88)),
                            _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0xdd)));
  } else if constexpr (Distance == 2) {  // a blend, unlike a shuffle, may take any port
    return _mm256_add_epi32(_mm256_blend_epi32(a, b, 0xcc),
                            _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0x4e)));
  } else {
    return _mm256_add_epi32(_mm256_blend_epi32(a, b, 0xf0), _mm256_permute2x128_si256(a, b, 0x21));
  }
}

// Dot products of `bytes` of whole groups, at most 16: lanes are added until each holds one group.
template <class Format, bool Whole>
FLASHMOE_INLINE Block<Ints> group_dots_of(const uint8_t* weight, int bytes, const int8_t* values) {
  constexpr int kGroupLanes = Format::kGroupBytes / 4;
  constexpr int kVectors = kGroupLanes < 8 ? kGroupLanes : 8;  // 8 groups before the adding
  constexpr int kLoads = kGroupLanes / kVectors;               // of 32 bytes for each of them
  const auto vector = [&](int index) __attribute__((always_inline)) {
    Ints sums = {};
    for (int i = 0; i < kLoads; ++i) {
      const int at = (index * kLoads + i) * 32;
      if (!Whole && at >= bytes) break;
      Ints packed = {};
      if (Whole || bytes - at >= 32) {
        __builtin_memcpy(&packed, weight + at, 32);
      } else {
        __builtin_memcpy(&packed, weight + at, static_cast<size_t>(bytes - at));
      }
      sums += dot_bytes<Format>(packed, values + plane_offset<Format>(at));
    }
    return reinterpret_cast<__m256i>(sums);
  };
  const auto two = [&](int index) __attribute__((always_inline)) {
    return add_near<2>(vector(index), vector(index + 1));
  };
  const auto four = [&](int index) __attribute__((always_inline)) {
    return add_near<1>(two(index), two(index + 2));
  };
  const auto eight = [&](auto half) __attribute__((always_inline)) {
    constexpr int kFirst = half * kVectors;
    if constexpr (kVectors == 2) {
      return _mm256_permutevar8x32_epi32(add_near<1>(vector(kFirst), vector(kFirst + 1)),
                                         _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7));
    } else if constexpr (kVectors == 4) {
      return _mm256_permutevar8x32_epi32(four(kFirst), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    } else {
      return add_near<4>(four(kFirst), four(kFirst + 4));
    }
  };
  Block<Ints> dots = {};
  dots.part[0] = reinterpret_cast<Ints>(eight(std::integral_constant<int, 0>()));
  if (Whole || bytes > 8 * Format::kGroupBytes) {
    dots.part[1] = reinterpret_cast<Ints>(eight(std::integral_constant<int, 1>()));
  }
  return dots;
}

template <class Format>
FLASHMOE_INLINE Block<Ints> group_dots(const uint8_t* weight, int count, const int8_t* values) {
  const int bytes = count * Format::kGroupBytes;
  return count == 16 ? group_dots_of<Format, true>(weight, bytes, values)
                     : group_dots_of<Format, false>(weight, bytes, values);
}
