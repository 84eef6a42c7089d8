// The gated delta rule, token by token. The columns of a head's state are independent, so a block
// of them stays in the nearest cache for a run of tokens.
#pragma once

#include "backend/cpu/elementwise.inl"
#include "backend/cpu/simd.inl"

// x / sqrt(Σ x² + 1e-6) * scale, zero-padded to a whole number of vectors.
FLASHMOE_INLINE void l2_norm(const float* x, int width, float scale, float* out) {
  Floats squares = {};
  for (int i = 0; i < width; i += kLanes) {
    const Floats value = load(x + i, width - i);
    squares = multiply_add(value, value, squares);
  }
  const float factor = scale / __builtin_sqrtf(sum(squares) + 1e-6f);
  for (int i = 0; i < width; i += kLanes) store(out + i, load(x + i, width - i) * factor);
}

FLASHMOE_INLINE float dot(const float* a, const float* b, int width) {
  Floats total = {};
  for (int i = 0; i < width; i += kLanes) total = multiply_add(load(a + i), load(b + i), total);
  return sum(total);
}

struct DeltaToken {
  float decay;  // exp(g)
  float beta;
  float key_query;  // k · q
};

// One token on kDeltaColumns columns of the state, whose rows are `stride` apart, with
// o = S_new^T q written as decay S^T q + (k · q) d so that the state is read once for both sums.
// `state_out` may be `state`; with Stream it is written past the caches, and the columns at `next`,
// of which nothing is near yet, are asked for.
template <bool Stream>
FLASHMOE_INLINE void delta_step(int key_dim, const DeltaToken& token, const float* k,
                                const float* q, const float* v, ptrdiff_t stride,
                                const float* state, float* state_out, float* out,
                                const float* next) {
  constexpr int kVectors = kDeltaColumns / kLanes;
  Floats by_key[kVectors] = {}, by_query[kVectors] = {};
  for (int i = 0; i < key_dim; ++i) {
    const Floats key = splat(k[i]), query = splat(q[i]);
    for (int c = 0; c < kVectors; ++c) {
      const Floats s = load(state + i * stride + c * kLanes);
      by_key[c] = multiply_add(s, key, by_key[c]);
      by_query[c] = multiply_add(s, query, by_query[c]);
    }
  }
  Floats d[kVectors];
  for (int c = 0; c < kVectors; ++c) {
    d[c] = (load(v + c * kLanes) - by_key[c] * token.decay) * token.beta;
    store(out + c * kLanes, by_query[c] * token.decay + d[c] * token.key_query);
  }
  for (int i = 0; i < key_dim; ++i) {
    const Floats key = splat(k[i]);
    for (int c = 0; c < kVectors; ++c) {
      const ptrdiff_t at = i * stride + c * kLanes;
      const Floats s = multiply_add(key, d[c], load(state + at) * token.decay);
      if constexpr (Stream) {
        if (c * kLanes % 16 == 0) prefetch_far(next + at);
        stream(state_out + at, s);
      } else {
        store(state_out + at, s);
      }
    }
  }
}

// norm * o / rms(o) * silu(z)
FLASHMOE_INLINE void norm_gated(int width, const float* o, const float* norm, const float* z,
                                float eps, float* out) {
  rms_norm(width, o, norm, eps, out);
  for (int i = 0; i < width; i += kLanes) {
    const int count = width - i;
    store(out + i, load(out + i, count) * silu(load(z + i, count)), count);
  }
}

void gated_delta(int n, const DeltaCall& call, int head, float* scratch) {
  const int key_dim = call.key_dim, value_dim = call.value_dim;
  const ptrdiff_t key_width = static_cast<ptrdiff_t>(call.key_heads) * key_dim;
  const ptrdiff_t value_width = static_cast<ptrdiff_t>(call.value_heads) * value_dim;
  const ptrdiff_t key_offset =
      static_cast<ptrdiff_t>(head / (call.value_heads / call.key_heads)) * key_dim;
  const ptrdiff_t value_offset = static_cast<ptrdiff_t>(head) * value_dim;
  const float query_scale = 1.0f / __builtin_sqrtf(static_cast<float>(key_dim));

  const int keys = padded(key_dim), values = padded(value_dim) + kDeltaColumns;
  float* queries = scratch;
  float* normed_keys = queries + kDeltaTokens * keys;
  float* outputs = normed_keys + kDeltaTokens * keys;
  float* state = outputs + kDeltaTokens * values;
  DeltaToken tokens[kDeltaTokens];

  const float* state_in = call.state_in + value_offset * key_dim;
  float* state_out = call.state_out + value_offset * key_dim;
  for (int first = 0; first < n; first += kDeltaTokens) {
    const int run = n - first < kDeltaTokens ? n - first : kDeltaTokens;
    for (int i = 0; i < run; ++i) {
      const ptrdiff_t t = first + i;
      const float* qkv = call.qkv + t * (2 * key_width + value_width);
      float* q = queries + i * keys;
      float* k = normed_keys + i * keys;
      l2_norm(qkv + key_offset, key_dim, query_scale, q);
      l2_norm(qkv + key_width + key_offset, key_dim, 1.0f, k);
      const float x = call.a[t * call.value_heads + head] + call.dt_bias[head];
      const float softplus = x > 20.0f ? x : ::log1pf(::expf(x));
      tokens[i].decay = ::expf(-::expf(call.a_log[head]) * softplus);
      tokens[i].beta = 1.0f / (1.0f + ::expf(-call.b[t * call.value_heads + head]));
      tokens[i].key_query = dot(k, q, key_dim);
    }
    for (int column = 0; column < value_dim; column += kDeltaColumns) {
      const int count = value_dim - column < kDeltaColumns ? value_dim - column : kDeltaColumns;
      if (n == 1 && count == kDeltaColumns) {
        const float* v = call.qkv + 2 * key_width + value_offset + column;
        const bool last = column + kDeltaColumns >= value_dim;
        const float* next = state_in + (last ? key_dim * value_dim : column + kDeltaColumns);
        delta_step<true>(key_dim, tokens[0], normed_keys, queries, v, value_dim, state_in + column,
                         state_out + column, outputs + column, next);
        continue;
      }
      for (int i = 0; i < key_dim; ++i) {
        for (int c = 0; c < kDeltaColumns; c += kLanes) {
          store(state + i * kDeltaColumns + c,
                load(state_in + static_cast<ptrdiff_t>(i) * value_dim + column + c, count - c));
        }
      }
      for (int i = 0; i < run; ++i) {
        const float* v =
            call.qkv + (first + i) * (2 * key_width + value_width) + 2 * key_width + value_offset;
        float value[kDeltaColumns];
        for (int c = 0; c < kDeltaColumns; c += kLanes) {
          store(value + c, load(v + column + c, count - c));
        }
        delta_step<false>(key_dim, tokens[i], normed_keys + i * keys, queries + i * keys, value,
                          kDeltaColumns, state, state, outputs + i * values + column, nullptr);
      }
      for (int i = 0; i < key_dim; ++i) {
        for (int c = 0; c < count; c += kLanes) {
          store(state_out + static_cast<ptrdiff_t>(i) * value_dim + column + c,
                load(state + i * kDeltaColumns + c), count - c);
        }
      }
    }
    state_in = state_out;
    for (int i = 0; i < run; ++i) {
      const ptrdiff_t at = (first + i) * value_width + value_offset;
      norm_gated(value_dim, outputs + i * values, call.norm, call.z + at, call.norm_eps,
                 call.out + at);
    }
  }
  fence_streams();
}
