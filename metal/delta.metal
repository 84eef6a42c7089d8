// GatedDeltaNet: the causal convolution and the gated delta rule.
#include "common.h"

// One thread a channel, which it follows through the tokens.
KERNEL(causal_conv, kConvThreads)(constant ConvArguments& args [[buffer(0)]],
                                  uint3 position [[thread_position_in_grid]]) {
  device float* x = args.x;
  device const float* weight = args.weight;
  device const float* state_in = args.state_in;
  device float* state_out = args.state_out;
  const uint channel = position.x;
  if (channel >= args.channels) return;
  enum : uint { kConvTokens = 8 };
  // The taps end at index kMaxConvTaps - 1, so that indices stay known to the compiler.
  const uint unused = kMaxConvTaps - args.taps;
  float tap[kMaxConvTaps], before[kMaxConvTaps];
#pragma unroll
  for (uint k = 0; k < kMaxConvTaps; ++k) {
    tap[k] = k < unused ? 0.0f : weight[ulong(k - unused) * args.channels + channel];
    before[k] = k <= unused ? 0.0f : state_in[ulong(k - unused - 1) * args.channels + channel];
  }
  const float4 older_taps = float4(tap[0], tap[1], tap[2], tap[3]);
  const float4 newer_taps = float4(tap[4], tap[5], tap[6], tap[7]);
  float4 older = float4(before[0], before[1], before[2], before[3]);
  float4 newer = float4(before[4], before[5], before[6], before[7]);
  for (uint first = 0; first < args.tokens; first += kConvTokens) {
    float inputs[kConvTokens];  // loaded together, so that their latencies overlap
#pragma unroll
    for (uint i = 0; i < kConvTokens; ++i) {
      const uint t = min(first + i, args.tokens - 1);
      inputs[i] = x[ulong(t) * args.channels + channel];
    }
#pragma unroll
    for (uint i = 0; i < kConvTokens; ++i) {
      if (first + i >= args.tokens) continue;
      older = float4(older.y, older.z, older.w, newer.x);
      newer = float4(newer.y, newer.z, newer.w, inputs[i]);
      const float sum = dot(older_taps, older) + dot(newer_taps, newer);
      x[ulong(first + i) * args.channels + channel] = silu(sum);
    }
  }
#pragma unroll
  for (uint k = 1; k < kMaxConvTaps; ++k) {
    if (k <= unused) continue;
    state_out[ulong(k - unused - 1) * args.channels + channel] = pick(k < 4 ? older : newer, k % 4);
  }
}

// log(1 + y) for y >= 0, exact where 1 + y loses y (Kahan).
INLINE float log1p_positive(float y) {
  const float u = 1.0f + y;
  return u == 1.0f ? y : log(u) * (y / (u - 1.0f));
}

// One threadgroup a value head. A thread keeps a quarter of one column of the state, 32 of its
// elements, in registers through all tokens; the four threads of a column add up in threadgroup
// memory. o = S_new^T q is taken as decay S^T q + (k . q) d, so that a token needs one barrier.
KERNEL(gated_delta, kDeltaThreads)(constant DeltaArguments& args [[buffer(0)]],
                                   uint3 group [[threadgroup_position_in_grid]],
                                   uint thread_index [[thread_index_in_threadgroup]],
                                   uint simdgroup [[simdgroup_index_in_threadgroup]],
                                   uint lane [[thread_index_in_simdgroup]]) {
  device const float* qkv = args.qkv;
  device const float* z = args.z;
  device const float* a = args.a;
  device const float* b = args.b;
  device const float* a_log = args.a_log;
  device const float* dt_bias = args.dt_bias;
  device const float* norm = args.norm;
  device const float* state_in = args.state_in;
  device float* state_out = args.state_out;
  device float* out = args.out;
  enum : uint { kPartRows = kMaxDeltaDim / kDeltaParts };
  // Normed queries and keys by (part, row of the part), zero past key_dim.
  THREADGROUP_ARRAY(float4, queries, [kDeltaTokens * kMaxDeltaDim / 4]);
  THREADGROUP_ARRAY(float4, keys, [kDeltaTokens * kMaxDeltaDim / 4]);
  THREADGROUP_ARRAY(float, key_queries, [kDeltaTokens]);
  THREADGROUP_ARRAY(float, decays, [kDeltaTokens]);
  THREADGROUP_ARRAY(float, betas, [kDeltaTokens]);
  // Two tokens' sums, so that one may be read while the next is written.
  THREADGROUP_ARRAY(float, by_key, [2 * kDeltaParts * kMaxDeltaDim]);
  THREADGROUP_ARRAY(float, by_query, [2 * kDeltaParts * kMaxDeltaDim]);
  THREADGROUP_ARRAY(float, outputs, [kDeltaTokens * kMaxDeltaDim]);

  const uint key_dim = args.key_dim, value_dim = args.value_dim;
  const uint width = delta_threads(value_dim) / kDeltaParts;
  const uint simdgroups = delta_threads(value_dim) / kSimdWidth;
  const uint column = thread_index % width, part = thread_index / width;
  const bool used = column < value_dim;
  const uint rows = key_dim / kDeltaParts;
  const uint head = group.x, key_head = head / (args.value_heads / args.key_heads);
  const uint key_width = args.key_heads * key_dim, value_width = args.value_heads * value_dim;
  const uint qkv_width = 2 * key_width + value_width;
  const float a_factor = exp(a_log[head]), bias = dt_bias[head];
  const ulong state_at = (ulong(head) * key_dim + part * rows) * value_dim + column;

  float4 state[kPartRows / 4];
#pragma unroll
  for (uint i = 0; i < kPartRows / 4; ++i) {
    float s[4];
#pragma unroll
    for (uint j = 0; j < 4; ++j) {
      const uint row = 4 * i + j;
      s[j] = used && row < rows ? state_in[state_at + ulong(row) * value_dim] : 0.0f;
    }
    state[i] = float4(s[0], s[1], s[2], s[3]);
  }

  for (uint first = 0; first < args.tokens; first += kDeltaTokens) {
    const uint count = min(args.tokens - first, uint(kDeltaTokens));
    for (uint i = simdgroup; i < count; i += simdgroups) {
      const uint t = first + i;
      device const float* q = qkv + ulong(t) * qkv_width + key_head * key_dim;
      device const float* k = q + key_width;
      float qq = 0, kk = 0, kq = 0;
      for (uint r = lane; r < key_dim; r += kSimdWidth) {
        qq = fma(q[r], q[r], qq);
        kk = fma(k[r], k[r], kk);
        kq = fma(k[r], q[r], kq);
      }
      qq = simd_sum(qq);
      kk = simd_sum(kk);
      kq = simd_sum(kq);
      const float q_scale = 1.0f / sqrt((qq + 1e-6f) * float(key_dim));
      const float k_scale = 1.0f / sqrt(kk + 1e-6f);
      for (uint to = lane; to < kMaxDeltaDim; to += kSimdWidth) {
        const uint row = to % kPartRows, from = to / kPartRows * rows + row;
        ((threadgroup float*)queries)[i * kMaxDeltaDim + to] =
            row < rows ? q[from] * q_scale : 0.0f;
        ((threadgroup float*)keys)[i * kMaxDeltaDim + to] = row < rows ? k[from] * k_scale : 0.0f;
      }
      if (lane == 0) {
        const float x = a[ulong(t) * args.value_heads + head] + bias;
        const float softplus = x > 20.0f ? x : log1p_positive(exp(x));
        key_queries[i] = kq * q_scale * k_scale;
        decays[i] = exp(-a_factor * softplus);
        betas[i] = sigmoid(b[ulong(t) * args.value_heads + head]);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    for (uint i = 0; i < count; ++i) {
      threadgroup const float4* q = queries + (i * kMaxDeltaDim + part * kPartRows) / 4;
      threadgroup const float4* k = keys + (i * kMaxDeltaDim + part * kPartRows) / 4;
      const ulong v = ulong(first + i) * qkv_width + 2 * key_width + head * value_dim + column;
      const float value = used ? qkv[v] : 0.0f;  // early, for it takes long
      float key_sum = 0, query_sum = 0;
#pragma unroll
      for (uint r = 0; r < kPartRows / 4; ++r) {
        key_sum += dot(state[r], k[r]);
        query_sum += dot(state[r], q[r]);
      }
      const uint side = i % 2 * kDeltaParts * kMaxDeltaDim;
      by_key[side + part * kMaxDeltaDim + column] = key_sum;
      by_query[side + part * kMaxDeltaDim + column] = query_sum;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      key_sum = query_sum = 0;
      for (uint p = 0; p < kDeltaParts; ++p) {
        key_sum += by_key[side + p * kMaxDeltaDim + column];
        query_sum += by_query[side + p * kMaxDeltaDim + column];
      }
      const float decay = decays[i];
      const float d = used ? (value - decay * key_sum) * betas[i] : 0.0f;
#pragma unroll
      for (uint r = 0; r < kPartRows / 4; ++r) state[r] = fma(k[r], float4(d), state[r] * decay);
      if (part == 0) outputs[i * kMaxDeltaDim + column] = decay * query_sum + key_queries[i] * d;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    for (uint i = simdgroup; i < count; i += simdgroups) {
      threadgroup const float* o = outputs + i * kMaxDeltaDim;
      float squares = 0;
      for (uint c = lane; c < value_dim; c += kSimdWidth) squares = fma(o[c], o[c], squares);
      const float scale = 1.0f / sqrt(simd_sum(squares) / float(value_dim) + args.norm_eps);
      for (uint c = lane; c < value_dim; c += kSimdWidth) {
        const ulong at = ulong(first + i) * value_width + head * value_dim + c;
        out[at] = norm[c] * (o[c] * scale) * silu(z[at]);
      }
    }
  }

  if (!used) return;
#pragma unroll
  for (uint i = 0; i < kPartRows / 4; ++i) {
    const float s[4] = {state[i].x, state[i].y, state[i].z, state[i].w};
#pragma unroll
    for (uint j = 0; j < 4; ++j) {
      const uint row = 4 * i + j;
      if (row < rows) state_out[state_at + ulong(row) * value_dim] = s[j];
    }
  }
}
