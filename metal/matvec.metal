// Products with few tokens: a threadgroup takes a block of rows for one token.
#include "matvec.h"
#include "products.h"

KERNEL(matvec, kMatvecThreads)(constant ProductArguments& args [[buffer(0)]],
                               uint3 group [[threadgroup_position_in_grid]],
                               uint thread_index [[thread_index_in_threadgroup]],
                               uint simdgroup [[simdgroup_index_in_threadgroup]],
                               uint lane [[thread_index_in_simdgroup]]) {
  device const float* x = args.x;
  STAGED_INPUTS;
  const Product product = select_product(args, group.x);
  const uint first =
      product.block * matvec_block_rows(quads_constant) + simdgroup * 4 * quads_constant;
  const Format format = first_format();
  float total[4 * kMaxQuads];
  multiply_rows({format, product.w, first, 4, product.rows},
                {format, product.w, first + 2, 4, product.rows}, args.columns,
                x + ulong(group.y) * args.columns, thread_index, lane, staged, sums, total);
#pragma unroll
  for (uint q = 0; q < kMaxQuads; ++q) {
    if (q >= quads_constant) continue;
    const float sum = sum_four(total + 4 * q, lane);
    const uint row = first + 4 * q + lane / 8;
    if (lane % 8 != 0 || row >= product.rows) continue;
    device float* out = product.out + ulong(group.y) * product.rows + row;
    *out = product.add ? *out + sum : sum;
  }
}
