// Products of quantized matrices with inputs quantized to 8 bits. For row r, token t and group g,
// with dot = Σ q_w q_x (an exact integer), the term
//   (scale_w * dot + bias_w * Σ q_x) * scale_x
// is added to partial sum g mod 16, and the 16 sums are then added pairwise (i and i + 8, + 4, + 2,
// + 1), without fused operations: every instruction set gives the same bits.
#pragma once

#include "backend/cpu/int8_batch.inl"
#include "backend/cpu/int8_format.inl"
#include "backend/cpu/simd.inl"

#include FLASHMOE_INT8_DOTS

FLASHMOE_INLINE float pairwise_sum(const Block<Floats>& sums) {
  Floats total = sums.part[0];
  if constexpr (kParts == 2) total = sums.part[0] + sums.part[1];
  if constexpr (kParts == 4) {
    total = (sums.part[0] + sums.part[2]) + (sums.part[1] + sums.part[3]);
  }
  return sum(total);
}

// What comes after the 16 groups at `weight`, whose first is `group`, in a matrix that is read from
// end to end. The far request goes to the second-level cache, which can wait for many lines at
// once, the near one brings them on: with the first level alone, which can wait for few, Zen 4
// reads at three quarters of the rate.
template <class Format>
FLASHMOE_INLINE void prefetch_ahead(const Matrix& m, const uint8_t* weight, int64_t group) {
  constexpr int kFar = 12288, kNear = 1024;
  for (int line = 0; line < 16 * Format::kGroupBytes; line += 64) {
    prefetch_far(weight + kFar + line);
    __builtin_prefetch(weight + kNear + line);
  }
  const int64_t far = (group + kFar / Format::kGroupBytes) * Format::kScaleBytes;
  prefetch_far(m.scales + far);
  prefetch_far(m.biases + far);
}

// What 16 groups, `count` of them there, add to the partial sums.
template <class Format>
FLASHMOE_INLINE void add_groups(const Matrix& m, const uint8_t* weight, int64_t group, int count,
                                const int8_t* values, const float* input_scales,
                                const float* input_sums, Block<Floats>& sums) {
  prefetch_ahead<Format>(m, weight, group);
  const Block<Floats> scales = Format::scales(m, group, count);
  const Block<Floats> biases = Format::biases(m, group, count);
  const Block<Ints> dots = group_dots<Format>(weight, count, values);
  for (int i = 0; i < kParts; ++i) {
    const Floats exact = __builtin_convertvector(dots.part[i], Floats);
    const Floats term = scales.part[i] * exact + biases.part[i] * load(input_sums + i * kLanes);
    sums.part[i] += term * load(input_scales + i * kLanes);
  }
}

// One token at a time: a vector holds groups.
template <class Format>
FLASHMOE_INLINE float row_product(const Matrix& m, int64_t row, const Int8Input& x,
                                  ptrdiff_t token) {
  const int64_t first = row * x.groups;
  const auto* weight = reinterpret_cast<const uint8_t*>(m.weight) + first * Format::kGroupBytes;
  const int8_t* values = x.values + token * x.stride;
  const float* scales = x.scales + token * x.group_stride;
  const float* input_sums = x.sums + token * x.group_stride;
  Block<Floats> sums = {};
  int g = 0;
  const auto add = [&](int count) __attribute__((always_inline)) {
    add_groups<Format>(m, weight + g * Format::kGroupBytes, first + g, count,
                       values + g * Format::kGroupBytes * Format::kPlanes, scales + g,
                       input_sums + g, sums);
  };
  for (; g + 16 <= x.groups; g += 16) add(16);
  if (g < x.groups) add(x.groups - g);
  return pairwise_sum(sums);
}

// Adds to each of sixteen lanes the one whose index differs in the bit `Distance`.
template <int Distance>
FLASHMOE_INLINE Block<Floats> add_partners(const Block<Floats>& sums) {
  Block<Floats> result;
  for (int i = 0; i < kParts; ++i) {
    if constexpr (Distance >= kLanes) {
      result.part[i] = sums.part[i] + sums.part[i ^ (Distance / kLanes)];
    } else {
      result.part[i] = sums.part[i] + partners<Distance>(sums.part[i]);
    }
  }
  return result;
}

// As many rows as the input has copies: a vector holds the groups of them all. The sums of a row
// that lanes 8 to 15, ... would hold are zero, and are left out.
template <class Format>
FLASHMOE_INLINE void short_rows_product(const Matrix& m, int64_t row, const Int8Input& x,
                                        ptrdiff_t token, float (&products)[16]) {
  const int64_t first = row * x.groups;
  const auto* weight = reinterpret_cast<const uint8_t*>(m.weight) + first * Format::kGroupBytes;
  Block<Floats> sums = {};
  add_groups<Format>(m, weight, first, 16, x.values + token * x.stride,
                     x.scales + token * x.group_stride, x.sums + token * x.group_stride, sums);
  if (x.groups >= 8) sums = add_partners<4>(sums);
  if (x.groups >= 4) sums = add_partners<2>(sums);
  if (x.groups >= 2) sums = add_partners<1>(sums);
  for (int i = 0; i < kParts; ++i) store(products + i * kLanes, sums.part[i]);
}

template <class Format>
void matmul_int8_format(const Rows& rows, const Int8Input& x) {
  constexpr int kFewTokens = 3;  // not worth unpacking a tile for
  int row = rows.begin;
  if (rows.n > kFewTokens) {
    constexpr int kTileRows = kTileBlocks * kBatchRows;
    for (; row + kTileRows <= rows.end; row += kTileRows) {
      batch_product<Format, kTileBlocks>(rows, row, x);
    }
    for (; row + kBatchRows <= rows.end; row += kBatchRows) {
      batch_product<Format, 1>(rows, row, x);
    }
  }
  if (x.copies > 1) {
    for (; row + x.copies <= rows.end; row += x.copies) {
      for (int t = 0; t < rows.n; ++t) {
        const ptrdiff_t input = rows.inputs ? rows.inputs[t] : t;
        const ptrdiff_t output = rows.outputs ? rows.outputs[t] : t;
        float products[16];
        short_rows_product<Format>(*rows.weight, row, x, input, products);
        float* out = rows.out + output * rows.out_stride + row;
        for (int i = 0; i < x.copies; ++i) {
          out[i] = rows.add ? out[i] + products[i * x.groups] : products[i * x.groups];
        }
      }
    }
  }
  for (; row < rows.end; ++row) {
    for (int t = 0; t < rows.n; ++t) {
      const ptrdiff_t input = rows.inputs ? rows.inputs[t] : t;
      const ptrdiff_t output = rows.outputs ? rows.outputs[t] : t;
      float* out = rows.out + output * rows.out_stride + row;
      const float value = row_product<Format>(*rows.weight, row, x, input);
      *out = rows.add ? *out + value : value;
    }
  }
}

template <int Bits, int Group>
void matmul_int8_dtype(const Rows& rows, const Int8Input& x) {
  switch (rows.weight->dtype) {
    case DType::F32:
      return matmul_int8_format<Affine<Bits, Group, DType::F32>>(rows, x);
    case DType::F16:
      return matmul_int8_format<Affine<Bits, Group, DType::F16>>(rows, x);
    case DType::BF16:
      return matmul_int8_format<Affine<Bits, Group, DType::BF16>>(rows, x);
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
