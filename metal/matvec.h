// Matrix times vector, the whole of decoding. A lane takes 32 consecutive columns: it keeps their
// inputs in registers and meets them with rows of the weight, several at a time, so that many wide
// loads are in flight. Simdgroups of a threadgroup share a row where it is long.
#pragma once

#include "common.h"

enum MatvecStep : uint { kStep = 4 };  // rows taken at a time

// 32 consecutive inputs of a lane.
struct Inputs {
  float4 x[8];
  float sum;
};

inline Inputs load_inputs(device const float* x) {
  Inputs in;
  float4 sum = float4(0.0f);
  for (uint i = 0; i < 8; ++i) {
    in.x[i] = ((device const float4*)x)[i];
    sum += in.x[i];
  }
  in.sum = sum.x + sum.y + sum.z + sum.w;
  return in;
}

inline float dot_bytes(uint q, float4 x, float total) {
  const uchar4 byte = as_type<uchar4>(q);
  total = fma(float(byte.x), x.x, total);
  total = fma(float(byte.y), x.y, total);
  total = fma(float(byte.z), x.z, total);
  return fma(float(byte.w), x.w, total);
}

// Eight 4-bit elements; even ones are the low halves of the bytes.
inline float dot_nibbles(uint word, float4 x, float4 y, float total) {
  total = dot_bytes(word & 0x0f0f0f0fu, float4(x.x, x.z, y.x, y.z), total);
  return dot_bytes((word >> 4) & 0x0f0f0f0fu, float4(x.y, x.w, y.y, y.w), total);
}

// Sixteen 2-bit elements.
inline float dot_crumbs(uint word, thread const float4* x, float total) {
  total = dot_bytes(word & 0x03030303u, float4(x[0].x, x[1].x, x[2].x, x[3].x), total);
  total = dot_bytes((word >> 2) & 0x03030303u, float4(x[0].y, x[1].y, x[2].y, x[3].y), total);
  total = dot_bytes((word >> 4) & 0x03030303u, float4(x[0].z, x[1].z, x[2].z, x[3].z), total);
  return dot_bytes((word >> 6) & 0x03030303u, float4(x[0].w, x[1].w, x[2].w, x[3].w), total);
}

// Four 16-bit elements.
inline float dot_halves(uint dtype, uint2 words, float4 x, float total) {
  float4 w;
  if (dtype == kBF16) {
    w = float4(as_type<float>(words.x << 16), as_type<float>(words.x & 0xffff0000u),
               as_type<float>(words.y << 16), as_type<float>(words.y & 0xffff0000u));
  } else {
    w = float4(half_to_float(words.x & 0xffffu), half_to_float(words.x >> 16),
               half_to_float(words.y & 0xffffu), half_to_float(words.y >> 16));
  }
  return total + dot(w, x);
}

// Sum of q[i] x[i] (of w[i] x[i] where dense) over the 32 elements at `w`.
inline float dot_block(Format format, device const uchar* w, thread const Inputs& in) {
  float total = 0;
  if (format.bits == 4) {
    const uint4 words = *(device const uint4*)w;
    total = dot_nibbles(words.x, in.x[0], in.x[1], total);
    total = dot_nibbles(words.y, in.x[2], in.x[3], total);
    total = dot_nibbles(words.z, in.x[4], in.x[5], total);
    total = dot_nibbles(words.w, in.x[6], in.x[7], total);
  } else if (format.bits == 8) {
    for (uint i = 0; i < 2; ++i) {
      const uint4 words = ((device const uint4*)w)[i];
      total = dot_bytes(words.x, in.x[4 * i], total);
      total = dot_bytes(words.y, in.x[4 * i + 1], total);
      total = dot_bytes(words.z, in.x[4 * i + 2], total);
      total = dot_bytes(words.w, in.x[4 * i + 3], total);
    }
  } else if (format.bits == 2) {
    const uint2 words = *(device const uint2*)w;
    total = dot_crumbs(words.x, in.x, total);
    total = dot_crumbs(words.y, in.x + 4, total);
  } else if (format.dtype == kF32) {
    for (uint i = 0; i < 8; ++i) total += dot(((device const float4*)w)[i], in.x[i]);
  } else {
    for (uint i = 0; i < 4; ++i) {
      const uint4 words = ((device const uint4*)w)[i];
      total = dot_halves(format.dtype, uint2(words.x, words.y), in.x[2 * i], total);
      total = dot_halves(format.dtype, uint2(words.z, words.w), in.x[2 * i + 1], total);
    }
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
        if (begin != held) in = load_inputs(x + begin);
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
