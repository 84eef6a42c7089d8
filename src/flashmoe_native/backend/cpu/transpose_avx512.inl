// 16 rows of 16 lanes become columns.
#pragma once

#include "backend/cpu/simd.inl"

FLASHMOE_INLINE void transpose(Ints (&rows)[kLanes]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = reinterpret_cast<__m512i>(rows[i]);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  // a[4 * i + j]: in each 128-bit lane l, column 4 * l + j of rows 4 * i to 4 * i + 3.
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i low01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44);
    const __m512i low23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xee);
    const __m512i high23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xee);
    rows[j] = reinterpret_cast<Ints>(_mm512_shuffle_i32x4(low01, low23, 0x88));
    rows[4 + j] = reinterpret_cast<Ints>(_mm512_shuffle_i32x4(low01, low23, 0xdd));
    rows[8 + j] = reinterpret_cast<Ints>(_mm512_shuffle_i32x4(high01, high23, 0x88));
    rows[12 + j] = reinterpret_cast<Ints>(_mm512_shuffle_i32x4(high01, high23, 0xdd));
  }
}
