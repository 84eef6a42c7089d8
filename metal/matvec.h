// Matrix times vector, the whole of decoding. A lane takes 32 consecutive columns: it keeps their
// inputs in registers and meets them with rows of the weight, several at a time, so that many wide
// loads are in flight. Simdgroups of a threadgroup share a row where it is long.
#pragma once

#include "common.h"

enum MatvecStep : uint { kStep = 4 };  // rows taken at a time

// 32 consecutive inputs of a lane. Element i of a word is not shifted down to its value but masked
// where it stands, 2^(bits i) times too large; the inputs are that much smaller (both exactly).
struct Inputs {
  float x[kMatvecLaneColumns];
  float sum;  // of the inputs as they were
};

inline Inputs load_inputs(Format format, device const float* x) {
  Inputs in;
  float4 sum = float4(0.0f);
  for (uint i = 0; i < kMatvecLaneColumns / 4; ++i) {
    const float4 four = ((device const float4*)x)[i];
    in.x[4 * i] = four.x;
    in.x[4 * i + 1] = four.y;
    in.x[4 * i + 2] = four.z;
    in.x[4 * i + 3] = four.w;
    sum += four;
  }
  in.sum = sum.x + sum.y + sum.z + sum.w;
  if (format.bits != 0) {
    const uint per_word = 32 / format.bits;
    for (uint i = 0; i < kMatvecLaneColumns; ++i) {
      in.x[i] *= 1.0f / float(1u << i % per_word * format.bits);
    }
  }
  return in;
}

// The quantised elements of a word.
inline float dot_word(uint bits, uint word, thread const float* x, float total) {
  const uint mask = (1u << bits) - 1;
  for (uint i = 0; i < 32 / bits; ++i) {
    total = fma(float(word & (mask << (i * bits))), x[i], total);
  }
  return total;
}

// Two 16-bit elements.
inline float dot_pair(uint dtype, uint word, thread const float* x, float total) {
  const bool bf16 = dtype == kBF16;
  total = fma(bf16 ? as_type<float>(word << 16) : half_to_float(word & 0xffff), x[0], total);
  return fma(bf16 ? as_type<float>(word & 0xffff0000) : half_to_float(word >> 16), x[1], total);
}

inline float dot_word(Format format, uint word, thread const float* x, float total) {
  return format.bits != 0 ? dot_word(format.bits, word, x, total)
                          : dot_pair(format.dtype, word, x, total);
}

// Sum of q[i] x[i] (of w[i] x[i] where dense) over the 32 elements at `w`.
inline float dot_block(Format format, device const uchar* w, thread const Inputs& in) {
  float total = 0;
  if (format.bits == 2) {
    const uint2 words = *(device const uint2*)w;
    total = dot_word(2, words.x, in.x, total);
    return dot_word(2, words.y, in.x + 16, total);
  }
  if (format.bits == 0 && format.dtype == kF32) {
    for (uint i = 0; i < 8; ++i) {
      const float4 four = ((device const float4*)w)[i];
      total += dot(four, float4(in.x[4 * i], in.x[4 * i + 1], in.x[4 * i + 2], in.x[4 * i + 3]));
    }
    return total;
  }
  const uint per_word = format.bits == 0 ? 2 : 32 / format.bits;
  for (uint i = 0; i < kMatvecLaneColumns / (4 * per_word); ++i) {
    const uint4 words = ((device const uint4*)w)[i];
    thread const float* x = in.x + 4 * i * per_word;
    total = dot_word(format, words.x, x, total);
    total = dot_word(format, words.y, x + per_word, total);
    total = dot_word(format, words.z, x + 2 * per_word, total);
    total = dot_word(format, words.w, x + 3 * per_word, total);
  }
  return total;
}

// Adds to total[r] what columns [begin, begin + 32) give to row first + r. Rows past the last are
// taken for it; nobody asks for their sums.
inline void dot_rows(Format format, Stored w, uint first, uint rows, uint columns, uint begin,
                     thread const Inputs& in, thread float* total) {
  for (uint r = 0; r < kStep; ++r) {
    const ulong at = ulong(min(first + r, rows - 1)) * columns + begin;
    if (format.bits == 0) {
      total[r] += dot_block(format, w.weight + at * (format.dtype == kF32 ? 4 : 2), in);
    } else {
      const float product = dot_block(format, w.weight + at * format.bits / 8, in);
      const float scale = element(format.dtype, w.scales, at / format.group);
      const float bias = element(format.dtype, w.biases, at / format.group);
      total[r] = fma(scale, product, fma(bias, in.sum, total[r]));
    }
  }
}

// The same over all of a dense weight's columns, where they are no multiple of 32.
inline void dot_odd_rows(Format format, Stored w, uint first, uint rows, uint columns, uint begin,
                         uint stride, device const float* x, thread float* total) {
  for (uint r = 0; r < kStep; ++r) {
    const ulong row = min(first + r, rows - 1);
    for (uint i = begin; i < columns; i += stride) {
      total[r] = fma(weight_at(format, w, row, columns, i), x[i], total[r]);
    }
  }
}

// Where a simdgroup stands in its threadgroup's block of rows.
struct Place {
  uint split, splits;  // its share of the columns
  uint first_row;      // of its kMatvecRows rows, counted from the block's first
};

inline Place place_of(uint columns, uint simdgroup) {
  const uint splits = matvec_splits(columns);
  return {simdgroup % splits, splits, simdgroup / splits * kMatvecRows};
}

// partial[r] = row first + r of w times x, over this simdgroup's share of the columns.
inline void multiply_rows(Format format, Stored w, uint first, uint rows, uint columns,
                          device const float* x, Place place, uint lane,
                          threadgroup float* partial) {
  const uint mine = (place.split * kSimdWidth + lane) * kMatvecLaneColumns;
  const uint stride = place.splits * kSimdWidth * kMatvecLaneColumns;
  const bool odd = columns % kMatvecLaneColumns != 0;
  uint held = columns;  // the first of the columns whose inputs are in registers
  Inputs in;
  for (uint row = 0; row < kMatvecRows && first + row < rows; row += kStep) {
    float total[kStep] = {0, 0, 0, 0};
    if (odd) {
      dot_odd_rows(format, w, first + row, rows, columns, place.split * kSimdWidth + lane,
                   place.splits * kSimdWidth, x, total);
    } else {
      for (uint begin = mine; begin < columns; begin += stride) {
        if (begin != held) in = load_inputs(format, x + begin);
        held = begin;
        dot_rows(format, w, first + row, rows, columns, begin, in, total);
      }
    }
    for (uint r = 0; r < kStep; ++r) {
      const float sum = simd_sum(total[r]);
      if (lane == 0) partial[row + r] = sum;
    }
  }
}

// Row `row` of the block from what its simdgroups found; partial is [simdgroups][kMatvecRows].
inline float add_splits(threadgroup const float* partial, uint row, uint splits) {
  threadgroup const float* at =
      partial + row / kMatvecRows * splits * kMatvecRows + row % kMatvecRows;
  float sum = 0;
  for (uint split = 0; split < splits; ++split) sum += at[split * kMatvecRows];
  return sum;
}
