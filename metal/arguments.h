// What host and kernels must agree on: the kernels, the struct that each is given, and how a grid
// is divided. Plain C++14, read by Metal and by C++ alike.
//
// A kernel has one argument, its struct, bound at index 0. What it reads and writes is named in it
// by address: a pointer to the kernel, 64 bits to the host. Activations are float32, row-major, a
// row a token. An address is a multiple of 16, unless the field's comment says otherwise; 4 below
// is "a multiple of 4". "blocks" and "tiles" count threadgroups.
#pragma once

#ifdef __METAL_VERSION__
#include <metal_stdlib>
#else
#include <cstdint>
#endif

namespace shaders {

#ifdef __METAL_VERSION__
template <class T>
using Address = device T*;
#else
template <class T>
using Address = uint64_t;
#endif

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
  X(all_finite)             \
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
  kMaxProducts = 4,          // of a matvec or matmul
  kMaxExperts = 32,          // of one dispatch of the experts kernels
  kMaxRouted = 1024,         // experts that `route` can choose among
  kMaxChosen = 32,           // that it can choose
  kMaxConvTaps = 8,          // of causal_conv
  kMaxDeltaDim = 128,        // key_dim (a multiple of 4) and value_dim of gated_delta
  kMaxHeadDim = 256,         // of attention; a multiple of 32
  kMaxArgumentBytes = 4096,  // of a struct: what setBytes takes
};

// A matrix as it is stored; scales and biases mean nothing where it is dense.
struct Stored {
  Address<const unsigned char> weight;  // [rows, columns]
  Address<const unsigned char> scales;  // [rows, columns / group], a multiple of their element;
  Address<const unsigned char> biases;  // likewise
};

// Matrix-vector: blocks of rows.

enum MatvecShape : uint32_t {
  kMatvecThreads = 128,
  kMatvecSimdgroups = 4,
  kMaxQuads = 2,            // of rows of one simdgroup
  kMatvecLaneColumns = 32,  // consecutive columns of one lane
  kMatvecColumns = 4096,    // whose inputs are in threadgroup memory at a time
};

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
// Grid: (ceil(columns / kEmbedThreads), tokens). Constants: kBits, kGroup, kDType.

enum EmbedShape : uint32_t { kEmbedThreads = 256 };
struct EmbedArguments {
  Address<const int> ids;  // [tokens], 4
  Stored table;
  Address<float> out;  // [tokens, columns]
  uint32_t columns;
};

// rms_norm: out = x / rms(x) * weight.
// Grid: (tokens). `out` may be `x`.

enum NormShape : uint32_t { kNormThreads = 1024 };
struct NormArguments {
  Address<const float> x;       // [tokens, width]
  Address<const float> weight;  // [width]
  Address<float> out;           // [tokens, width]
  uint32_t width;
  float eps;
};

// matvec, matmul: out[t, row] (+)= weight · x[t] for up to four matrices of one format.
// Grid of matvec (few tokens): (blocks, tokens), kMatvecThreads threads; a block has
// matvec_block_rows(quads) rows. Grid of matmul (prompts): (blocks, ceil(tokens / kTileTokens)),
// kTileThreads threads; a block has kTileRows rows. No block has rows of two matrices.
// Constants: kBits, kGroup, kDType. Columns are a multiple of `group` where quantized, else any.
// Rows are any.

struct ProductEntry {
  Stored weight;
  Address<float> out;  // [tokens, rows]
  uint32_t rows;
  uint32_t add;          // 1: to what `out` holds
  uint32_t first_block;  // before it are those of the earlier products
};
struct ProductArguments {
  Address<const float> x;  // [tokens, columns]
  uint32_t columns;
  uint32_t tokens;
  uint32_t count;  // of products
  ProductEntry products[kMaxProducts];
};

// causal_conv: x = silu(conv(x)), depthwise.
// Grid: (ceil(channels / kConvThreads)). All addresses 4.

enum ConvShape : uint32_t { kConvThreads = 256 };
struct ConvArguments {
  Address<float> x;               // [tokens, channels], replaced
  Address<const float> weight;    // [taps, channels], oldest tap first
  Address<const float> state_in;  // [taps - 1, channels]
  Address<float> state_out;       // likewise; may be state_in
  uint32_t channels;
  uint32_t tokens;
  uint32_t taps;
};

// gated_delta: the gated delta rule, then the gated norm (DeltaCall in backend.h).
// Grid: (value_heads), delta_threads(value_dim) threads. All addresses 4.

enum DeltaShape : uint32_t {
  kDeltaParts = 4,   // of a column of the state: key_dim / 4 rows each, in registers
  kDeltaTokens = 4,  // whose queries and keys are normed together
  kDeltaThreads = kDeltaParts * kMaxDeltaDim,  // at most
};
inline uint32_t delta_threads(uint32_t value_dim) {
  return kDeltaParts * ((value_dim + kSimdWidth - 1) / kSimdWidth * kSimdWidth);
}

struct DeltaArguments {
  Address<const float>
      qkv;                 // [tokens, 2 * key_heads * key_dim + value_heads * value_dim], convolved
  Address<const float> z;  // [tokens, value_heads * value_dim]
  Address<const float> a;  // [tokens, value_heads]
  Address<const float> b;  // [tokens, value_heads]
  Address<const float> a_log;     // [value_heads]
  Address<const float> dt_bias;   // [value_heads]
  Address<const float> norm;      // [value_dim]
  Address<const float> state_in;  // [value_heads, key_dim, value_dim]
  Address<float> state_out;       // likewise; may be state_in
  Address<float> out;             // [tokens, value_heads * value_dim]
  uint32_t tokens;
  uint32_t key_heads, value_heads, key_dim, value_dim;
  float norm_eps;
};

// Attention (AttentionCall in backend.h), two or three dispatches, constant kCacheDType.
// - attention_append: norm and RoPE of queries and keys; keys and values join the cache.
//   Grid: (ceil(tokens * (heads + kv_heads) / kAttentionRows)).
// - attention_split: a range of the keys for rows of queries that share a KV head, kSplitRows at a
//   time of the token-major rows (token, head of the group). With one split it writes `out` itself.
//   Grid: (kv_heads, ceil(tokens * heads / kv_heads / kSplitRows), splits).
// - attention_merge, where there are several splits.
//   Grid: (ceil(tokens * heads / kAttentionRows)).
// splits = ceil((position + tokens) / keys_per_split); keys_per_split is a multiple of kSplitKeys.

enum AttentionShape : uint32_t {
  kAttentionThreads = 128,
  kAttentionRows = 4,  // of a threadgroup of append or merge: a simdgroup each
  kSplitRows = 16,
  kSplitKeys = 32,
};

struct AttentionArguments {
  Address<const float> q_gate;  // [tokens, heads, 2 * head_dim]: per head the query, then the gate
  Address<const float> k;       // [tokens, kv_heads, head_dim]
  Address<const float> v;       // likewise
  Address<const float> q_norm;  // [head_dim]
  Address<const float> k_norm;  // [head_dim]
  Address<float> queries;       // [tokens, heads, head_dim], scratch: append writes, split reads
  Address<unsigned char> keys;  // [kv_heads, capacity, head_dim]
  Address<unsigned char> values;  // likewise
  Address<float> partial;         // [splits, tokens * heads, head_dim], scratch: split, merge
  Address<float> totals;  // [splits, tokens * heads, 2]: maximum and sum, scratch: split, merge
  Address<float> out;     // [tokens, heads * head_dim], times sigmoid(gate)
  uint64_t capacity;
  uint32_t position;
  uint32_t tokens;
  uint32_t heads, kv_heads, head_dim, rotary_dim;
  uint32_t keys_per_split;
  uint32_t splits;
  float norm_eps;
  float frequencies[kMaxHeadDim / 2];  // [rotary_dim / 2]: 1 / theta^(2 i / rotary_dim)
};

// route: softmax over all experts, the experts_per_token largest, ties to the lower index.
// Grid: (tokens), a simdgroup. All addresses 4.

struct RouteArguments {
  Address<const float> logits;  // [tokens, experts]
  Address<int> ids;             // [tokens, experts_per_token]
  Address<float> weights;       // [tokens, experts_per_token]
  Address<int> finite;          // [tokens]: 1 where all logits are finite, else 0
  uint32_t experts;
  uint32_t experts_per_token;
  uint32_t renormalise;
};

// all_finite: 1 where a row of x is finite, else 0.
// Grid: (tokens), a simdgroup. All addresses 4.

struct FiniteArguments {
  Address<const float> x;  // [tokens, width]
  Address<int> finite;     // [tokens]
  uint32_t width;
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
// dispatch share these. Hidden and intermediate are multiples of `group` where quantized, else any.

struct ExpertEntry {
  Stored gate, up, down;
  Address<float> out;     // [out rows, hidden]
  uint32_t intermediate;  // rows of gate and up, columns of down
  uint32_t first_pair;    // its pairs end where the next expert's begin
};
struct ExpertArguments {
  Address<const float> x;          // [tokens, hidden]
  Address<const int> pair_tokens;  // [pairs], 4
  Address<const int> pair_rows;    // [pairs], 4
  Address<float> activations;      // [pairs, stride], scratch
  uint32_t hidden;
  uint32_t stride;  // of activations: the largest intermediate, rounded up to a multiple of 4
  uint32_t count;   // of experts, at most kMaxExperts
  uint32_t pairs;
  ExpertEntry experts[kMaxExperts];  // only the first `count` are read
};

// combine: x += sum_j weights[j] expert_out[j] + sigmoid(shared_gate) shared_out.
// Grid: (tokens). If `norm` is 1, normed = rms_norm(x) of the new x too.

enum CombineShape : uint32_t { kCombineThreads = 1024 };
struct CombineArguments {
  Address<const float> expert_out;      // [tokens * experts_per_token, hidden]
  Address<const float> expert_weights;  // [tokens, experts_per_token], 4
  Address<const float> shared_out;      // [tokens, hidden]
  Address<const float> shared_gate;     // [tokens], 4
  Address<float> x;                     // [tokens, hidden]
  Address<const float> norm_weight;     // [hidden]; anything where `norm` is 0; likewise normed
  Address<float> normed;                // [tokens, hidden]
  uint32_t hidden;
  uint32_t experts_per_token;
  uint32_t norm;
  float eps;
};

#ifndef __METAL_VERSION__
static_assert(sizeof(ExpertArguments) <= kMaxArgumentBytes);
#endif

}  // namespace shaders
