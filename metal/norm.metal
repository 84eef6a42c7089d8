// The norm before a mixer or the experts, and the sum of the experts' outputs.
#include "common.h"

// One threadgroup a token.
kernel void rms_norm(
    device const float* x [[buffer(kNormX)]], device const float* weight [[buffer(kNormWeight)]],
    device float* out [[buffer(kNormOut)]], constant NormArguments& args [[buffer(kNormArguments)]],
    uint3 group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  THREADGROUP_ARRAY(float, partial, [kNormThreads / kSimdWidth]);
  const ulong row = ulong(group.x) * args.width;
  float squares = 0;
  for (uint i = thread_index; i < args.width; i += kNormThreads) {
    squares = fma(x[row + i], x[row + i], squares);
  }
  const float total = group_sum(squares, partial, kNormThreads / kSimdWidth, simdgroup, lane);
  const float scale = 1.0f / sqrt(total / float(args.width) + args.eps);
  for (uint i = thread_index; i < args.width; i += kNormThreads) {
    out[row + i] = x[row + i] * scale * weight[i];
  }
}

// One threadgroup a token: routed and shared experts join the residual stream, which is then normed
// for the next layer where that is asked for.
kernel void combine(device const float* expert_out [[buffer(kCombineExpertOut)]],
                    device const float* expert_weights [[buffer(kCombineExpertWeights)]],
                    device const float* shared_out [[buffer(kCombineSharedOut)]],
                    device const float* shared_gate [[buffer(kCombineSharedGate)]],
                    device float* x [[buffer(kCombineX)]],
                    device const float* norm_weight [[buffer(kCombineNormWeight)]],
                    device float* normed [[buffer(kCombineNormed)]],
                    constant CombineArguments& args [[buffer(kCombineArguments)]],
                    uint3 group [[threadgroup_position_in_grid]],
                    uint thread_index [[thread_index_in_threadgroup]],
                    uint simdgroup [[simdgroup_index_in_threadgroup]],
                    uint lane [[thread_index_in_simdgroup]]) {
  THREADGROUP_ARRAY(float, partial, [kCombineThreads / kSimdWidth]);
  const uint token = group.x;
  const ulong row = ulong(token) * args.hidden;
  const ulong pair = ulong(token) * args.top_k;
  const float shared_weight = sigmoid(shared_gate[token]);
  float squares = 0;
  for (uint i = thread_index; i < args.hidden; i += kCombineThreads) {
    float total = x[row + i];
#pragma unroll 5
    for (uint j = 0; j < args.top_k; ++j) {
      total = fma(expert_weights[pair + j], expert_out[(pair + j) * args.hidden + i], total);
    }
    total = fma(shared_weight, shared_out[row + i], total);
    x[row + i] = total;
    squares = fma(total, total, squares);
  }
  if (args.norm == 0) return;
  const float sum = group_sum(squares, partial, kCombineThreads / kSimdWidth, simdgroup, lane);
  const float scale = 1.0f / sqrt(sum / float(args.hidden) + args.eps);
  for (uint i = thread_index; i < args.hidden; i += kCombineThreads) {
    normed[row + i] = x[row + i] * scale * norm_weight[i];
  }
}
