// Inputs to 8 bits, as Int8Input describes.

FLASHMOE_INLINE Ints larger(Ints a, Ints b) {
  return a > b ? a : b;
}

// Puts the values of `count` columns, the first at byte `byte` of the packed row, into its planes.
template <int Planes>
FLASHMOE_INLINE void interleave(const int8_t* q, int count, ptrdiff_t byte, int8_t* values) {
  const int bytes = count / Planes;
  const int run = bytes < 64 ? bytes : 64;  // groups begin at multiples of their size
  for (int first = 0; first < bytes; first += run) {
    int8_t* plane = values + (byte + first) / 64 * 64 * Planes + (byte + first) % 64;
    for (int p = 0; p < Planes; ++p) {
      for (int j = 0; j < run; ++j) plane[p * 64 + j] = q[(first + j) * Planes + p];
    }
  }
}

void quantise(const float* x, int token, int begin, int end, const Int8Input& out) {
  const int group = out.group;
  int8_t* values = out.values + token * out.stride;
  float* scales = out.scales + static_cast<ptrdiff_t>(token) * out.group_stride;
  float* sums = out.sums + static_cast<ptrdiff_t>(token) * out.group_stride;
  for (int g = begin; g < end; ++g) {
    const float* from = x + static_cast<ptrdiff_t>(g) * group;
    // The magnitudes of floats are ordered as their bits are, NaN largest: it reaches the scale.
    Ints top = {};
    for (int i = 0; i < group; i += kLanes) {
      top = larger(top, reinterpret_cast<Ints>(load(from + i)) & 0x7fffffff);
    }
    const float largest_value = __builtin_bit_cast(float, fold(top, larger));
    const float inverse = largest_value > 1e-30f ? 127.0f / largest_value : 0.0f;
    int8_t q[128];
    Ints total = {};
    for (int i = 0; i < group; i += kLanes) {
      const Floats rounded = load(from + i) * inverse + 12582912.0f;  // see exponential()
      const Ints value = reinterpret_cast<Ints>(rounded) - 0x4b400000;
      total += value;
      for (int lane = 0; lane < kLanes; ++lane) q[i + lane] = static_cast<int8_t>(value[lane]);
    }
    const auto sum_of_values =
        static_cast<float>(fold(total, [](Ints a, Ints b) { return a + b; }));
    for (int copy = 0; copy < out.copies; ++copy) {
      const int to = copy * out.groups + g;
      scales[to] = largest_value / 127.0f;
      sums[to] = sum_of_values;
      const ptrdiff_t byte = static_cast<ptrdiff_t>(to) * group * out.bits / 8;
      switch (out.bits) {
        case 2:
          interleave<4>(q, group, byte, values);
          break;
        case 4:
          interleave<2>(q, group, byte, values);
          break;
        case 8:
          interleave<1>(q, group, byte, values);
          break;
      }
    }
  }
}
