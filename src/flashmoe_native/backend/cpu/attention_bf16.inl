// Attention over a bfloat16 cache by AVX-512 BF16: vdpbf16ps adds two products of bfloat16 pairs to
// each float32 lane. Queries and weights are rounded to bfloat16 as keys and values are; a block's
// sum is that of the rounded weights, so they still add up to one. Otherwise as attention.inl.
#pragma once

#include "backend/cpu/simd.inl"
#include "backend/cpu/softmax.inl"
#include "backend/cpu/transpose_avx512.inl"

// Queries whose sums, for two vectors of keys or columns, fit into registers.
constexpr int kManyQueries = 8;
constexpr int kHalves = 32;  // bfloat16 values of a vector

FLASHMOE_INLINE __m512 dot_pairs(__m512 sums, __m512i pairs, __m512i pair) {
  return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(pairs),
                          reinterpret_cast<__m512bh>(pair));
}

// `count` floats (a multiple of 16) rounded to bfloat16; `to` may begin where `from` does.
FLASHMOE_INLINE void round_halves(const float* from, int count, uint16_t* to) {
  for (int i = 0; i < count; i += kLanes) {
    const __m256bh halves = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
    __builtin_memcpy(to + i, &halves, sizeof halves);
  }
}

// The first `count` (at most kHalves) values of a cached row, the others zero.
FLASHMOE_INLINE __m512i load_halves(const uint16_t* row, int count) {
  if (count >= kHalves) return _mm512_loadu_si512(row);
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint32_t{1} << count) - 1), row);
}

// The tile of keys or values that is needed after this one comes from memory into the second-level
// cache while products are computed, 128 bytes at each step of them. Null asks for nothing.
FLASHMOE_INLINE void prefetch_step(const uint16_t* next, int step) {
  if (next == nullptr) return;
  const auto* line = reinterpret_cast<const char*>(next) + 128 * static_cast<ptrdiff_t>(step);
  prefetch_far(line);
  prefetch_far(line + 64);
}

// `count` keys, as pairs of dimensions: tile[pair][kKeyTile], zero past the last key.
FLASHMOE_INLINE void pack_keys(const uint16_t* keys, int count, int dim, uint32_t* tile) {
  for (int first = 0; first < kKeyTile; first += kLanes) {
    for (int i = 0; i < dim; i += kHalves) {
      Ints rows[kLanes];
      for (int key = 0; key < kLanes; ++key) {
        const bool there = first + key < count;
        const uint16_t* row = keys + (first + key) * dim;
        rows[key] = there ? reinterpret_cast<Ints>(load_halves(row + i, dim - i)) : Ints{};
      }
      transpose(rows);
      const int pairs = (padded(dim) - i) / 2 < kLanes ? (padded(dim) - i) / 2 : kLanes;
      for (int pair = 0; pair < pairs; ++pair) {
        __builtin_memcpy(tile + (i / 2 + pair) * kKeyTile + first, &rows[pair], sizeof rows[pair]);
      }
    }
  }
}

// `count` values, as pairs of positions: tile[pair][padded(dim)], zero past the last value.
FLASHMOE_INLINE void pack_values(const uint16_t* values, int count, int dim, uint32_t* tile) {
  const int width = padded(dim);
  alignas(64) static constexpr auto kOrder = [] {
    std::array<uint16_t, 2 * kHalves> order{};
    for (uint16_t i = 0; i < kHalves; ++i) {
      order[2 * i] = i;
      order[2 * i + 1] = kHalves + i;
    }
    return order;
  }();
  const __m512i low = _mm512_load_si512(kOrder.data());
  const __m512i high = _mm512_load_si512(kOrder.data() + kHalves);
  for (int j = 0; j < count; j += 2) {
    const uint16_t* row = values + j * dim;
    uint32_t* to = tile + j / 2 * width;
    for (int i = 0; i < width; i += kHalves) {
      const __m512i a = load_halves(row + i, dim - i);
      const __m512i b = j + 1 < count ? load_halves(row + dim + i, dim - i) : __m512i{};
      _mm512_storeu_si512(to + i, _mm512_permutex2var_epi16(a, low, b));
      if (width - i > kLanes) {
        _mm512_storeu_si512(to + i + kLanes, _mm512_permutex2var_epi16(a, high, b));
      }
    }
  }
}

// scores[query][key] = q[query] · keys[key] * scale for Q queries and a tile of keys.
template <int Q>
FLASHMOE_INLINE void score_pairs(const uint32_t* q, const uint32_t* tile, int pairs, float scale,
                                 float* scores, const uint16_t* next) {
  constexpr int kVectors = kKeyTile / kLanes;
  __m512 acc[Q][kVectors] = {};
  for (int pair = 0; pair < pairs; ++pair) {
    prefetch_step(next, pair);
    __m512i keys[kVectors];
    for (int c = 0; c < kVectors; ++c) {
      keys[c] = _mm512_loadu_si512(tile + pair * kKeyTile + c * kLanes);
    }
    for (int r = 0; r < Q; ++r) {
      const __m512i query = _mm512_set1_epi32(static_cast<int>(q[r * pairs + pair]));
      for (int c = 0; c < kVectors; ++c) acc[r][c] = dot_pairs(acc[r][c], keys[c], query);
    }
  }
  for (int r = 0; r < Q; ++r) {
    for (int c = 0; c < kVectors; ++c) {
      store(scores + r * kKeyBlock + c * kLanes, reinterpret_cast<Floats>(acc[r][c]) * scale);
    }
  }
}

// weighted[query] += Σ p[query] values for Q queries and V vectors of columns; p[query] is the
// pairs of a row of weights that meet the tile, `pairs` of them.
template <int Q, int V>
FLASHMOE_INLINE void weigh_pairs(const uint32_t* p, const uint32_t* tile, int pairs, int width,
                                 float* weighted, const uint16_t* next) {
  __m512 acc[Q][V];
  for (int r = 0; r < Q; ++r) {
    for (int c = 0; c < V; ++c) acc[r][c] = _mm512_loadu_ps(weighted + r * width + c * kLanes);
  }
  for (int pair = 0; pair < pairs; ++pair) {
    prefetch_step(next, pair);
    __m512i values[V];
    for (int c = 0; c < V; ++c) values[c] = _mm512_loadu_si512(tile + pair * width + c * kLanes);
    for (int r = 0; r < Q; ++r) {
      const __m512i weight = _mm512_set1_epi32(static_cast<int>(p[r * kKeyBlock + pair]));
      for (int c = 0; c < V; ++c) acc[r][c] = dot_pairs(acc[r][c], values[c], weight);
    }
  }
  for (int r = 0; r < Q; ++r) {
    for (int c = 0; c < V; ++c) _mm512_storeu_ps(weighted + r * width + c * kLanes, acc[r][c]);
  }
}

template <int Q>
FLASHMOE_INLINE void weigh_rows(const uint32_t* p, const uint32_t* tile, int pairs, int width,
                                float* weighted, const uint16_t* next) {
  const auto part_of = [next](int column) { return next ? next + column * kKeyTile : next; };
  int i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    weigh_pairs<Q, 2>(p, tile + i, pairs, width, weighted + i, part_of(i));
  }
  if (i < width) weigh_pairs<Q, 1>(p, tile + i, pairs, width, weighted + i, part_of(i));
}

// Calls run(first query, how many as a constant) for all of them, many at a time.
template <class Run>
FLASHMOE_INLINE void for_queries(int queries, const Run& run) {
  int r = 0;
  for (; r + kManyQueries <= queries; r += kManyQueries) {
    run(r, std::integral_constant<int, kManyQueries>{});
  }
  for (; r + 4 <= queries; r += 4) run(r, std::integral_constant<int, 4>{});
  for (; r < queries; ++r) run(r, std::integral_constant<int, 1>{});
}

void attention_block_bf16(const AttentionCall& call, const AttentionBlock& block, const float* q,
                          const AttentionPartial& out, float* scratch) {
  const int dim = call.head_dim, width = padded(dim), group = call.heads / call.kv_heads;
  const int queries = (block.last - block.first) * group;
  const int keys = static_cast<int>(block.end - block.begin);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(dim));
  const int64_t first_cell = (block.kv_head * call.capacity + block.begin) * dim;
  const auto* key_rows = reinterpret_cast<const uint16_t*>(call.keys) + first_cell;
  const auto* value_rows = reinterpret_cast<const uint16_t*>(call.values) + first_cell;
  float* scores = scratch;  // [queries, kKeyBlock]
  auto* tile = reinterpret_cast<uint32_t*>(scores + static_cast<ptrdiff_t>(queries) * kKeyBlock);
  uint32_t* pairs = tile + kKeyTile / 2 * width;  // of the queries, [queries, width / 2]
  for (int r = 0; r < queries; ++r) {
    const ptrdiff_t token = block.first + r / group;
    const ptrdiff_t row = token * call.heads + block.kv_head * group + r % group;
    round_halves(q + row * width, width, reinterpret_cast<uint16_t*>(pairs + r * (width / 2)));
  }

  for (int key = 0; key < keys; key += kKeyTile) {
    const int count = keys - key < kKeyTile ? keys - key : kKeyTile;
    const uint16_t* next = key + kKeyTile < keys
                               ? key_rows + static_cast<ptrdiff_t>(key + kKeyTile) * dim
                               : value_rows;
    pack_keys(key_rows + static_cast<ptrdiff_t>(key) * dim, count, dim, tile);
    for_queries(queries, [&](int r, auto many) __attribute__((always_inline)) {
      score_pairs<many.value>(pairs + r * (width / 2), tile, width / 2, scale,
                              scores + r * kKeyBlock + key, r == 0 ? next : nullptr);
    });
  }
  for (int r = 0; r < queries; ++r) {
    const int64_t visible = call.position + block.first + r / group + 1 - block.begin;
    const int count = visible < keys ? static_cast<int>(visible) : keys;
    float* row = scores + r * kKeyBlock;
    if (count > 0) {
      exponentiate(row, count, out.max + r, out.sum + r);
      auto* rounded = reinterpret_cast<uint16_t*>(row);  // over their own first half
      round_halves(row, kKeyBlock, rounded);
      Floats sums = {};
      for (int i = 0; i < kKeyBlock; i += kHalves) {
        const auto both = reinterpret_cast<Ints>(_mm512_loadu_si512(rounded + i));
        sums += reinterpret_cast<Floats>(both << 16);
        sums += reinterpret_cast<Floats>(both & static_cast<int>(0xffff0000u));
      }
      out.sum[r] = sum(sums);
    } else {
      out.max[r] = -__builtin_inff();
      out.sum[r] = 0;
      for (int i = 0; i < kKeyBlock; i += kLanes) store(row + i, Floats{});
    }
  }
  for (ptrdiff_t i = 0; i < static_cast<ptrdiff_t>(queries) * width; ++i) out.weighted[i] = 0;
  for (int key = 0; key < keys; key += kKeyTile) {
    const int count = keys - key < kKeyTile ? keys - key : kKeyTile;
    const uint16_t* next =
        (key + kKeyTile < keys ? value_rows + static_cast<ptrdiff_t>(key + kKeyTile) * dim
                               : key_rows + static_cast<ptrdiff_t>(keys) * dim);
    pack_values(value_rows + static_cast<ptrdiff_t>(key) * dim, count, dim, tile);
    for_queries(queries, [&](int r, auto many) __attribute__((always_inline)) {
      const auto* weights = reinterpret_cast<const uint32_t*>(scores + r * kKeyBlock) + key / 2;
      weigh_rows<many.value>(weights, tile, (count + 1) / 2, width, out.weighted + r * width,
                             r == 0 ? next : nullptr);
    });
  }
}
