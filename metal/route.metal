// Which experts a token goes to: softmax over all experts, then the largest.
#include "common.h"

// One simdgroup a token. A lane looks after experts lane, lane + 32, ...: it alone reads and
// strikes out their logits. Lane j keeps the j-th choice.
KERNEL(route, kSimdWidth)(constant RouteArguments& args [[buffer(0)]],
                          uint3 group [[threadgroup_position_in_grid]],
                          uint lane [[thread_index_in_simdgroup]]) {
  device const float* logits = args.logits;
  device int* ids = args.ids;
  device float* weights = args.weights;
  THREADGROUP_ARRAY(float, left, [kMaxRouted]);
  const uint token = group.x;
  float top = -INFINITY;
  bool finite = true;
  for (uint e = lane; e < args.experts; e += kSimdWidth) {
    left[e] = logits[ulong(token) * args.experts + e];
    top = max(top, left[e]);
    finite = finite && isfinite(left[e]);
  }
  const uint every = simd_min(finite ? 1u : 0u);
  if (lane == 0) args.finite[token] = int(every);
  top = simd_max(top);
  float total = 0;
  for (uint e = lane; e < args.experts; e += kSimdWidth) total += exp(left[e] - top);
  total = simd_sum(total);

  uint mine = 0;
  float weight = 0;
  for (uint j = 0; j < args.experts_per_token; ++j) {
    float best = -INFINITY;
    uint at = 0;
    for (uint e = lane; e < args.experts; e += kSimdWidth) {
      if (left[e] > best) {
        best = left[e];
        at = e;
      }
    }
    const float highest = simd_max(best);
    // Where logits are not numbers nothing is found: any valid id will do, the host refuses them.
    const uint chosen = min(simd_min(best == highest ? at : args.experts - 1), args.experts - 1);
    if (chosen % kSimdWidth == lane) left[chosen] = -INFINITY;
    if (j == lane) {
      mine = chosen;
      weight = exp(highest - top);
    }
  }
  // The softmax's own sum cancels where the weights are divided by theirs.
  const float sum = simd_sum(weight);
  if (lane >= args.experts_per_token) return;
  ids[ulong(token) * args.experts_per_token + lane] = int(mine);
  weights[ulong(token) * args.experts_per_token + lane] =
      weight / (args.renormalise != 0 ? sum : total);
}

// One simdgroup a row.
KERNEL(all_finite, kSimdWidth)(constant FiniteArguments& args [[buffer(0)]],
                               uint3 group [[threadgroup_position_in_grid]],
                               uint lane [[thread_index_in_simdgroup]]) {
  device const float* x = args.x + ulong(group.x) * args.width;
  bool finite = true;
  for (uint i = lane; i < args.width; i += kSimdWidth) finite = finite && isfinite(x[i]);
  const uint every = simd_min(finite ? 1u : 0u);
  if (lane == 0) args.finite[group.x] = int(every);
}
