// What host and shaders must agree on: the kernels, the indices of their buffers, the structs that
// setBytes carries, and how a grid is divided. Plain C++14, read by Metal and by C++ alike.
//
// Activations are float32, row-major, a row a token. A buffer's offset is a multiple of 16 bytes,
// unless the kernel's comment says otherwise. "blocks" and "tiles" below count threadgroups.
#pragma once

#ifdef __METAL_VERSION__
#include <metal_stdlib>
#else
#include <cstdint>
#endif

namespace shaders {

// Every kernel, for tables of pipelines.
#define FLASHMOE_KERNELS(X) \
  X(embed)                  \
  X(rms_norm)               \
  X(matvec)                 \
  X(matmul)                 \
  X(causal_conv)            \
  X(gated_delta)            \
  X(attention_append)       \
  X(attention_split)        \
  X(attention_merge)        \
  X(route)                  \
  X(experts_gate_up)        \
  X(experts_down)           \
  X(experts_gate_up_tiles)  \
  X(experts_down_tiles)     \
  X(combine)

// Indices of the function constants, all of type uint. A format is (bits, group, dtype): bits 2, 4
// or 8, or 0 where the matrix is dense; group 32, 64 or 128 (anything where dense); dtype that of
// scales and biases, or of the elements where dense, numbered as in flashmoe::DType.
enum FunctionConstant : uint32_t {
  kBits = 0,
  kGroup = 1,
  kDType = 2,
  kSecondBits = 3,  // of `up` in experts_gate_up
  kSecondGroup = 4,
  kSecondDType = 5,
  kCacheDType = 6,  // of keys and values: F32 or BF16
  kQuads = 7,       // of rows, for each simdgroup of a matrix-vector kernel
  kFunctionConstants = 8,
};

enum ElementType : uint32_t { kF32 = 0, kF16 = 1, kBF16 = 2 };

enum Limits : uint32_t {
  kSimdWidth = 32,
  kMaxProducts = 4,    // of a matvec or matmul
  kMaxExperts = 32,    // of one dispatch of the experts kernels
  kMaxSources = 16,    // buffers that their weights and outputs lie in
  kMaxRouted = 1024,   // experts that `route` can choose among
  kMaxChosen = 32,     // that it can choose
  kMaxConvTaps = 8,    // of causal_conv
  kMaxDeltaDim = 128,  // key_dim (a multiple of 4) and value_dim of gated_delta
  kMaxHeadDim = 256,   // of attention; a multiple of 32
};

// Matrix-vector: blocks of rows.

enum MatvecShape : uint32_t {
  kMatvecThreads = 128,
  kMatvecSimdgroups = 4,
  kMaxQuads = 2,            // of rows of one simdgroup
  kMatvecLaneColumns = 32,  // consecutive columns of one lane
  kMatvecColumns = 4096,    // whose inputs are in threadgroup memory at a time
};

// How many quads of rows a simdgroup takes: more share the work on inputs, fewer occupy the GPU.
inline uint32_t matvec_quads(uint32_t rows) {
  return rows > 8192 ? 2 : 1;
}

// Rows of one threadgroup.
inline uint32_t matvec_block_rows(uint32_t quads) {
  return 4 * quads * kMatvecSimdgroups;
}

// Matrix-matrix: tiles of rows and tokens.

enum TileShape : uint32_t {
  kTileThreads = 128,
  kTileTokens = 32,
  kTileRows = 64,
  kTileColumns = 32,  // taken at a time
};

// embed: out[t] = row ids[t] of the table.
// Grid: (ceil(columns / 256), tokens), 256 threads. Constants: kBits, kGroup, kDType.

enum EmbedBuffer : uint32_t {
  kEmbedIds = 0,  // int [tokens], offset a multiple of 4
  kEmbedWeight = 1,
  kEmbedScales = 2,  // anything bound where dense; likewise kEmbedBiases
  kEmbedBiases = 3,
  kEmbedOut = 4,        // [tokens, columns]
  kEmbedArguments = 5,  // EmbedArguments
};
struct EmbedArguments {
  uint32_t columns;
};

// rms_norm: out = x / rms(x) * weight.
// Grid: (tokens), kNormThreads threads. `out` may be `x`.

enum NormShape : uint32_t { kNormThreads = 1024 };
enum NormBuffer : uint32_t {
  kNormX = 0,          // [tokens, width]
  kNormWeight = 1,     // [width]
  kNormOut = 2,        // [tokens, width]
  kNormArguments = 3,  // NormArguments
};
struct NormArguments {
  uint32_t width;
  float eps;
};

// matvec, matmul: out[t, row] (+)= weight · x[t] for up to four matrices of one format.
// Grid of matvec (few tokens): (first_block[count], tokens), kMatvecThreads threads; a block has
// matvec_block_rows(quads) rows. Grid of matmul (prompts): (first_block[count],
// ceil(tokens / kTileTokens)), kTileThreads threads; a block has kTileRows rows.
// Constants: kBits, kGroup, kDType. Columns are a multiple of `group` where quantised, else any.
// Rows are any. A weight's offset is a multiple of 16; of scales and biases, of their element.
// Indices of products beyond `count` are bound too, to anything.

enum ProductBuffer : uint32_t {
  kProductX = 0,          // [tokens, columns]
  kProductArguments = 1,  // ProductArguments
  kProductWeight = 4,     // 4 .. 7
  kProductWeight1 = 5,
  kProductWeight2 = 6,
  kProductWeight3 = 7,
  kProductScales = 8,  // 8 .. 11; anything where dense; likewise biases
  kProductScales1 = 9,
  kProductScales2 = 10,
  kProductScales3 = 11,
  kProductBiases = 12,  // 12 .. 15
  kProductBiases1 = 13,
  kProductBiases2 = 14,
  kProductBiases3 = 15,
  kProductOut = 16,  // 16 .. 19: [tokens, rows]
  kProductOut1 = 17,
  kProductOut2 = 18,
  kProductOut3 = 19,
};
struct ProductArguments {
  uint32_t columns;
  uint32_t tokens;
  uint32_t count;                          // of products
  uint32_t rows[kMaxProducts];             //
  uint32_t add[kMaxProducts];              // 1: to what `out` holds
  uint32_t first_block[kMaxProducts + 1];  // running sum of ceil(rows / rows of a block)
};

// causal_conv: x = silu(conv(x)), depthwise.
// Grid: (ceil(channels / 256)), 256 threads. Offsets are multiples of 4.

enum ConvBuffer : uint32_t {
  kConvX = 0,          // [tokens, channels], replaced
  kConvWeight = 1,     // [taps, channels], oldest tap first
  kConvStateIn = 2,    // [taps - 1, channels]
  kConvStateOut = 3,   // likewise; another buffer
  kConvArguments = 4,  // ConvArguments
};
struct ConvArguments {
  uint32_t channels;
  uint32_t tokens;
  uint32_t taps;
};

// gated_delta: the gated delta rule, then the gated norm (DeltaCall in backend.h).
// Grid: (value_heads), delta_threads(value_dim) threads. Offsets are multiples of 4.

enum DeltaShape : uint32_t {
  kDeltaParts = 4,   // of a column of the state: key_dim / 4 rows each, in registers
  kDeltaTokens = 4,  // whose queries and keys are normed together
};
inline uint32_t delta_threads(uint32_t value_dim) {
  return kDeltaParts * ((value_dim + kSimdWidth - 1) / kSimdWidth * kSimdWidth);
}

enum DeltaBuffer : uint32_t {
  kDeltaQkv = 0,        // [tokens, 2 * key_heads * key_dim + value_heads * value_dim], convolved
  kDeltaZ = 1,          // [tokens, value_heads * value_dim]
  kDeltaA = 2,          // [tokens, value_heads]
  kDeltaB = 3,          // [tokens, value_heads]
  kDeltaALog = 4,       // [value_heads]
  kDeltaDtBias = 5,     // [value_heads]
  kDeltaNorm = 6,       // [value_dim]
  kDeltaStateIn = 7,    // [value_heads, key_dim, value_dim]
  kDeltaStateOut = 8,   // likewise; another buffer
  kDeltaOut = 9,        // [tokens, value_heads * value_dim]
  kDeltaArguments = 10  // DeltaArguments
};
struct DeltaArguments {
  uint32_t tokens;
  uint32_t key_heads, value_heads, key_dim, value_dim;
  float norm_eps;
};

// Attention (AttentionCall in backend.h), two or three dispatches, constant kCacheDType.
// - attention_append: norm and RoPE of queries and keys; keys and values join the cache.
//   Grid: (ceil(tokens * (heads + kv_heads) / 4)), 128 threads.
// - attention_split: a range of the keys for rows of queries that share a KV head, kSplitRows at a
//   time of the token-major rows (token, head of the group). With one split it writes `out` itself.
//   Grid: (kv_heads, ceil(tokens * heads / kv_heads / kSplitRows), splits), 128 threads.
// - attention_merge, where there are several splits.
//   Grid: (ceil(tokens * heads / 4)), 128 threads.
// splits = ceil((position + tokens) / keys_per_split); keys_per_split is a multiple of kSplitKeys.

enum SplitShape : uint32_t { kSplitRows = 16, kSplitKeys = 32 };

enum AttentionBuffer : uint32_t {
  kAttentionArguments = 0,    // AttentionArguments
  kAttentionQGate = 1,        // [tokens, heads, 2 * head_dim]: per head the query, then the gate
  kAttentionK = 2,            // [tokens, kv_heads, head_dim]
  kAttentionV = 3,            // likewise
  kAttentionQNorm = 4,        // [head_dim]
  kAttentionKNorm = 5,        // [head_dim]
  kAttentionFrequencies = 6,  // [rotary_dim / 2]: 1 / theta^(2 i / rotary_dim)
  kAttentionQueries = 7,      // [tokens, heads, head_dim], scratch: append writes, split reads
  kAttentionKeys = 8,         // [kv_heads, capacity, head_dim], offset a multiple of 16
  kAttentionValues = 9,       // likewise
  kAttentionPartial = 10,     // [splits, tokens * heads, head_dim], scratch: split, merge
  kAttentionTotals = 11,      // [splits, tokens * heads, 2]: maximum and sum, scratch: split, merge
  kAttentionOut = 12,         // [tokens, heads * head_dim], times sigmoid(gate)
};
// append uses 0 to 9; split 0, 1 and 7 to 12; merge 0, 1 and 10 to 12. With one split, partials and
// totals may be bound to anything.
struct AttentionArguments {
  uint64_t capacity;
  uint32_t position;
  uint32_t tokens;
  uint32_t heads, kv_heads, head_dim, rotary_dim;
  uint32_t keys_per_split;
  uint32_t splits;
  float norm_eps;
};

// route: softmax over all experts, the top_k largest, ties to the lower index.
// Grid: (tokens), 32 threads. Offsets are multiples of 4.

enum RouteBuffer : uint32_t {
  kRouteLogits = 0,     // [tokens, experts]
  kRouteIds = 1,        // int [tokens, top_k]
  kRouteWeights = 2,    // [tokens, top_k]
  kRouteArguments = 3,  // RouteArguments
};
struct RouteArguments {
  uint32_t experts;
  uint32_t top_k;
  uint32_t renormalise;
};

// experts: out[out row] = down(silu(gate x) * up x) for (token, out row) pairs, sorted by expert.
// Two dispatches: gate_up fills activations, down reads them. Decode, kMatvecThreads threads,
// `intermediate` being the largest:
//   experts_gate_up        grid (ceil(intermediate / (matvec_block_rows(quads) / 2)), pairs)
//   experts_down           grid (ceil(hidden / matvec_block_rows(quads)), pairs)
// Prompts, kTileThreads threads, a tile being up to kTileTokens pairs of one expert:
//   experts_gate_up_tiles  grid (ceil(intermediate / kTileRows), tiles)
//   experts_down_tiles     grid (ceil(hidden / kTileRows), tiles)
// Constants: gate_up kBits.. (gate) and kSecondBits.. (up); down kBits.. (down). All experts of a
// dispatch share these. Hidden and intermediate are multiples of `group` where quantised, else any.

// Where a part lies: source buffer index (below kMaxSources) << 56 | byte offset in it. A weight's
// address is a multiple of 16, that of scales and biases of their element, that of `out` of 16.
typedef uint64_t Location;
inline Location locate(uint32_t source, uint64_t offset) {
  return (uint64_t(source) << 56) | offset;
}

struct StoredMatrix {
  Location weight, scales, biases;
};
struct ExpertEntry {
  StoredMatrix gate, up, down;
  Location out;           // [out rows, hidden]
  uint32_t intermediate;  // rows of gate and up, columns of down
  uint32_t first_pair;    // its pairs end where the next expert's begin
};
struct ExpertArguments {
  uint32_t hidden;
  uint32_t stride;  // of activations: the largest intermediate, rounded up to a multiple of 4
  uint32_t count;   // of experts, at most kMaxExperts
  uint32_t pairs;
  ExpertEntry experts[kMaxExperts];  // only the first `count` are read
};
enum ExpertBuffer : uint32_t {
  kExpertX = 0,            // gate_up: [tokens, hidden]
  kExpertArguments = 1,    // ExpertArguments
  kExpertPairTokens = 2,   // gate_up: int [pairs]
  kExpertPairRows = 3,     // down: int [pairs]
  kExpertActivations = 4,  // [pairs, stride]
  kExpertSources = 8,      // 8 .. 23; indices that no Location names are bound to anything
  kExpertSource1 = 9,
  kExpertSource2 = 10,
  kExpertSource3 = 11,
  kExpertSource4 = 12,
  kExpertSource5 = 13,
  kExpertSource6 = 14,
  kExpertSource7 = 15,
  kExpertSource8 = 16,
  kExpertSource9 = 17,
  kExpertSource10 = 18,
  kExpertSource11 = 19,
  kExpertSource12 = 20,
  kExpertSource13 = 21,
  kExpertSource14 = 22,
  kExpertSource15 = 23,
};

// combine: x += sum_j weights[j] expert_out[j] + sigmoid(shared_gate) shared_out.
// Grid: (tokens), kCombineThreads threads. If `norm` is 1, normed = rms_norm(x) of the new x too.

enum CombineShape : uint32_t { kCombineThreads = 1024 };
enum CombineBuffer : uint32_t {
  kCombineExpertOut = 0,      // [tokens * top_k, hidden]
  kCombineExpertWeights = 1,  // [tokens, top_k], offset a multiple of 4
  kCombineSharedOut = 2,      // [tokens, hidden]
  kCombineSharedGate = 3,     // [tokens], offset a multiple of 4
  kCombineX = 4,              // [tokens, hidden]
  kCombineNormWeight = 5,     // [hidden]; anything where `norm` is 0; likewise kCombineNormed
  kCombineNormed = 6,         // [tokens, hidden]
  kCombineArguments = 7,      // CombineArguments
};
struct CombineArguments {
  uint32_t hidden;
  uint32_t top_k;
  uint32_t norm;
  float eps;
};

}  // namespace shaders
