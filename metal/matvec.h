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

// Sum of w[i] x[i] over the `block`-th 32 elements of a dense weight.
inline float dot_dense(uint dtype, device const uchar* w, uint block, thread const Inputs& in) {
  float total = 0;
  if (dtype == kF32) {
    for (uint i = 0; i < kLaneVectors; ++i) {
      const float4 four = ((device const float4*)w)[ulong(block) * kLaneVectors + i];
      total += dot(four, float4(in.x[4 * i], in.x[4 * i + 1], in.x[4 * i + 2], in.x[4 * i + 3]));
    }
    return total;
  }
  for (uint i = 0; i < kMatvecLaneColumns / 8; ++i) {
    const uint4 words = ((device const uint4*)w)[ulong(block) * (kMatvecLaneColumns / 8) + i];
    thread const float* x = in.x + 8 * i;
    total = dot_pair(dtype, words.x, x, total);
    total = dot_pair(dtype, words.y, x + 2, total);
    total = dot_pair(dtype, words.z, x + 4, total);
    total = dot_pair(dtype, words.w, x + 6, total);
  }
  return total;
}

// What four rows of a quantised weight hold for a lane's 32 columns, as stored.
struct Fetched {
  uint words[kMatvecRows][8];  // as many as an element has bits
  float scale[kMatvecRows], bias[kMatvecRows];
};

// `block[r]` is the number of 32 columns' elements of row r, counted from the weight's first.
inline void fetch(Format format, Stored w, thread const uint* block, thread Fetched& out) {
  if (format.bits == 0) return;
  for (uint r = 0; r < kMatvecRows; ++r) {
    if (format.bits == 2) {
      const uint2 two = ((device const uint2*)w.weight)[block[r]];
      out.words[r][0] = two.x;
      out.words[r][1] = two.y;
    } else {
      for (uint i = 0; i < format.bits / 4; ++i) {
        const uint4 four = ((device const uint4*)w.weight)[ulong(block[r]) * (format.bits / 4) + i];
        out.words[r][4 * i] = four.x;
        out.words[r][4 * i + 1] = four.y;
        out.words[r][4 * i + 2] = four.z;
        out.words[r][4 * i + 3] = four.w;
      }
    }
    const uint group = block[r] / (format.group / kMatvecLaneColumns);
    out.scale[r] = element(format.dtype, w.scales, group);
    out.bias[r] = element(format.dtype, w.biases, group);
  }
}

// Adds to total[r] what 32 columns give to row r.
inline void dot_rows(Format format, Stored w, thread const uint* block, thread const Inputs& in,
                     thread const Fetched& fetched, thread float* total) {
  for (uint r = 0; r < kMatvecRows; ++r) {
    if (format.bits == 0) {
      total[r] += dot_dense(format.dtype, w.weight, block[r], in);
      continue;
    }
    float product = 0;
    for (uint i = 0; i < format.bits; ++i) {
      product = dot_word(format.bits, fetched.words[r][i], in.x + i * (32 / format.bits), product);
    }
    total[r] = fma(fetched.scale[r], product, fma(fetched.bias[r], in.sum, total[r]));
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
  // Rows past the last are taken for it; nobody asks for their sums. What the next columns hold is
  // asked for before this one's is used, and the first columns' before the inputs are there.
  uint block[kMatvecRows];
  for (uint r = 0; r < kMatvecRows; ++r) {
    block[r] = min(first + r, rows - 1) * (columns / kMatvecLaneColumns) + lane;
  }
  Fetched now, next;
  uint column = lane * kMatvecLaneColumns;
  if (column < columns) fetch(format, w, block, now);
  for (uint begin = 0; begin < columns; begin += kMatvecColumns) {
    if (!ready) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      stage(format, x + begin, min(columns - begin, uint(kMatvecColumns)), thread_index, staged,
            sums);
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (uint chunk = 0; chunk < kChunks && column < columns; ++chunk) {
      const Inputs in = load_inputs(staged, sums, chunk, lane);
      uint following[kMatvecRows];
      for (uint r = 0; r < kMatvecRows; ++r) following[r] = block[r] + kSimdWidth;
      column += kChunkColumns;
      if (column < columns) fetch(format, w, following, next);
      dot_rows(format, w, block, in, now, total);
      for (uint r = 0; r < kMatvecRows; ++r) block[r] = following[r];
      now = next;
    }
  }
  return sum_four(total, lane);
}
