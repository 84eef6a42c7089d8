#include "quantize/affine.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace flashmoe {

namespace {

constexpr int kMaxGroup = 128;

// 128 bits: what every x86-64 and ARM64 has. Wider vectors spill where the hardware lacks them.
constexpr int kLanes = 4;
using Lanes [[gnu::vector_size(4 * kLanes)]] = float;
using LaneBits [[gnu::vector_size(4 * kLanes)]] = uint32_t;

Lanes load_lanes(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

void store(void* data, DType dtype, int64_t index, float value) {
  if (dtype == DType::F32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<uint16_t*>(data)[index] =
        dtype == DType::BF16 ? float_to_bf16(value) : float_to_f16(value);
  }
}

template <DType from>
void load_group(const void* weights, int64_t first, int group, float* out) {
  if constexpr (from == DType::F32) {
    std::memcpy(out, static_cast<const float*>(weights) + first, sizeof(float) * group);
  } else {
    const auto* halves = static_cast<const uint16_t*>(weights) + first;
    for (int i = 0; i < group; ++i) {
      out[i] = from == DType::BF16 ? bf16_to_float(halves[i]) : f16_to_float(halves[i]);
    }
  }
}

// Eight bytes that each hold a `bits`-wide value, first in the lowest byte, to 8 · bits bits.
template <int bits>
uint64_t squeeze(uint64_t x) {
  static_assert(bits == 2 || bits == 4);
  if constexpr (bits == 4) {
    x = (x | x >> 4) & 0x00ff00ff00ff00ff;
    x = (x | x >> 8) & 0x0000ffff0000ffff;
    return (x | x >> 16) & 0xffffffff;
  } else {
    x = (x | x >> 6) & 0x000f000f000f000f;
    x = (x | x >> 12) & 0x000000ff000000ff;
    return (x | x >> 24) & 0xffff;
  }
}

template <int bits>
void pack_group(const uint8_t* q, int group, uint32_t* words) {
  if constexpr (bits == 8) {
    std::memcpy(words, q, group);
  } else {
    auto* out = reinterpret_cast<uint8_t*>(words);
    for (int i = 0; i < group; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, q + i, 8);
      const uint64_t packed = squeeze<bits>(eight);
      std::memcpy(out + i * bits / 8, &packed, bits);
    }
  }
}

template <int bits, DType from>
int64_t quantize(const void* weights, int64_t groups, const AffineFormat& format, uint32_t* words,
                 void* scales, void* biases) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  constexpr float levels = (1 << bits) - 1;
  // Adding 2^23 to a float in [0, 2^23) rounds it to an integer, ties to even, in the low mantissa.
  constexpr float round_to_integer = 8388608.0f;
  const int group = format.group;
  int64_t first_bad = -1;

  for (int64_t g = 0; g < groups; ++g) {
    alignas(64) float w[kMaxGroup];
    load_group<from>(weights, g * group, group, w);

    Lanes low = Lanes{} + infinity, high = Lanes{} - infinity, poison = {};
    for (int i = 0; i < group; i += kLanes) {
      const Lanes x = load_lanes(w + i);
      low = x < low ? x : low;
      high = x > high ? x : high;
      poison += x * 0.0f;  // NaN once a weight is not finite
    }
    float min = infinity, max = -infinity, poisoned = 0;
    for (int l = 0; l < kLanes; ++l) {
      min = std::min(min, low[l]);
      max = std::max(max, high[l]);
      poisoned += poison[l];
    }

    // The scale is signed so that the extreme of larger magnitude is represented exactly.
    const bool min_is_edge = std::fabs(min) > std::fabs(max);
    const float step = std::max((max - min) / levels, 1e-7f);
    const float edge = min_is_edge ? min : max;
    float scale = min_is_edge ? step : -step;
    float bias = 0;
    const float edge_level = std::rint(edge / scale);
    if (edge_level != 0) {
      scale = edge / edge_level;
      bias = edge;
    }
    if (first_bad < 0 && !(poisoned == 0 && std::isfinite(step))) first_bad = g;

    uint8_t q[kMaxGroup];
    for (int i = 0; i < group; i += kLanes) {
      Lanes level = (load_lanes(w + i) - bias) / scale;
      level = level > 0.0f ? level : Lanes{};
      level = level < levels ? level : Lanes{} + levels;
      const auto rounded = std::bit_cast<LaneBits>(level + round_to_integer);
      for (int l = 0; l < kLanes; ++l) q[i + l] = static_cast<uint8_t>(rounded[l]);
    }
    pack_group<bits>(q, group, words + g * (group * bits / 32));
    store(scales, format.dtype, g, scale);
    store(biases, format.dtype, g, bias);
  }
  return first_bad;
}

template <int bits>
int64_t quantize(const void* weights, DType from, int64_t groups, const AffineFormat& format,
                 uint32_t* words, void* scales, void* biases) {
  switch (from) {
    case DType::F32:
      return quantize<bits, DType::F32>(weights, groups, format, words, scales, biases);
    case DType::F16:
      return quantize<bits, DType::F16>(weights, groups, format, words, scales, biases);
    default:
      return quantize<bits, DType::BF16>(weights, groups, format, words, scales, biases);
  }
}

template <int bits>
void dequantize(const uint32_t* words, const void* scales, const void* biases, int64_t groups,
                const AffineFormat& format, float* weights) {
  constexpr int per_word = 32 / bits;
  constexpr uint32_t mask = (1u << bits) - 1;
  for (int64_t g = 0; g < groups; ++g) {
    const float scale = load_float(scales, format.dtype, g);
    const float bias = load_float(biases, format.dtype, g);
    for (int word = 0; word < format.group / per_word; ++word, ++words) {
      for (int i = 0; i < per_word; ++i) {
        *weights++ = static_cast<float>((*words >> (i * bits)) & mask) * scale + bias;
      }
    }
  }
}

}  // namespace

void check(const AffineFormat& format) {
  if (format.bits != 2 && format.bits != 4 && format.bits != 8) {
    throw std::invalid_argument("bits must be 2, 4 or 8, not " + std::to_string(format.bits));
  }
  if (format.group != 32 && format.group != 64 && format.group != 128) {
    throw std::invalid_argument("group must be 32, 64 or 128, not " + std::to_string(format.group));
  }
}

int64_t quantize_affine(const void* weights, DType from, int64_t groups, const AffineFormat& format,
                        uint32_t* words, void* scales, void* biases) {
  check(format);
  switch (format.bits) {
    case 2:
      return quantize<2>(weights, from, groups, format, words, scales, biases);
    case 4:
      return quantize<4>(weights, from, groups, format, words, scales, biases);
    default:
      return quantize<8>(weights, from, groups, format, words, scales, biases);
  }
}

void dequantize_affine(const uint32_t* words, const void* scales, const void* biases,
                       int64_t groups, const AffineFormat& format, float* weights) {
  check(format);
  switch (format.bits) {
    case 2:
      return dequantize<2>(words, scales, biases, groups, format, weights);
    case 4:
      return dequantize<4>(words, scales, biases, groups, format, weights);
    default:
      return dequantize<8>(words, scales, biases, groups, format, weights);
  }
}

}  // namespace flashmoe
