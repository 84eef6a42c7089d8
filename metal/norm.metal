// The norm before a mixer or the experts, and the sum of the experts' outputs.
#include "common.h"

// One threadgroup a token.
KERNEL(rms_norm, kNormThreads)(constant NormArguments& args [[buffer(0)]],
                               uint3 group [[threadgroup_position_in_grid]],
                               uint thread_index [[thread_index_in_threadgroup]],
                               uint simdgroup [[simdgroup_index_in_threadgroup]],
                               uint lane [[thread_index_in_simdgroup]]) {
  device const float* x = args.x;
  device const float* weight = args.weight;
  device float* out = args.out;
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
KERNEL(combine, kCombineThreads)(constant CombineArguments& args [[buffer(0)]],
                                 uint3 group [[threadgroup_position_in_grid]],
                                 uint thread_index [[thread_index_in_threadgroup]],
                                 uint simdgroup [[simdgroup_index_in_threadgroup]],
                                 uint lane [[thread_index_in_simdgroup]]) {
  device const float* expert_out = args.expert_out;
  device const float* expert_weights = args.expert_weights;
  device const float* shared_out = args.shared_out;
  device const float* shared_gate = args.shared_gate;
  device float* x = args.x;
  device const float* norm_weight = args.norm_weight;
  device float* normed = args.normed;
  THREADGROUP_ARRAY(float, partial, [kCombineThreads / kSimdWidth]);
  const uint token = group.x;
  const ulong row = ulong(token) * args.hidden;
  const ulong pair = ulong(token) * args.experts_per_token;
  const float shared_weight = sigmoid(shared_gate[token]);
  float squares = 0;
  for (uint i = thread_index; i < args.hidden; i += kCombineThreads) {
    float total = x[row + i];
#pragma unroll 5
    for (uint j = 0; j < args.experts_per_token; ++j) {
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
