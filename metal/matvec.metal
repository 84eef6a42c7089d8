// Products with few tokens: a threadgroup takes a block of rows for one token.
#include "matvec.h"
#include "products.h"

kernel void matvec(device const float* x [[buffer(kProductX)]],
                   constant ProductArguments& args [[buffer(kProductArguments)]], PRODUCT_ARGUMENTS,
                   uint3 group [[threadgroup_position_in_grid]],
                   uint thread_index [[thread_index_in_threadgroup]],
                   uint simdgroup [[simdgroup_index_in_threadgroup]],
                   uint lane [[thread_index_in_simdgroup]]) {
  STAGED_INPUTS;
  const Product product = select_product(args, group.x, PRODUCTS);
  const uint first = product.block * matvec_block_rows(args.columns) + simdgroup * kMatvecRows;
  const float sum =
      multiply_rows(first_format(), product.w, first, product.rows, args.columns,
                    x + ulong(group.y) * args.columns, false, thread_index, lane, staged, sums);
  const uint row = first + lane / 8;
  if (lane % 8 != 0 || row >= product.rows) return;
  device float* out = product.out + ulong(group.y) * product.rows + row;
  *out = product.add ? *out + sum : sum;
}
