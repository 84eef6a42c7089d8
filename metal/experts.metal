// Experts on the tokens that were routed to them, all experts of a layer in two dispatches: gate,
// up and SwiGLU, then down. The first pair of kernels is for decoding, a threadgroup a block of
// rows of one (token, expert) pair; the second for prompts, in tiles of an expert's tokens.
#include "matvec.h"
#include "tiles.h"

INLINE uint end_of(constant ExpertArguments& args, uint expert) {
  return expert + 1 < args.count ? args.experts[expert + 1].first_pair : args.pairs;
}

INLINE uint expert_of(constant ExpertArguments& args, uint pair) {
  uint expert = 0;
  while (pair >= end_of(args, expert)) ++expert;
  return expert;
}

KERNEL(experts_gate_up, kMatvecThreads)(constant ExpertArguments& args [[buffer(0)]],
                                        uint3 group [[threadgroup_position_in_grid]],
                                        uint thread_index [[thread_index_in_threadgroup]],
                                        uint simdgroup [[simdgroup_index_in_threadgroup]],
                                        uint lane [[thread_index_in_simdgroup]]) {
  device const float* x = args.x;
  device const int* pair_tokens = args.pair_tokens;
  device float* activations = args.activations;
  STAGED_INPUTS;
  const uint pair = group.y;
  constant ExpertEntry& expert = args.experts[expert_of(args, pair)];
  const uint rows = expert.intermediate, columns = args.hidden;
  const uint block = group.x * matvec_block_rows(quads_constant) / 2;
  if (block >= rows) return;  // the whole threadgroup
  const uint first = block + simdgroup * 2 * quads_constant;
  float total[4 * kMaxQuads];  // of two rows of gate and the same two of up a quad
  multiply_rows({first_format(), stored(expert.gate), first, 2, rows},
                {second_format(), stored(expert.up), first, 2, rows}, columns,
                x + ulong(pair_tokens[pair]) * columns, thread_index, lane, staged, sums, total);
#pragma unroll
  for (uint q = 0; q < kMaxQuads; ++q) {
    if (q >= quads_constant) continue;
    const float gate = sum_four(total + 4 * q, lane);
    const float up = simd_shuffle_xor(gate, 16);
    const uint row = first + 2 * q + lane / 8;
    if (lane % 8 != 0 || lane >= 16 || row >= rows) continue;
    activations[ulong(pair) * args.stride + row] = silu(gate) * up;
  }
}

KERNEL(experts_down, kMatvecThreads)(constant ExpertArguments& args [[buffer(0)]],
                                     uint3 group [[threadgroup_position_in_grid]],
                                     uint thread_index [[thread_index_in_threadgroup]],
                                     uint simdgroup [[simdgroup_index_in_threadgroup]],
                                     uint lane [[thread_index_in_simdgroup]]) {
  device const int* pair_rows = args.pair_rows;
  device const float* activations = args.activations;
  STAGED_INPUTS;
  const uint pair = group.y;
  constant ExpertEntry& expert = args.experts[expert_of(args, pair)];
  const uint first = group.x * matvec_block_rows(quads_constant) + simdgroup * 4 * quads_constant;
  const Format format = first_format();
  const Stored w = stored(expert.down);
  float total[4 * kMaxQuads];
  multiply_rows({format, w, first, 4, args.hidden}, {format, w, first + 2, 4, args.hidden},
                expert.intermediate, activations + ulong(pair) * args.stride, thread_index, lane,
                staged, sums, total);
  device float* out = expert.out + ulong(pair_rows[pair]) * args.hidden;
#pragma unroll
  for (uint q = 0; q < kMaxQuads; ++q) {
    if (q >= quads_constant) continue;
    const float sum = sum_four(total + 4 * q, lane);
    const uint row = first + 4 * q + lane / 8;
    if (lane % 8 == 0 && row < args.hidden) out[row] = sum;
  }
}

// A tile of pairs, all of one expert.
struct PairTile {
  uint expert;
  uint first, count;
};

INLINE PairTile find_tile(constant ExpertArguments& args, uint tile) {
  uint expert = 0;
  while (true) {
    const uint first = args.experts[expert].first_pair, pairs = end_of(args, expert) - first;
    const uint tiles = (pairs + kTileTokens - 1) / kTileTokens;
    if (tile < tiles) {
      const uint before = tile * kTileTokens;
      return {expert, first + before, min(pairs - before, uint(kTileTokens))};
    }
    tile -= tiles;
    ++expert;
  }
}

KERNEL(experts_gate_up_tiles, kTileThreads)(constant ExpertArguments& args [[buffer(0)]],
                                            uint3 group [[threadgroup_position_in_grid]],
                                            uint thread_index [[thread_index_in_threadgroup]]) {
  device const float* x = args.x;
  device const int* pair_tokens = args.pair_tokens;
  device float* activations = args.activations;
  THREADGROUP_ARRAY(float4, weights, [kTileColumns * kWeightPitch / 4]);
  THREADGROUP_ARRAY(float4, xs, [kTileColumns * kInputPitch / 4]);
  const PairTile tile = find_tile(args, group.y);
  constant ExpertEntry& expert = args.experts[tile.expert];
  const uint first_row = group.x * kTileRows, rows = expert.intermediate;
  if (first_row >= rows) return;  // the whole threadgroup
  const TileInputs inputs = {x, pair_tokens, true, args.hidden, tile.first, tile.count};
  float4 gate[4], up[4];
  multiply_tile(first_format(), stored(expert.gate), first_row, rows, args.hidden, inputs,
                thread_index, (threadgroup float*)weights, (threadgroup float*)xs, gate);
  multiply_tile(second_format(), stored(expert.up), first_row, rows, args.hidden, inputs,
                thread_index, (threadgroup float*)weights, (threadgroup float*)xs, up);
#pragma unroll
  for (uint t = 0; t < 4; ++t) {
    const uint token = thread_index / 16 * 4 + t;
    if (token >= tile.count) continue;
#pragma unroll
    for (uint i = 0; i < 4; ++i) {
      const uint row = first_row + thread_index % 16 * 4 + i;
      if (row >= rows) continue;
      activations[ulong(tile.first + token) * args.stride + row] =
          silu(pick(gate[t], i)) * pick(up[t], i);
    }
  }
}

KERNEL(experts_down_tiles, kTileThreads)(constant ExpertArguments& args [[buffer(0)]],
                                         uint3 group [[threadgroup_position_in_grid]],
                                         uint thread_index [[thread_index_in_threadgroup]]) {
  device const int* pair_rows = args.pair_rows;
  device const float* activations = args.activations;
  THREADGROUP_ARRAY(float4, weights, [kTileColumns * kWeightPitch / 4]);
  THREADGROUP_ARRAY(float4, xs, [kTileColumns * kInputPitch / 4]);
  const PairTile tile = find_tile(args, group.y);
  constant ExpertEntry& expert = args.experts[tile.expert];
  const uint first_row = group.x * kTileRows;
  const TileInputs inputs = {activations, nullptr, false, args.stride, tile.first, tile.count};
  float4 total[4];
  multiply_tile(first_format(), stored(expert.down), first_row, args.hidden, expert.intermediate,
                inputs, thread_index, (threadgroup float*)weights, (threadgroup float*)xs, total);
  device float* out = expert.out;
#pragma unroll
  for (uint t = 0; t < 4; ++t) {
    const uint token = thread_index / 16 * 4 + t;
    if (token >= tile.count) continue;
    const ulong out_row = ulong(pair_rows[tile.first + token]) * args.hidden;
#pragma unroll
    for (uint i = 0; i < 4; ++i) {
      const uint row = first_row + thread_index % 16 * 4 + i;
      if (row < args.hidden) out[out_row + row] = pick(total[t], i);
    }
  }
}
