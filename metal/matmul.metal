// Products with many tokens: a threadgroup takes a tile of rows and tokens.
#include "products.h"
#include "tiles.h"

KERNEL(matmul, kTileThreads)(constant ProductArguments& args [[buffer(0)]],
                             uint3 group [[threadgroup_position_in_grid]],
                             uint thread_index [[thread_index_in_threadgroup]]) {
  device const float* x = args.x;
  THREADGROUP_ARRAY(float4, weights, [kTileColumns * kWeightPitch / 4]);
  THREADGROUP_ARRAY(float4, xs, [kTileColumns * kInputPitch / 4]);
  const Product product = select_product(args, group.x);
  const uint first_row = product.block * kTileRows, first_token = group.y * kTileTokens;
  const uint tokens = min(args.tokens - first_token, uint(kTileTokens));
  const TileInputs inputs = {x, nullptr, false, args.columns, first_token, tokens};
  float4 total[4];
  multiply_tile(first_format(), product.w, first_row, product.rows, args.columns, inputs,
                thread_index, (threadgroup float*)weights, (threadgroup float*)xs, total);
#pragma unroll
  for (uint t = 0; t < 4; ++t) {
    const uint token = thread_index / 16 * 4 + t;
    if (token >= tokens) continue;
    device float* out = product.out + ulong(first_token + token) * product.rows;
#pragma unroll
    for (uint i = 0; i < 4; ++i) {
      const uint row = first_row + thread_index % 16 * 4 + i;
      if (row >= product.rows) continue;
      const float sum = pick(total[t], i);
      out[row] = product.add ? out[row] + sum : sum;
    }
  }
}
