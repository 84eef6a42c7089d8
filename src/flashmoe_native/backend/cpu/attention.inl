// Gated attention over a cache of keys and values. Keys are taken in blocks of kKeyBlock positions,
// aligned to absolute positions; a block's partial result is computed on its own and the blocks are
// merged in order, so a token's result does not depend on how the work was divided.
#pragma once

#include "backend/cpu/elementwise.inl"
#include "backend/cpu/simd.inl"
#include "backend/cpu/softmax.inl"

constexpr int kQueries = kLanes == 16 ? 4 : 2;  // whose sums fit into registers
constexpr int kScoreKeys = 4;                   // divides kKeyTile

FLASHMOE_INLINE void cache_store(const AttentionCall& call, std::byte* cache, int64_t cell,
                                 const float* value) {
  if (call.cache_dtype == DType::F32) {
    __builtin_memcpy(cache + cell * 4, value, sizeof(float) * static_cast<size_t>(call.head_dim));
    return;
  }
  auto* out = reinterpret_cast<uint16_t*>(cache) + cell;
  for (int i = 0; i < call.head_dim; ++i) out[i] = float_to_bf16(value[i]);
}

// `count` positions of one head as float32 rows of padded(head_dim); zero beyond and up to `rows`.
FLASHMOE_INLINE void cache_load(const AttentionCall& call, const std::byte* cache, int head,
                                int64_t position, int count, int rows, float* out) {
  const int width = padded(call.head_dim);
  const int64_t cell = (head * call.capacity + position) * call.head_dim;
  for (int row = 0; row < rows; ++row) {
    float* to = out + row * width;
    int valid = 0;
    if (row < count) {
      valid = call.head_dim;
      const int64_t from = cell + static_cast<int64_t>(row) * call.head_dim;
      if (call.cache_dtype == DType::F32) {
        __builtin_memcpy(to, cache + from * 4, sizeof(float) * static_cast<size_t>(valid));
      } else {
        const auto* stored = reinterpret_cast<const uint16_t*>(cache) + from;
        for (int i = 0; i < valid; ++i) to[i] = bf16_to_float(stored[i]);
      }
    }
    for (int i = valid; i < width; ++i) to[i] = 0;
  }
}

// Rotates pairs (i, i + half) of the first 2 * half elements.
FLASHMOE_INLINE void rotate(float* x, int half, const float* cosines, const float* sines) {
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cosines[i] - b * sines[i];
    x[i + half] = b * cosines[i] + a * sines[i];
  }
}

void attention_append(const AttentionCall& call, int token, float* q, float* scratch) {
  const int dim = call.head_dim, width = padded(dim), half = call.rotary_dim / 2;
  const int64_t position = call.position + token;
  float* cosines = scratch;
  float* sines = scratch + half;
  float* key = scratch + width;
  for (int i = 0; i < half; ++i) {
    // All in float32, in the order of transformers' rotary embedding.
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(call.rotary_dim);
    const float angle = static_cast<float>(position) * (1.0f / ::powf(call.rope_theta, exponent));
    cosines[i] = ::cosf(angle);
    sines[i] = ::sinf(angle);
  }
  for (int head = 0; head < call.heads; ++head) {
    const ptrdiff_t row = static_cast<ptrdiff_t>(token) * call.heads + head;
    float* out = q + row * width;
    rms_norm(dim, call.q_gate + row * 2 * dim, call.q_norm, call.norm_eps, out);
    rotate(out, half, cosines, sines);
    for (int i = dim; i < width; ++i) out[i] = 0;
  }
  for (int head = 0; head < call.kv_heads; ++head) {
    const ptrdiff_t row = static_cast<ptrdiff_t>(token) * call.kv_heads + head;
    const int64_t cell = (head * call.capacity + position) * dim;
    rms_norm(dim, call.k + row * dim, call.k_norm, call.norm_eps, key);
    rotate(key, half, cosines, sines);
    cache_store(call, call.keys, cell, key);
    cache_store(call, call.values, cell, call.v + row * dim);
  }
}

// scores[query][key] = q[query] · keys[key] * scale for Q queries and kKeyTile keys.
template <int Q>
FLASHMOE_INLINE void score_tile(const float* const* q, const float* keys, int width, float scale,
                                float* scores) {
  for (int key = 0; key < kKeyTile; key += kScoreKeys) {
    Floats acc[Q][kScoreKeys] = {};
    for (int i = 0; i < width; i += kLanes) {
      Floats k[kScoreKeys];
      for (int j = 0; j < kScoreKeys; ++j) k[j] = load(keys + (key + j) * width + i);
      for (int r = 0; r < Q; ++r) {
        const Floats value = load(q[r] + i);
        for (int j = 0; j < kScoreKeys; ++j) acc[r][j] = multiply_add(value, k[j], acc[r][j]);
      }
    }
    for (int r = 0; r < Q; ++r) {
      for (int j = 0; j < kScoreKeys; ++j) scores[r * kKeyBlock + key + j] = sum(acc[r][j]) * scale;
    }
  }
}

// weighted[query] += Σ p[query][j] values[j] over `count` values, for Q queries and the columns of
// V vectors.
template <int Q, int V>
FLASHMOE_INLINE void weigh_columns(const float* p, const float* values, int count, int width,
                                   float* weighted) {
  Floats acc[Q][V];
  for (int r = 0; r < Q; ++r) {
    for (int c = 0; c < V; ++c) acc[r][c] = load(weighted + r * width + c * kLanes);
  }
  for (int j = 0; j < count; ++j) {
    Floats v[V];
    for (int c = 0; c < V; ++c) v[c] = load(values + j * width + c * kLanes);
    for (int r = 0; r < Q; ++r) {
      const Floats weight = splat(p[r * kKeyBlock + j]);
      for (int c = 0; c < V; ++c) acc[r][c] = multiply_add(weight, v[c], acc[r][c]);
    }
  }
  for (int r = 0; r < Q; ++r) {
    for (int c = 0; c < V; ++c) store(weighted + r * width + c * kLanes, acc[r][c]);
  }
}

template <int Q>
FLASHMOE_INLINE void weigh_tile(const float* p, const float* values, int count, int width,
                                float* weighted) {
  constexpr int kWide = 4 * kLanes;
  int i = 0;
  for (; i + kWide <= width; i += kWide) {
    weigh_columns<Q, 4>(p, values + i, count, width, weighted + i);
  }
  for (; i < width; i += kLanes) {
    weigh_columns<Q, 1>(p, values + i, count, width, weighted + i);
  }
}

void attention_block(const AttentionCall& call, const AttentionBlock& block, const float* q,
                     const AttentionPartial& out, float* scratch) {
  const int width = padded(call.head_dim), group = call.heads / call.kv_heads;
  const int queries = (block.last - block.first) * group;
  const int keys = static_cast<int>(block.end - block.begin);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(call.head_dim));
  float* scores = scratch;  // [queries, kKeyBlock]
  float* tile = scratch + static_cast<ptrdiff_t>(queries) * kKeyBlock;
  const auto query = [&](int index) {
    const ptrdiff_t token = block.first + index / group;
    return q + (token * call.heads + block.kv_head * group + index % group) * width;
  };

  for (int key = 0; key < keys; key += kKeyTile) {
    const int count = keys - key < kKeyTile ? keys - key : kKeyTile;
    cache_load(call, call.keys, block.kv_head, block.begin + key, count, kKeyTile, tile);
    int r = 0;
    for (; r + kQueries <= queries; r += kQueries) {
      const float* rows[kQueries];
      for (int i = 0; i < kQueries; ++i) rows[i] = query(r + i);
      score_tile<kQueries>(rows, tile, width, scale, scores + r * kKeyBlock + key);
    }
    for (; r < queries; ++r) {
      const float* row = query(r);
      score_tile<1>(&row, tile, width, scale, scores + r * kKeyBlock + key);
    }
  }
  for (int r = 0; r < queries; ++r) {
    const int64_t visible = call.position + block.first + r / group + 1 - block.begin;
    const int count = visible < keys ? static_cast<int>(visible) : keys;
    float* row = scores + r * kKeyBlock;
    if (count > 0) {
      exponentiate(row, count, out.max + r, out.sum + r);
    } else {
      out.max[r] = -__builtin_inff();
      out.sum[r] = 0;
      for (int i = 0; i < keys; ++i) row[i] = 0;
    }
  }
  for (ptrdiff_t i = 0; i < static_cast<ptrdiff_t>(queries) * width; ++i) out.weighted[i] = 0;
  for (int key = 0; key < keys; key += kKeyTile) {
    const int count = keys - key < kKeyTile ? keys - key : kKeyTile;
    cache_load(call, call.values, block.kv_head, block.begin + key, count, count, tile);
    int r = 0;
    for (; r + kQueries <= queries; r += kQueries) {
      weigh_tile<kQueries>(scores + r * kKeyBlock + key, tile, count, width,
                           out.weighted + r * width);
    }
    for (; r < queries; ++r) {
      weigh_tile<1>(scores + r * kKeyBlock + key, tile, count, width, out.weighted + r * width);
    }
  }
}

void attention_merge(int queries, int head_dim, const AttentionPartial& into,
                     const AttentionPartial& from) {
  const int width = padded(head_dim);
  for (int r = 0; r < queries; ++r) {
    if (from.sum[r] == 0) continue;  // none of the block's keys is visible to this query
    const float max = into.max[r] > from.max[r] ? into.max[r] : from.max[r];
    const float keep = exponential(splat(into.max[r] - max))[0];
    const float join = exponential(splat(from.max[r] - max))[0];
    into.max[r] = max;
    into.sum[r] = into.sum[r] * keep + from.sum[r] * join;
    float* to = into.weighted + static_cast<ptrdiff_t>(r) * width;
    const float* other = from.weighted + static_cast<ptrdiff_t>(r) * width;
    for (int i = 0; i < width; i += kLanes) {
      store(to + i, multiply_add(load(other + i), splat(join), load(to + i) * keep));
    }
  }
}

void attention_finish(const AttentionCall& call, const AttentionBlock& block,
                      const AttentionPartial& partial) {
  const int dim = call.head_dim, width = padded(dim), group = call.heads / call.kv_heads;
  const int queries = (block.last - block.first) * group;
  for (int r = 0; r < queries; ++r) {
    const ptrdiff_t token = block.first + r / group;
    const ptrdiff_t row = token * call.heads + block.kv_head * group + r % group;
    const float* gate = call.q_gate + row * 2 * dim + dim;
    const float* weighted = partial.weighted + static_cast<ptrdiff_t>(r) * width;
    float* out = call.out + row * dim;
    const float scale = 1.0f / partial.sum[r];
    for (int i = 0; i < dim; i += kLanes) {
      store(out + i, load(weighted + i) * scale * sigmoid(load(gate + i, dim - i)), dim - i);
    }
  }
}
