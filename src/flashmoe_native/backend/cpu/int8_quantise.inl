// Inputs to 8 bits, as Int8Input describes.

void quantise(const float* x, int token, int begin, int end, const Int8Input& out) {
  const int group = out.group, planes = 8 / out.bits;
  int8_t* values = out.values + token * out.stride;
  float* scales = out.scales + static_cast<ptrdiff_t>(token) * out.group_stride;
  float* sums = out.sums + static_cast<ptrdiff_t>(token) * out.group_stride;
  for (int g = begin; g < end; ++g) {
    const float* from = x + static_cast<ptrdiff_t>(g) * group;
    // The magnitudes of floats are ordered as their bits are, NaN largest: it reaches the scale.
    Ints top = {};
    for (int i = 0; i < group; i += kLanes) {
      const Ints magnitude = reinterpret_cast<Ints>(load(from + i)) & 0x7fffffff;
      top = magnitude > top ? magnitude : top;
    }
    int32_t largest_bits = 0;
    for (int i = 0; i < kLanes; ++i) largest_bits = top[i] > largest_bits ? top[i] : largest_bits;
    const float largest_value = __builtin_bit_cast(float, largest_bits);
    const float inverse = largest_value > 1e-30f ? 127.0f / largest_value : 0.0f;
    int8_t q[128];
    Ints total = {};
    for (int i = 0; i < group; i += kLanes) {
      const Floats rounded = load(from + i) * inverse + 12582912.0f;  // see exponential()
      const Ints value = reinterpret_cast<Ints>(rounded) - 0x4b400000;
      total += value;
      for (int lane = 0; lane < kLanes; ++lane) q[i + lane] = static_cast<int8_t>(value[lane]);
    }
    int32_t sum_of_values = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum_of_values += total[lane];
    for (int copy = 0; copy < out.copies; ++copy) {
      const int to = copy * out.groups + g;
      scales[to] = largest_value / 127.0f;
      sums[to] = static_cast<float>(sum_of_values);
      const ptrdiff_t byte = static_cast<ptrdiff_t>(to) * group / planes;
      for (int p = 0; p < planes; ++p) {
        for (int j = 0; j < group / planes; ++j) {
          const ptrdiff_t at = byte + j;
          values[at / 64 * 64 * planes + p * 64 + at % 64] = q[j * planes + p];
        }
      }
    }
  }
}
