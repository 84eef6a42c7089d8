// MLX's affine quantization: w = q · scale + bias, one scale and one bias for each group of
// consecutive weights of a row. q has 2, 4 or 8 bits and lies in uint32 words, the first weight in
// the lowest bits. Bit for bit what mlx.core.quantize gives.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace flashmoe {

struct AffineFormat {
  int bits;     // 2, 4 or 8
  int group;    // 32, 64 or 128
  DType dtype;  // of scales and biases
};

// Throws std::invalid_argument unless `bits` and `group` are among those above.
void check(const AffineFormat& format);

// Quantizes `groups` groups of weights of type `from`. The arithmetic is float32 whatever the
// types, and words are made with the scale and bias as they were before rounding to format.dtype,
// as MLX does. Returns the index of the first group with a weight that is not finite, or whose
// range is too wide for a float32 (what is written for it is undefined), or -1.
int64_t quantize_affine(const void* weights, DType from, int64_t groups, const AffineFormat& format,
                        uint32_t* words, void* scales, void* biases);

// weights[i] = q · scale + bias in float32. With 16-bit scales the product is exact, so each weight
// is the exact value rounded once.
void dequantize_affine(const uint32_t* words, const void* scales, const void* biases,
                       int64_t groups, const AffineFormat& format, float* weights);

}  // namespace flashmoe
