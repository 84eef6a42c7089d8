// Inputs to 8 bits, as Int8Input describes.
#pragma once

#include "backend/cpu/simd.inl"

typedef int8_t Bytes __attribute__((vector_size(kLanes)));

FLASHMOE_INLINE Ints larger(Ints a, Ints b) {
  return a > b ? a : b;
}

// Puts a group's values, the first at byte `byte` of the packed row, into its planes.
template <int Bits, int Group>
FLASHMOE_INLINE void interleave(const int8_t* q, ptrdiff_t byte, int8_t* values) {
  constexpr int kPlanes = 8 / Bits, kBytes = Group / kPlanes;
  constexpr int kRun = kBytes < 64 ? kBytes : 64;  // groups begin at multiples of their size
  for (int first = 0; first < kBytes; first += kRun) {
    int8_t* plane = values + (byte + first) / 64 * 64 * kPlanes + (byte + first) % 64;
    for (int p = 0; p < kPlanes; ++p) {
      for (int j = 0; j < kRun; ++j) plane[p * 64 + j] = q[(first + j) * kPlanes + p];
    }
  }
}

template <int Bits, int Group>
void quantize_format(const float* x, int token, int begin, int end, const Int8Input& out) {
  int8_t* values = out.values + token * out.stride;
  float* scales = out.scales + static_cast<ptrdiff_t>(token) * out.group_stride;
  float* sums = out.sums + static_cast<ptrdiff_t>(token) * out.group_stride;
  for (int g = begin; g < end; ++g) {
    const float* from = x + static_cast<ptrdiff_t>(g) * Group;
    // The magnitudes of floats are ordered as their bits are, NaN largest: it reaches the scale.
    Ints top = {};
    for (int i = 0; i < Group; i += kLanes) {
      top = larger(top, reinterpret_cast<Ints>(load(from + i)) & 0x7fffffff);
    }
    const float largest_value = __builtin_bit_cast(float, fold(top, larger));
    const float inverse = largest_value > 1e-30f ? 127.0f / largest_value : 0.0f;
    int8_t q[Group];
    Ints total = {};
    for (int i = 0; i < Group; i += kLanes) {
      const Floats rounded = load(from + i) * inverse + 12582912.0f;  // see exponential()
      const Ints value = reinterpret_cast<Ints>(rounded) - 0x4b400000;
      total += value;
      const auto bytes = __builtin_convertvector(value, Bytes);
      __builtin_memcpy(q + i, &bytes, sizeof bytes);
    }
    const auto sum_of_values =
        static_cast<float>(fold(total, [](Ints a, Ints b) { return a + b; }));
    for (int copy = 0; copy < out.copies; ++copy) {
      const int to = copy * out.groups + g;
      scales[to] = largest_value / 127.0f;
      sums[to] = sum_of_values;
      interleave<Bits, Group>(q, static_cast<ptrdiff_t>(to) * Group * Bits / 8, values);
    }
  }
}

template <int Bits>
void quantize_bits(const float* x, int token, int begin, int end, const Int8Input& out) {
  switch (out.group) {
    case 32:
      return quantize_format<Bits, 32>(x, token, begin, end, out);
    case 64:
      return quantize_format<Bits, 64>(x, token, begin, end, out);
    case 128:
      return quantize_format<Bits, 128>(x, token, begin, end, out);
  }
}

void quantize(const float* x, int token, int begin, int end, const Int8Input& out) {
  switch (out.bits) {
    case 2:
      return quantize_bits<2>(x, token, begin, end, out);
    case 4:
      return quantize_bits<4>(x, token, begin, end, out);
    case 8:
      return quantize_bits<8>(x, token, begin, end, out);
  }
}
