// Matrix times vector, the whole of decoding. A threadgroup puts the inputs into threadgroup
// memory, laid out for what follows: a lane takes 32 consecutive columns, whose inputs it keeps in
// registers while it meets them with its rows of the weight, four (a quad) at a time.
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

// Puts up to kMatvecColumns inputs, a multiple of 32, into threadgroup memory. Every thread must
// call it; a barrier follows.
INLINE void stage(device const float* x, uint columns, uint thread_index,
                  threadgroup float4* staged, threadgroup float* sums) {
  enum : uint { kThreadVectors = kMatvecColumns / 4 / kMatvecThreads };
  const uint vectors = columns / 4;
  float4 mine[kThreadVectors];  // loaded together, so that their latencies overlap
#pragma unroll
  for (uint i = 0; i < kThreadVectors; ++i) {
    const uint vector = i * kMatvecThreads + thread_index;
    mine[i] = vector < vectors ? ((device const float4*)x)[vector] : float4(0.0f);
  }
#pragma unroll
  for (uint i = 0; i < kThreadVectors; ++i) {
    if (i * kMatvecThreads >= vectors) break;  // the whole threadgroup
    const uint vector = i * kMatvecThreads + thread_index;
    const uint block = vector / kLaneVectors, part = vector % kLaneVectors;
    staged[(block / kSimdWidth * kLaneVectors + part) * kStagedPitch + block % kSimdWidth] =
        mine[i];
    float sum = mine[i].x + mine[i].y + mine[i].z + mine[i].w;
    sum += simd_shuffle_xor(sum, 1);
    sum += simd_shuffle_xor(sum, 2);
    sum += simd_shuffle_xor(sum, 4);
    if (part == 0) sums[block] = sum;
  }
}

// 32 consecutive inputs of a lane, and their sum.
struct Inputs {
  float x[kMatvecLaneColumns];
  float sum;
};

INLINE Inputs load_inputs(threadgroup const float4* staged, threadgroup const float* sums,
                          uint chunk, uint lane) {
  Inputs in;
#pragma unroll
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

enum : uint {
  kTwoTo23 = 0x4b000000,  // as a float
  kMaxBits = 8,           // of a quantized element
};

// Sum of q[i] x[i] over the 32 quantized elements of `words`. An element is neither shifted down to
// its value nor converted: masked where it stands in half a word, it becomes the low bits of 2^23
// (`magic`), which is then taken off. Elements that stand at the same place are added up together,
// and these sums, 2^bits times too large from place to place, at the end.
template <uint bits>
INLINE float dot_quantized(thread const uint* words, thread const float* x, uint magic) {
  enum : uint { kPlaces = 16 / bits, kMask = (1u << bits) - 1 };
  float at[kPlaces];
#pragma unroll
  for (uint i = 0; i < kPlaces; ++i) at[i] = 0;
#pragma unroll
  for (uint h = 0; h < 2 * bits; ++h) {
    const uint half_word = h % 2 == 0 ? words[h / 2] : words[h / 2] >> 16;
#pragma unroll
    for (uint i = 0; i < kPlaces; ++i) {
      const uint q = (half_word & (uint(kMask) << (i * bits))) | magic;
      at[i] = fma(as_type<float>(q) - 0x1p23f, x[h * kPlaces + i], at[i]);
    }
  }
  float total = at[kPlaces - 1];
#pragma unroll
  for (uint i = kPlaces - 1; i > 0; --i) total = fma(total, 1.0f / float(1u << bits), at[i - 1]);
  return total;
}

// Two 16-bit elements.
INLINE float dot_pair(uint dtype, uint word, thread const float* x, float total) {
  const bool bf16 = dtype == kBF16;
  total = fma(bf16 ? as_type<float>(word << 16) : half_to_float(word & 0xffff), x[0], total);
  return fma(bf16 ? as_type<float>(word & 0xffff0000) : half_to_float(word >> 16), x[1], total);
}

// Sum of w[i] x[i] over the `block`-th 32 elements of a dense weight.
INLINE float dot_dense(uint dtype, device const uchar* w, uint block, thread const Inputs& in) {
  float total = 0;
  if (dtype == kF32) {
#pragma unroll
    for (uint i = 0; i < kLaneVectors; ++i) {
      const float4 four = ((device const float4*)w)[ulong(block) * kLaneVectors + i];
      total += dot(four, float4(in.x[4 * i], in.x[4 * i + 1], in.x[4 * i + 2], in.x[4 * i + 3]));
    }
    return total;
  }
#pragma unroll
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

// Two rows of a weight to each quad: `first` and the one behind it to the first, then `step` on.
struct RowPairs {
  Format format;
  Stored w;
  uint first, step;
  uint end;  // rows from here on are taken for the last; nobody asks for their sums
};

INLINE uint row_of(RowPairs rows, uint q, uint r) {
  return min(rows.first + q * rows.step + r, rows.end - 1);
}

// What a row of a quantized weight holds for a lane's 32 columns, as stored.
struct Fetched {
  uint words[kMaxBits];  // as many as an element has bits
  float scale, bias;
};

// `block` is the number of 32 columns' elements, counted from the weight's first.
INLINE Fetched fetch(Format format, Stored w, uint block) {
  Fetched out;
  if (format.bits == 0) return out;
  if (format.bits == 2) {
    const uint2 two = ((device const uint2*)w.weight)[block];
    out.words[0] = two.x;
    out.words[1] = two.y;
  }
#pragma unroll
  for (uint i = 0; i < kMaxBits / 4; ++i) {
    if (i >= format.bits / 4) continue;
    const uint4 four = ((device const uint4*)w.weight)[ulong(block) * (format.bits / 4) + i];
    out.words[4 * i] = four.x;
    out.words[4 * i + 1] = four.y;
    out.words[4 * i + 2] = four.z;
    out.words[4 * i + 3] = four.w;
  }
  const uint group = block / (format.group / kMatvecLaneColumns);
  out.scale = element(format.dtype, w.scales, group);
  out.bias = element(format.dtype, w.biases, group);
  return out;
}

// What 32 columns give to a row.
INLINE float dot_row(Format format, Stored w, uint block, thread const Inputs& in,
                     thread const Fetched& fetched, uint magic) {
  if (format.bits == 0) return dot_dense(format.dtype, w.weight, block, in);
  const float dot = format.bits == 2   ? dot_quantized<2>(fetched.words, in.x, magic)
                    : format.bits == 4 ? dot_quantized<4>(fetched.words, in.x, magic)
                                       : dot_quantized<8>(fetched.words, in.x, magic);
  return fma(fetched.scale, dot, fetched.bias * in.sum);
}

// The sum over all lanes of total[lane / 8]: four sums in little more time than one, since a lane
// hands half of what it has to another at each of the first steps.
INLINE float sum_four(thread const float* total, uint lane) {
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

// What a quad of rows, two of `a` and two of `b`, holds for a lane's 32 columns.
struct Quad {
  Fetched rows[4];
};

INLINE Quad fetch_quad(RowPairs a, RowPairs b, uint q, uint row_blocks, uint block) {
  Quad out;
#pragma unroll
  for (uint i = 0; i < 4; ++i) {
    const RowPairs rows = i < 2 ? a : b;
    out.rows[i] = fetch(rows.format, rows.w, row_of(rows, q, i % 2) * row_blocks + block);
  }
  return out;
}

// Adds to four totals what 32 columns give to the rows of quad q.
INLINE void add_quad(RowPairs a, RowPairs b, uint q, uint row_blocks, uint block,
                     thread const Inputs& in, thread const Quad& fetched, uint magic,
                     thread float* total) {
#pragma unroll
  for (uint i = 0; i < 4; ++i) {
    const RowPairs rows = i < 2 ? a : b;
    const uint at = row_of(rows, q, i % 2) * row_blocks + block;
    total[i] += dot_row(rows.format, rows.w, at, in, fetched.rows[i], magic);
  }
}

// total[4 i ...] = a lane's part of the two rows of `a` and the two of `b` in quad i, times x.
// Every thread of the threadgroup must call it. The first quad is asked for before the inputs are
// there.
INLINE void multiply_rows(RowPairs a, RowPairs b, uint columns, device const float* x,
                          uint thread_index, uint lane, threadgroup float4* staged,
                          threadgroup float* sums, thread float* total) {
#pragma unroll
  for (uint i = 0; i < 4 * kMaxQuads; ++i) total[i] = 0;
  if (columns % kMatvecLaneColumns != 0) {  // a dense weight
#pragma unroll
    for (uint i = 0; i < 4 * kMaxQuads; ++i) {
      if (i >= 4 * quads_constant) continue;
      const RowPairs rows = i % 4 < 2 ? a : b;
      const uint row = row_of(rows, i / 4, i % 2);
      for (uint column = lane; column < columns; column += kSimdWidth) {
        total[i] = fma(weight_at(rows.format, rows.w, row, columns, column), x[column], total[i]);
      }
    }
    return;
  }
  // Never 0, as the compiler cannot know: so it keeps this number in a register, and not the masks.
  const uint magic = a.end == 0 ? 0 : uint(kTwoTo23);
  const uint row_blocks = columns / kMatvecLaneColumns;
  uint block = lane;
  Quad fetched;
  if (block < row_blocks) fetched = fetch_quad(a, b, 0, row_blocks, block);
  for (uint begin = 0; begin < columns; begin += kMatvecColumns) {
    if (begin > 0) threadgroup_barrier(mem_flags::mem_threadgroup);
    stage(x + begin, min(columns - begin, uint(kMatvecColumns)), thread_index, staged, sums);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint chunk = 0; chunk < kChunks && block < row_blocks; ++chunk) {
      const Inputs in = load_inputs(staged, sums, chunk, lane);
      add_quad(a, b, 0, row_blocks, block, in, fetched, magic, total);
      if (quads_constant > 1) {
        // Always, as the compiler cannot know: else it moves the loads up, which costs registers.
        if (magic != 0) fetched = fetch_quad(a, b, 1, row_blocks, block);
        add_quad(a, b, 1, row_blocks, block, in, fetched, magic, total + 4);
      }
      block += kSimdWidth;
      if (block < row_blocks) fetched = fetch_quad(a, b, 0, row_blocks, block);
    }
  }
}
