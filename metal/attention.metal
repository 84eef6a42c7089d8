// Gated attention over a cache of keys and values. The context is divided into splits, which as
// many threadgroups go through with a running softmax; their results are merged.
#include "common.h"

enum : uint { kVectors = kMaxHeadDim / 4 };

// Norm and RoPE, one simdgroup a head of a token: queries to scratch, keys and values to the cache.
KERNEL(attention_append, kAttentionThreads)(constant AttentionArguments& args [[buffer(0)]],
                                            uint3 group [[threadgroup_position_in_grid]],
                                            uint simdgroup [[simdgroup_index_in_threadgroup]],
                                            uint lane [[thread_index_in_simdgroup]]) {
  device const float* q_gate = args.q_gate;
  device const float* k = args.k;
  device const float* v = args.v;
  device const float* q_norm = args.q_norm;
  device const float* k_norm = args.k_norm;
  device float* queries = args.queries;
  device uchar* key_cache = args.keys;
  device uchar* value_cache = args.values;
  THREADGROUP_ARRAY(float, normed, [kAttentionRows][kMaxHeadDim]);
  const uint row = group.x * kAttentionRows + simdgroup;
  const uint token = row / (args.heads + args.kv_heads), head = row % (args.heads + args.kv_heads);
  if (token >= args.tokens) return;  // the whole simdgroup, and no barrier is a threadgroup's
  const uint dim = args.head_dim, half_dim = args.rotary_dim / 2;
  const bool is_query = head < args.heads;
  const ulong query = ulong(token) * args.heads + head;
  const uint kv_head = head - args.heads;
  const ulong key = ulong(token) * args.kv_heads + kv_head;
  device const float* x = is_query ? q_gate + query * 2 * dim : k + key * dim;
  device const float* norm = is_query ? q_norm : k_norm;

  float squares = 0;
  for (uint i = lane; i < dim; i += kSimdWidth) squares = fma(x[i], x[i], squares);
  const float scale = 1.0f / sqrt(simd_sum(squares) / float(dim) + args.norm_eps);
  threadgroup float* y = normed[simdgroup];
  for (uint i = lane; i < dim; i += kSimdWidth) y[i] = x[i] * scale * norm[i];
  simdgroup_barrier(mem_flags::mem_threadgroup);

  const ulong position = ulong(args.position) + token;
  const ulong cell = (kv_head * args.capacity + position) * dim;
  for (uint i = lane; i < dim; i += kSimdWidth) {
    float rotated = y[i];
    if (i < 2 * half_dim) {
      const uint pair = i < half_dim ? i : i - half_dim;
      const float angle = float(position) * args.frequencies[pair];
      const float other = i < half_dim ? -y[i + half_dim] : y[pair];
      rotated = y[i] * precise::cos(angle) + other * precise::sin(angle);
    }
    if (is_query) {
      queries[query * dim + i] = rotated;
    } else if (cache_dtype_constant == kBF16) {
      ((device ushort*)key_cache)[cell + i] = float_to_bf16(rotated);
      ((device ushort*)value_cache)[cell + i] = float_to_bf16(v[key * dim + i]);
    } else {
      ((device float*)key_cache)[cell + i] = rotated;
      ((device float*)value_cache)[cell + i] = v[key * dim + i];
    }
  }
}

// Four consecutive elements of a cache, `index` counting fours.
INLINE float4 cached(device const uchar* cache, ulong index) {
  if (cache_dtype_constant == kF32) return ((device const float4*)cache)[index];
  const uint2 words = ((device const uint2*)cache)[index];
  return float4(as_type<float>(words.x << 16), as_type<float>(words.x & 0xffff0000u),
                as_type<float>(words.y << 16), as_type<float>(words.y & 0xffff0000u));
}

// The softmax's sum is divided out and the gate applied to four elements of the output.
INLINE float4 gated(float4 weighted, float sum, float4 gate) {
  return weighted * (1.0f / sum) *
         float4(sigmoid(gate.x), sigmoid(gate.y), sigmoid(gate.z), sigmoid(gate.w));
}

// kSplitRows queries that share a KV head, against the keys of one split, kSplitKeys at a time.
// Scores: 8 lanes share a key. Weighted values: a simdgroup owns 4 rows, a lane 4 elements of each
// 128.
KERNEL(attention_split, kAttentionThreads)(constant AttentionArguments& args [[buffer(0)]],
                                           uint3 group [[threadgroup_position_in_grid]],
                                           uint thread_index [[thread_index_in_threadgroup]],
                                           uint simdgroup [[simdgroup_index_in_threadgroup]],
                                           uint lane [[thread_index_in_simdgroup]]) {
  device const float* q_gate = args.q_gate;
  device const float* queries = args.queries;
  device const uchar* key_cache = args.keys;
  device const uchar* value_cache = args.values;
  device float* partial = args.partial;
  device float* totals = args.totals;
  device float* out = args.out;
  // kValues are loaded together, so that their latencies overlap.
  enum : uint { kRows = kSplitRows / 4, kLaneVectors = kVectors / kSimdWidth, kValues = 8 };
  THREADGROUP_ARRAY(float4, tile, [kSplitRows][kVectors]);
  THREADGROUP_ARRAY(float, scores, [kSplitRows][kSplitKeys]);

  const uint kv_head = group.x, group_heads = args.heads / args.kv_heads;
  const uint first_row = group.y * kSplitRows, all_rows = args.tokens * group_heads;
  const uint vectors = args.head_dim / 4;
  const float query_scale = 1.0f / sqrt(float(args.head_dim));
  for (uint i = thread_index; i < kSplitRows * vectors; i += 4 * kSimdWidth) {
    const uint r = i / vectors, row = first_row + r;
    const ulong query =
        ulong(row / group_heads) * args.heads + kv_head * group_heads + row % group_heads;
    const float4 q = row < all_rows ? ((device const float4*)queries)[query * vectors + i % vectors]
                                    : float4(0.0f);
    tile[r][i % vectors] = q * query_scale;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const uint last_token = (min(first_row + kSplitRows, all_rows) - 1) / group_heads;
  const uint begin = group.z * args.keys_per_split;
  const uint end = min(begin + args.keys_per_split, args.position + last_token + 1);
  const ulong cache = ulong(kv_head) * args.capacity * vectors;

  float4 weighted[kRows][kLaneVectors];
  float top[kRows], sum[kRows];
#pragma unroll
  for (uint r = 0; r < kRows; ++r) {
    top[r] = -INFINITY;
    sum[r] = 0;
#pragma unroll
    for (uint j = 0; j < kLaneVectors; ++j) weighted[r][j] = float4(0.0f);
  }

  for (uint first_key = begin; first_key < end; first_key += kSplitKeys) {
    const uint part = lane % 8;
    const uint index = simdgroup * 8 + lane / 8;  // of one key; the other is 4 further
    const uint first = first_key + index, second = first + 4;
    const ulong first_at = cache + ulong(min(first, end - 1)) * vectors;
    const ulong second_at = cache + ulong(min(second, end - 1)) * vectors;
    float4 key[kVectors / 8], other[kVectors / 8];
#pragma unroll
    for (uint j = 0; j < kVectors / 8; ++j) {
      const bool there = 8 * j + part < vectors;
      key[j] = there ? cached(key_cache, first_at + 8 * j + part) : float4(0.0f);
      other[j] = there ? cached(key_cache, second_at + 8 * j + part) : float4(0.0f);
    }
    for (uint r = 0; r < kSplitRows; ++r) {
      float score = 0, other_score = 0;
#pragma unroll
      for (uint j = 0; j < kVectors / 8; ++j) {
        if (8 * j + part >= vectors) continue;
        const float4 query = tile[r][8 * j + part];
        score += dot(query, key[j]);
        other_score += dot(query, other[j]);
      }
      // The sums over the 8 lanes: half of them end up with one key's, half with the other's.
      const bool odd = part % 2 != 0;
      float sum = (odd ? other_score : score) + simd_shuffle_xor(odd ? score : other_score, 1);
      sum += simd_shuffle_xor(sum, 2);
      sum += simd_shuffle_xor(sum, 4);
      const uint position = odd ? second : first, token = (first_row + r) / group_heads;
      const bool visible = position < end && position <= args.position + token;
      if (part < 2) scores[r][index + 4 * part] = visible ? sum : -INFINITY;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

#pragma unroll
    for (uint r = 0; r < kRows; ++r) {
      threadgroup float& score = scores[simdgroup * kRows + r][lane];
      const float highest = max(top[r], simd_max(score));
      // No key so far is visible to this row: all of its weights stay 0.
      const float base = highest == -INFINITY ? 0.0f : highest;
      const float keep = exp(top[r] - base), p = exp(score - base);
      score = p;
      top[r] = highest;
      sum[r] = fma(sum[r], keep, simd_sum(p));
#pragma unroll
      for (uint j = 0; j < kLaneVectors; ++j) weighted[r][j] = weighted[r][j] * keep;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);

    // Keys past the end weigh 0, and the last one's value stands for theirs.
    for (uint index = 0; index < kSplitKeys; index += kValues) {
#pragma unroll
      for (uint j = 0; j < kLaneVectors; ++j) {
        const uint vector = lane + j * kSimdWidth;
        if (vector >= vectors) continue;
        float4 value[kValues];
#pragma unroll
        for (uint i = 0; i < kValues; ++i) {
          const uint position = min(first_key + index + i, end - 1);
          value[i] = cached(value_cache, cache + ulong(position) * vectors + vector);
        }
#pragma unroll
        for (uint r = 0; r < kRows; ++r) {
          threadgroup const float* p = scores[simdgroup * kRows + r] + index;
#pragma unroll
          for (uint i = 0; i < kValues; ++i) {
            weighted[r][j] = fma(float4(p[i]), value[i], weighted[r][j]);
          }
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

#pragma unroll
  for (uint r = 0; r < kRows; ++r) {
    const uint row = first_row + simdgroup * kRows + r;
    if (row >= all_rows) continue;
    const ulong query =
        ulong(row / group_heads) * args.heads + kv_head * group_heads + row % group_heads;
    const ulong slot = ulong(group.z) * args.tokens * args.heads + query;
    if (args.splits > 1 && lane == 0) {
      totals[2 * slot] = top[r];
      totals[2 * slot + 1] = sum[r];
    }
#pragma unroll
    for (uint j = 0; j < kLaneVectors; ++j) {
      const uint vector = lane + j * kSimdWidth;
      if (vector >= vectors) continue;
      if (args.splits > 1) {
        ((device float4*)partial)[slot * vectors + vector] = weighted[r][j];
      } else {
        const float4 gate = ((device const float4*)q_gate)[(2 * query + 1) * vectors + vector];
        ((device float4*)out)[query * vectors + vector] = gated(weighted[r][j], sum[r], gate);
      }
    }
  }
}

// One simdgroup a head of a token.
KERNEL(attention_merge, kAttentionThreads)(constant AttentionArguments& args [[buffer(0)]],
                                           uint3 group [[threadgroup_position_in_grid]],
                                           uint simdgroup [[simdgroup_index_in_threadgroup]],
                                           uint lane [[thread_index_in_simdgroup]]) {
  device const float* q_gate = args.q_gate;
  device const float* partial = args.partial;
  device const float* totals = args.totals;
  device float* out = args.out;
  const uint query = group.x * kAttentionRows + simdgroup, all = args.tokens * args.heads;
  if (query >= all) return;
  const uint vectors = args.head_dim / 4;
  float top = -INFINITY;
  for (uint split = lane; split < args.splits; split += kSimdWidth) {
    top = max(top, totals[2 * (ulong(split) * all + query)]);
  }
  top = simd_max(top);
  float sum = 0;
  for (uint split = lane; split < args.splits; split += kSimdWidth) {
    const ulong slot = ulong(split) * all + query;
    sum = fma(exp(totals[2 * slot] - top), totals[2 * slot + 1], sum);
  }
  sum = simd_sum(sum);
  for (uint vector = lane; vector < vectors; vector += kSimdWidth) {
    float4 weighted = float4(0.0f);
#pragma unroll 8
    for (uint split = 0; split < args.splits; ++split) {
      const ulong slot = ulong(split) * all + query;
      weighted = fma(float4(exp(totals[2 * slot] - top)),
                     ((device const float4*)partial)[slot * vectors + vector], weighted);
    }
    const float4 gate = ((device const float4*)q_gate)[(2 * ulong(query) + 1) * vectors + vector];
    ((device float4*)out)[ulong(query) * vectors + vector] = gated(weighted, sum, gate);
  }
}
