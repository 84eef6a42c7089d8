// Integer dot products of `count` groups of packed weights with values laid out as in Int8Input.

template <int Bits, int Group>
FLASHMOE_INLINE void group_dots(const uint8_t* weight, int count, const int8_t* values,
                                int32_t* dots) {
  constexpr int kPlanes = 8 / Bits;
  constexpr int kBytes = Group * Bits / 8;
  for (int g = 0; g < count; ++g) {
    int32_t total = 0;
    for (int byte = g * kBytes; byte < (g + 1) * kBytes; ++byte) {
      const int8_t* plane = values + byte / 64 * 64 * kPlanes + byte % 64;
      for (int p = 0; p < kPlanes; ++p) {
        total += ((weight[byte] >> (p * Bits)) & ((1 << Bits) - 1)) * plane[p * 64];
      }
    }
    dots[g] = total;
  }
}
