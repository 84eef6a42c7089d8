// Products with few tokens: a threadgroup takes a block of rows for one token.
#include "matvec.h"
#include "products.h"

kernel void matvec(device const float* x [[buffer(kProductX)]],
                   constant ProductArguments& args [[buffer(kProductArguments)]], PRODUCT_ARGUMENTS,
                   uint3 group [[threadgroup_position_in_grid]],
                   uint thread_index [[thread_index_in_threadgroup]],
                   uint simdgroup [[simdgroup_index_in_threadgroup]],
                   uint lane [[thread_index_in_simdgroup]]) {
  THREADGROUP_ARRAY(float, partial, [kMatvecSimdgroups * kMatvecRows]);
  const Product product = select_product(args, group.x, PRODUCTS);
  const Place place = place_of(args.columns, simdgroup);
  const uint block_rows = matvec_block_rows(args.columns);
  const uint first = product.block * block_rows;
  multiply_rows(first_format(), product.w, first + place.first_row, product.rows, args.columns,
                x + ulong(group.y) * args.columns, place, lane, partial + simdgroup * kMatvecRows);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint row = first + thread_index;
  if (thread_index >= block_rows || row >= product.rows) return;
  device float* out = product.out + ulong(group.y) * product.rows + row;
  const float sum = add_splits(partial, thread_index, place.splits);
  *out = product.add ? *out + sum : sum;
}
