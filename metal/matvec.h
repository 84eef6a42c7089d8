// Matrix times vector, the whole of decoding. A threadgroup puts the inputs into threadgroup
// memory, laid out for what follows: a lane takes 32 consecutive columns, whose inputs it keeps in
// registers while it meets them with four rows of the weight, so that many wide loads are in
// flight.
#pragma once

#include "common.h"

// Float4s of the inputs: the i-th of a lane's eight, of 32 lanes side by side. The pitch keeps the
// eight in different banks.
enum StagedShape : uint {
  kStagedPitch = kSimdWidth + 1,
  kLaneVectors = kMatvecLaneColumns / 4,
  kChunkColumns = kSimdWidth * kMatvecLaneColumns,
  kChunks = kMatvecColumns / kChunkColumns,
  kStagedVectors = kChunks * kLaneVectors * kStagedPitch,
  kStagedSums = kMatvecColumns / kMatvecLaneColumns,  // one for each lane's inputs
};

#define STAGED_INPUTS                                  \
  THREADGROUP_ARRAY(float4, staged, [kStagedVectors]); \
  THREADGROUP_ARRAY(float, sums, [kStagedSums])

// Element i of a word is not shifted down to its value but masked where it stands, 2^(bits i) times
// too large; the inputs are that much smaller (both exactly).
inline float4 scaled_down(Format format, float4 x, uint column) {
  if (format.bits == 0) return x;
  const uint first = column % (32 / format.bits) * format.bits;
  return x * float4(1.0f / float(1u << first), 1.0f / float(1u << (first + format.bits)),
                    1.0f / float(1u << (first + 2 * format.bits)),
                    1.0f / float(1u << (first + 3 * format.bits)));
}

// Puts up to kMatvecColumns inputs, a multiple of 32, into threadgroup memory, and zeros after
// them. Every thread must call it; a barrier follows.
inline void stage(Format format, device const float* x, uint columns, uint thread_index,
                  threadgroup float4* staged, threadgroup float* sums) {
  for (uint vector = thread_index; vector < kMatvecColumns / 4; vector += kMatvecThreads) {
    const uint block = vector / kLaneVectors, i = vector % kLaneVectors;
    const float4 four = 4 * vector < columns ? ((device const float4*)x)[vector] : float4(0.0f);
    staged[(block / kSimdWidth * kLaneVectors + i) * kStagedPitch + block % kSimdWidth] =
        scaled_down(format, four, 4 * i);
    float sum = four.x + four.y + four.z + four.w;
    sum += simd_shuffle_xor(sum, 1);
    sum += simd_shuffle_xor(sum, 2);
    sum += simd_shuffle_xor(sum, 4);
    if (i == 0) sums[block] = sum;
  }
}

// 32 consecutive inputs of a lane, scaled down, and their sum as they were.
struct Inputs {
  float x[kMatvecLaneColumns];
  float sum;
};

inline Inputs load_inputs(threadgroup const float4* staged, threadgroup const float* sums,
                          uint chunk, uint lane) {
  Inputs in;
  for (uint i = 0; i < kLaneVectors; ++i) {
    const float4 four = staged[(chunk * kLaneVectors + i) * kStagedPitch + lane];
    in.x[4 * i] = four.x;
    in.x[4 * i + 1] = four.y;
    in.x[4 * i + 2] = four.z;
    in.x[4 * i + 3] = four.w;
  }
  in.sum = sums[chunk * kSimdWidth + lane];
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

// Adds to total[r] what 32 columns from `column` on give to row first + r. Rows past the last are
// taken for it; nobody asks for their sums.
inline void dot_rows(Format format, Stored w, uint first, uint rows, uint columns, uint column,
                     thread const Inputs& in, thread float* total) {
  for (uint r = 0; r < kMatvecRows; ++r) {
    const ulong at = ulong(min(first + r, rows - 1)) * columns + column;
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

// The sum over all lanes of total[lane / 8]: four sums in little more time than one, since a lane
// hands half of what it has to another at each of the first steps.
inline float sum_four(thread const float* total, uint lane) {
  const bool high = (lane & 16) != 0, odd = (lane & 8) != 0;
  const float first =
      (high ? total[2] : total[0]) + simd_shuffle_xor(high ? total[0] : total[2], 16);
  const float second =
      (high ? total[3] : total[1]) + simd_shuffle_xor(high ? total[1] : total[3], 16);
  float sum = (odd ? second : first) + simd_shuffle_xor(odd ? first : second, 8);
  sum += simd_shuffle_xor(sum, 4);
  sum += simd_shuffle_xor(sum, 2);
  return sum + simd_shuffle_xor(sum, 1);
}

// Whether inputs staged for one format serve another too.
inline bool stay_staged(Format format, Format next, uint columns) {
  return format.bits == next.bits && columns <= kMatvecColumns;
}

// Row first + lane / 8 of w times x. Every thread of the threadgroup must call it. `ready`: the
// inputs are in threadgroup memory already.
inline float multiply_rows(Format format, Stored w, uint first, uint rows, uint columns,
                           device const float* x, bool ready, uint thread_index, uint lane,
                           threadgroup float4* staged, threadgroup float* sums) {
  float total[kMatvecRows] = {0, 0, 0, 0};
  if (columns % kMatvecLaneColumns != 0) {  // a dense weight
    for (uint r = 0; r < kMatvecRows; ++r) {
      const ulong row = min(first + r, rows - 1);
      for (uint column = lane; column < columns; column += kSimdWidth) {
        total[r] = fma(weight_at(format, w, row, columns, column), x[column], total[r]);
      }
    }
    return sum_four(total, lane);
  }
  for (uint begin = 0; begin < columns; begin += kMatvecColumns) {
    if (!ready) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      stage(format, x + begin, min(columns - begin, uint(kMatvecColumns)), thread_index, staged,
            sums);
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (uint chunk = 0; chunk < kChunks; ++chunk) {
      const uint column = begin + (chunk * kSimdWidth + lane) * kMatvecLaneColumns;
      if (column >= columns) continue;
      const Inputs in = load_inputs(staged, sums, chunk, lane);
      dot_rows(format, w, first, rows, columns, column, in, total);
    }
  }
  return sum_four(total, lane);
}
