// The inner loops, as a table of functions for each instruction set. A kernel is serial and
// computes a range of an operation; cpu_backend.cpp divides the work. In every table each output
// element is computed by the same sequence of float operations whatever the range and the number of
// tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "backend/backend.h"

namespace flashmoe {

// An input quantized for matrices of `bits` and `group`: x = scale * q for each group of columns,
// q = round(x * 127 / max |x|). The order of the values is that of the weights in memory: in 64
// bytes of a row, byte j holds elements j * planes + p for p < planes = 8 / bits, so those
// elements' values are plane p's byte j, and the planes of 64 bytes each follow one another. A
// row of 8, 4, 2 or 1 groups is repeated until there are 16, so that a vector meets several rows.
struct Int8Input {
  int bits, group, groups;
  int copies;        // of the row; 1 where it is not repeated
  ptrdiff_t stride;  // of `values` from token to token, whole 64-byte planes
  int group_stride;  // of `scales` and `sums`, `groups` rounded up to 16
  int8_t* values;    // zero past the last column
  float* scales;
  float* sums;  // of the q of a group
};

// A range of a matrix product: rows [begin, end) for n tokens.
struct Rows {
  const Matrix* weight;
  int begin, end;
  int n;
  const int32_t* inputs;   // the row of the input that token t reads; null: t
  const int32_t* outputs;  // the row of `out` that it writes; null: t
  float* out;
  ptrdiff_t out_stride;
  bool add;
};

// The queries of tokens [first, last) under one KV head, and the keys [begin, end) they attend to,
// which lie in one block of kKeyBlock positions.
struct AttentionBlock {
  int kv_head;
  int first, last;
  int64_t begin, end;
};
constexpr int kKeyBlock = 256;

// For each query of a block, token-major and then by head: the largest score, the sum of exp(score
// - max) and that sum weighted by the values [queries, padded head_dim].
struct AttentionPartial {
  float* max;
  float* sum;
  float* weighted;
};

constexpr int padded(int width) {
  return (width + 15) / 16 * 16;
}

struct Kernels {
  const char* name;

  // One row of a matrix as float32.
  void (*expand_row)(const Matrix& weight, int64_t row, float* out);
  void (*rms_norm)(int width, const float* x, const float* weight, float eps, float* out);
  // Groups [begin, end) of token `token`; x is the token's whole row.
  void (*quantize)(const float* x, int token, int begin, int end, const Int8Input& out);
  void (*matmul_float)(const Rows& rows, const float* x);  // x is [tokens, cols]
  void (*matmul_int8)(const Rows& rows, const Int8Input& x);
  // gate = silu(gate) * up
  void (*swiglu)(int count, float* gate, const float* up);
  // Channels [begin, end).
  void (*causal_conv)(int n, const ConvCall& call, int begin, int end);
  // One value head; scratch of delta_scratch() floats.
  void (*gated_delta)(int n, const DeltaCall& call, int head, float* scratch);
  // Norm and RoPE of one token: queries to q [heads, padded head_dim], key and value to the cache.
  // scratch of 2 * padded(head_dim) floats.
  void (*attention_append)(const AttentionCall& call, int token, float* q, float* scratch);
  // q is [n, heads, padded head_dim]; scratch of attention_scratch() floats.
  void (*attention_block)(const AttentionCall& call, const AttentionBlock& block, const float* q,
                          const AttentionPartial& out, float* scratch);
  // into = into merged with the next block's `from`.
  void (*attention_merge)(int queries, int head_dim, const AttentionPartial& into,
                          const AttentionPartial& from);
  // Writes call.out for the tokens and KV head of `block`.
  void (*attention_finish)(const AttentionCall& call, const AttentionBlock& block,
                           const AttentionPartial& partial);
  // Columns [begin, end) of one token.
  void (*combine)(const CombineCall& call, int token, int begin, int end);
};

constexpr int kMaxConvKernel = 16;
constexpr int kDeltaTokens = 16;   // normalised at a time
constexpr int kDeltaColumns = 32;  // of the state held close at a time
constexpr int kKeyTile = 32;       // keys or values rearranged at a time

inline size_t delta_scratch(const DeltaCall& call) {
  const size_t keys = padded(call.key_dim), values = padded(call.value_dim) + kDeltaColumns;
  return kDeltaTokens * (2 * keys + values) + keys * kDeltaColumns;
}
inline size_t attention_scratch(const AttentionCall& call, const AttentionBlock& block) {
  const size_t queries =
      static_cast<size_t>(block.last - block.first) * (call.heads / call.kv_heads);
  // Scores, and a tile as float32; or scores, a tile and the queries as bfloat16.
  return queries * kKeyBlock + (kKeyTile + queries) * padded(call.head_dim);
}

// The tables that were compiled and that this machine can run, the best last.
std::vector<const Kernels*> available_kernels();
// The best, or the one that FLASHMOE_ISA names. Throws std::invalid_argument.
const Kernels& select_kernels();

}  // namespace flashmoe
