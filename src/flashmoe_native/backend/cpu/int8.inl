// Products of quantised matrices with inputs quantised to 8 bits. For row r, token t and group g,
// with dot = Σ q_w q_x (an exact integer), the term
//   (scale_w * dot + bias_w * Σ q_x) * scale_x
// is added to partial sum g mod 16, and the 16 sums are then added pairwise (i and i + 8, + 4, + 2,
// + 1), without fused operations: every instruction set gives the same bits.

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
    scales[g] = largest_value / 127.0f;
    sums[g] = static_cast<float>(sum_of_values);
    const ptrdiff_t byte = static_cast<ptrdiff_t>(g) * group / planes;
    for (int p = 0; p < planes; ++p) {
      for (int j = 0; j < group / planes; ++j) {
        const ptrdiff_t at = byte + j;
        values[at / 64 * 64 * planes + p * 64 + at % 64] = q[j * planes + p];
      }
    }
  }
}

template <DType D>
FLASHMOE_INLINE void load_scales(const std::byte* from, int64_t first, int count, float* out) {
  for (int i = 0; i < count; ++i) out[i] = load_float(from, D, static_cast<size_t>(first + i));
  for (int i = count; i < 16; ++i) out[i] = 0;
}

FLASHMOE_INLINE float pairwise_sum(float* sums) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

template <int Bits, int Group, DType D>
void matmul_int8_format(const Rows& rows, const Int8Input& x) {
  const Matrix& m = *rows.weight;
  constexpr int kPlanes = 8 / Bits;
  constexpr int kGroupBytes = Group * Bits / 8;
  const int groups = x.groups;
  for (int row = rows.begin; row < rows.end; ++row) {
    const auto* weight = reinterpret_cast<const uint8_t*>(m.weight) +
                         static_cast<int64_t>(row) * groups * kGroupBytes;
    const int64_t first_group = static_cast<int64_t>(row) * groups;
    for (int t = 0; t < rows.n; ++t) {
      const ptrdiff_t input = rows.inputs ? rows.inputs[t] : t;
      const ptrdiff_t output = rows.outputs ? rows.outputs[t] : t;
      const int8_t* values = x.values + input * x.stride;
      const float* input_scales = x.scales + input * x.group_stride;
      const float* input_sums = x.sums + input * x.group_stride;
      float sums[16] = {};
      for (int g = 0; g < groups; g += 16) {
        const int count = groups - g < 16 ? groups - g : 16;
        float scales[16], biases[16];
        int32_t dots[16] = {};
        load_scales<D>(m.scales, first_group + g, count, scales);
        load_scales<D>(m.biases, first_group + g, count, biases);
        group_dots<Bits, Group>(weight + static_cast<ptrdiff_t>(g) * kGroupBytes, count,
                                values + static_cast<ptrdiff_t>(g) * kGroupBytes * kPlanes, dots);
        for (int i = 0; i < 16; ++i) {
          const float term =
              scales[i] * static_cast<float>(dots[i]) + biases[i] * input_sums[g + i];
          sums[i] += term * input_scales[g + i];
        }
      }
      float* out = rows.out + output * rows.out_stride + row;
      const float value = pairwise_sum(sums);
      *out = rows.add ? *out + value : value;
    }
  }
}

template <int Bits, int Group>
void matmul_int8_dtype(const Rows& rows, const Int8Input& x) {
  switch (rows.weight->dtype) {
    case DType::F32:
      return matmul_int8_format<Bits, Group, DType::F32>(rows, x);
    case DType::F16:
      return matmul_int8_format<Bits, Group, DType::F16>(rows, x);
    case DType::BF16:
      return matmul_int8_format<Bits, Group, DType::BF16>(rows, x);
  }
}

template <int Bits>
void matmul_int8_group(const Rows& rows, const Int8Input& x) {
  switch (rows.weight->group) {
    case 32:
      return matmul_int8_dtype<Bits, 32>(rows, x);
    case 64:
      return matmul_int8_dtype<Bits, 64>(rows, x);
    case 128:
      return matmul_int8_dtype<Bits, 128>(rows, x);
  }
}

void matmul_int8(const Rows& rows, const Int8Input& x) {
  switch (rows.weight->bits) {
    case 2:
      return matmul_int8_group<2>(rows, x);
    case 4:
      return matmul_int8_group<4>(rows, x);
    case 8:
      return matmul_int8_group<8>(rows, x);
  }
}
