// Experts on the tokens that were routed to them, all experts of a layer in two dispatches: gate,
// up and SwiGLU, then down. The first pair of kernels is for decoding, a threadgroup a block of
// rows of one (token, expert) pair; the second for prompts, in tiles of an expert's tokens.
#include "matvec.h"
#include "tiles.h"

// The buffers that Locations name.
struct Sources {
  device uchar* at[kMaxSources];
};

#define SOURCE_ARGUMENTS                                  \
  device uchar *source0 [[buffer(kExpertSources)]],       \
      device uchar *source1 [[buffer(kExpertSource1)]],   \
      device uchar *source2 [[buffer(kExpertSource2)]],   \
      device uchar *source3 [[buffer(kExpertSource3)]],   \
      device uchar *source4 [[buffer(kExpertSource4)]],   \
      device uchar *source5 [[buffer(kExpertSource5)]],   \
      device uchar *source6 [[buffer(kExpertSource6)]],   \
      device uchar *source7 [[buffer(kExpertSource7)]],   \
      device uchar *source8 [[buffer(kExpertSource8)]],   \
      device uchar *source9 [[buffer(kExpertSource9)]],   \
      device uchar *source10 [[buffer(kExpertSource10)]], \
      device uchar *source11 [[buffer(kExpertSource11)]], \
      device uchar *source12 [[buffer(kExpertSource12)]], \
      device uchar *source13 [[buffer(kExpertSource13)]], \
      device uchar *source14 [[buffer(kExpertSource14)]], \
      device uchar *source15 [[buffer(kExpertSource15)]]
#define SOURCES                                                                 \
  {source0, source1, source2,  source3,  source4,  source5,  source6,  source7, \
   source8, source9, source10, source11, source12, source13, source14, source15}

INLINE device uchar* source(thread const Sources& sources, Location location) {
  // Selected, not indexed, which would need the pointers in memory.
  const uint wanted = uint(location >> 56);
  device uchar* base = sources.at[0];
#pragma unroll
  for (uint i = 1; i < kMaxSources; ++i) {
    device uchar* other = sources.at[i];
    base = wanted == i ? other : base;
  }
  return base;
}

INLINE device uchar* find(thread const Sources& sources, Location location) {
  return source(sources, location) + (location & 0xfffffffffffffful);
}

// Most often the three lie in one buffer.
INLINE Stored find(thread const Sources& sources, constant StoredMatrix& matrix) {
  device uchar* base = source(sources, matrix.weight);
  const bool together =
      matrix.weight >> 56 == matrix.scales >> 56 && matrix.weight >> 56 == matrix.biases >> 56;
  device uchar* scales = base;
  device uchar* biases = base;
  if (!together) {
    scales = source(sources, matrix.scales);
    biases = source(sources, matrix.biases);
  }
  return {base + (matrix.weight & 0xfffffffffffffful),
          scales + (matrix.scales & 0xfffffffffffffful),
          biases + (matrix.biases & 0xfffffffffffffful)};
}

INLINE uint end_of(constant ExpertArguments& args, uint expert) {
  return expert + 1 < args.count ? args.experts[expert + 1].first_pair : args.pairs;
}

INLINE uint expert_of(constant ExpertArguments& args, uint pair) {
  uint expert = 0;
  while (pair >= end_of(args, expert)) ++expert;
  return expert;
}

kernel void experts_gate_up(device const float* x [[buffer(kExpertX)]],
                            constant ExpertArguments& args [[buffer(kExpertArguments)]],
                            device const int* pair_tokens [[buffer(kExpertPairTokens)]],
                            device float* activations [[buffer(kExpertActivations)]],
                            SOURCE_ARGUMENTS, uint3 group [[threadgroup_position_in_grid]],
                            uint thread_index [[thread_index_in_threadgroup]],
                            uint simdgroup [[simdgroup_index_in_threadgroup]],
                            uint lane [[thread_index_in_simdgroup]]) {
  STAGED_INPUTS;
  const Sources sources = SOURCES;
  const uint pair = group.y;
  constant ExpertEntry& expert = args.experts[expert_of(args, pair)];
  const uint rows = expert.intermediate, columns = args.hidden;
  const uint block = group.x * matvec_block_rows(quads_constant) / 2;
  if (block >= rows) return;  // the whole threadgroup
  const uint first = block + simdgroup * 2 * quads_constant;
  float total[4 * kMaxQuads];  // of two rows of gate and the same two of up a quad
  multiply_rows({first_format(), find(sources, expert.gate), first, 2, rows},
                {second_format(), find(sources, expert.up), first, 2, rows}, columns,
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

kernel void experts_down(constant ExpertArguments& args [[buffer(kExpertArguments)]],
                         device const int* pair_rows [[buffer(kExpertPairRows)]],
                         device const float* activations [[buffer(kExpertActivations)]],
                         SOURCE_ARGUMENTS, uint3 group [[threadgroup_position_in_grid]],
                         uint thread_index [[thread_index_in_threadgroup]],
                         uint simdgroup [[simdgroup_index_in_threadgroup]],
                         uint lane [[thread_index_in_simdgroup]]) {
  STAGED_INPUTS;
  const Sources sources = SOURCES;
  const uint pair = group.y;
  constant ExpertEntry& expert = args.experts[expert_of(args, pair)];
  const uint first = group.x * matvec_block_rows(quads_constant) + simdgroup * 4 * quads_constant;
  const Format format = first_format();
  const Stored w = find(sources, expert.down);
  float total[4 * kMaxQuads];
  multiply_rows({format, w, first, 4, args.hidden}, {format, w, first + 2, 4, args.hidden},
                expert.intermediate, activations + ulong(pair) * args.stride, thread_index, lane,
                staged, sums, total);
  device float* out =
      (device float*)find(sources, expert.out) + ulong(pair_rows[pair]) * args.hidden;
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

kernel void experts_gate_up_tiles(device const float* x [[buffer(kExpertX)]],
                                  constant ExpertArguments& args [[buffer(kExpertArguments)]],
                                  device const int* pair_tokens [[buffer(kExpertPairTokens)]],
                                  device float* activations [[buffer(kExpertActivations)]],
                                  SOURCE_ARGUMENTS, uint3 group [[threadgroup_position_in_grid]],
                                  uint thread_index [[thread_index_in_threadgroup]]) {
  THREADGROUP_ARRAY(float4, weights, [kTileColumns * kWeightPitch / 4]);
  THREADGROUP_ARRAY(float4, xs, [kTileColumns * kInputPitch / 4]);
  const Sources sources = SOURCES;
  const PairTile tile = find_tile(args, group.y);
  constant ExpertEntry& expert = args.experts[tile.expert];
  const uint first_row = group.x * kTileRows, rows = expert.intermediate;
  if (first_row >= rows) return;  // the whole threadgroup
  const TileInputs inputs = {x, pair_tokens, true, args.hidden, tile.first, tile.count};
  float4 gate[4], up[4];
  multiply_tile(first_format(), find(sources, expert.gate), first_row, rows, args.hidden, inputs,
                thread_index, (threadgroup float*)weights, (threadgroup float*)xs, gate);
  multiply_tile(second_format(), find(sources, expert.up), first_row, rows, args.hidden, inputs,
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

kernel void experts_down_tiles(constant ExpertArguments& args [[buffer(kExpertArguments)]],
                               device const int* pair_rows [[buffer(kExpertPairRows)]],
                               device const float* activations [[buffer(kExpertActivations)]],
                               SOURCE_ARGUMENTS, uint3 group [[threadgroup_position_in_grid]],
                               uint thread_index [[thread_index_in_threadgroup]]) {
  THREADGROUP_ARRAY(float4, weights, [kTileColumns * kWeightPitch / 4]);
  THREADGROUP_ARRAY(float4, xs, [kTileColumns * kInputPitch / 4]);
  const Sources sources = SOURCES;
  const PairTile tile = find_tile(args, group.y);
  constant ExpertEntry& expert = args.experts[tile.expert];
  const uint first_row = group.x * kTileRows;
  const TileInputs inputs = {activations, nullptr, false, args.stride, tile.first, tile.count};
  float4 total[4];
  multiply_tile(first_format(), find(sources, expert.down), first_row, args.hidden,
                expert.intermediate, inputs, thread_index, (threadgroup float*)weights,
                (threadgroup float*)xs, total);
  device float* out = (device float*)find(sources, expert.out);
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
