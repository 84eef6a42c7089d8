// Matrix times matrix, for prompts: tiles of inputs and of decoded weights meet in threadgroup
// memory, 32 columns at a time; a thread owns 4 rows of 4 tokens.
#pragma once

#include "common.h"

// Pitches keep rows 16-byte aligned and a column's elements in different banks.
enum TilePitch : uint { kWeightPitch = kTileRows + 4, kInputPitch = kTileTokens + 4 };

// 16 elements of a row from `column` on, which is a multiple of 16.
INLINE void decode16(Format format, Stored w, uint row, uint columns, uint column,
                     thread float* out) {
  const ulong at = ulong(row) * columns + column;
  if (format.bits == 0) {
#pragma unroll
    for (uint i = 0; i < 16; ++i) {
      out[i] = column + i < columns ? element(format.dtype, w.weight, at + i) : 0.0f;
    }
    return;
  }
  const float scale = element(format.dtype, w.scales, at / format.group);
  const float bias = element(format.dtype, w.biases, at / format.group);
  device const uint* words = (device const uint*)w.weight + at * format.bits / 32;
  const uint per_word = 32 / format.bits, mask = (1u << format.bits) - 1;
#pragma unroll
  for (uint i = 0; i < 16; ++i) {
    const uint q = words[i / per_word] >> (i % per_word * format.bits) & mask;
    out[i] = fma(float(q), scale, bias);
  }
}

// Tokens of a tile: rows of the input, as they lie or picked by a list.
struct TileInputs {
  device const float* x;
  device const int* rows;  // where listed
  bool listed;
  uint stride;
  uint first, count;  // tokens [first, first + count), count at most kTileTokens
};

// total[t] = 4 rows, from row + 4 * (thread_index % 16), of w times token 4 * (thread_index / 16)
// + t of the tile. Every thread of the threadgroup must call it.
INLINE void multiply_tile(Format format, Stored w, uint row, uint rows, uint columns,
                          TileInputs inputs, uint thread_index, threadgroup float* weights,
                          threadgroup float* xs, thread float4* total) {
#pragma unroll
  for (uint t = 0; t < 4; ++t) total[t] = float4(0.0f);
  const uint my_row = thread_index / 2, my_columns = thread_index % 2 * 16;
  const uint my_token = thread_index / 4, my_inputs = thread_index % 4 * 8;
  const uint from = inputs.first + min(my_token, inputs.count - 1);
  device const float* x =
      inputs.x + ulong(inputs.listed ? uint(inputs.rows[from]) : from) * inputs.stride;
  for (uint column = 0; column < columns; column += kTileColumns) {
    float decoded[16];
    decode16(format, w, min(row + my_row, rows - 1), columns, column + my_columns, decoded);
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (uint i = 0; i < 16; ++i) weights[(my_columns + i) * kWeightPitch + my_row] = decoded[i];
    for (uint i = 0; i < 8; ++i) {
      const uint c = column + my_inputs + i;
      xs[(my_inputs + i) * kInputPitch + my_token] = c < columns ? x[c] : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint k = 0; k < kTileColumns; ++k) {
      const float4 four =
          *(threadgroup const float4*)(weights + k * kWeightPitch + thread_index % 16 * 4);
      const float4 token =
          *(threadgroup const float4*)(xs + k * kInputPitch + thread_index / 16 * 4);
      total[0] = fma(four, float4(token.x), total[0]);
      total[1] = fma(four, float4(token.y), total[1]);
      total[2] = fma(four, float4(token.z), total[2]);
      total[3] = fma(four, float4(token.w), total[3]);
    }
  }
}
