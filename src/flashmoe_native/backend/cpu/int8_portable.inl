// Integer dot products in plain C++.

// Sums of weight * value over four columns for each of kLanes rows; x holds the four values.
template <int Bits>
FLASHMOE_INLINE Ints dot_four(Ints sums, Ints weight, int32_t x) {
  for (int byte = 0; byte < 4; ++byte) {
    sums += ((weight >> (8 * byte)) & 255) * static_cast<int8_t>(x >> (8 * byte));
  }
  return sums;
}

FLASHMOE_INLINE void transpose(Ints (&rows)[kLanes]) {
  const Ints a = rows[0], b = rows[1], c = rows[2], d = rows[3];
  for (int i = 0; i < kLanes; ++i) rows[i] = Ints{a[i], b[i], c[i], d[i]};
}

template <int Bits, int Group>
FLASHMOE_INLINE Block<Ints> group_dots(const uint8_t* weight, int count, const int8_t* values) {
  constexpr int kPlanes = 8 / Bits;
  constexpr int kBytes = Group * Bits / 8;
  Block<Ints> dots = {};
  for (int g = 0; g < count; ++g) {
    int32_t total = 0;
    for (int byte = g * kBytes; byte < (g + 1) * kBytes; ++byte) {
      const int8_t* plane = values + byte / 64 * 64 * kPlanes + byte % 64;
      for (int p = 0; p < kPlanes; ++p) {
        total += ((weight[byte] >> (p * Bits)) & ((1 << Bits) - 1)) * plane[p * 64];
      }
    }
    dots.part[g / kLanes][g % kLanes] = total;
  }
  return dots;
}
