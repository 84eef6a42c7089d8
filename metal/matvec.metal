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
  device const float* input = x + ulong(group.y) * args.columns;
  const Format format = first_format();
  for (uint pass = 0; pass < kMatvecPasses; ++pass) {
    const uint first = first_row(product.block, args.columns, pass, simdgroup);
    const bool ready = pass > 0 && stay_staged(format, format, args.columns);
    const float sum = multiply_rows(format, product.w, first, product.rows, args.columns, input,
                                    ready, thread_index, lane, staged, sums);
    const uint row = first + lane / 8;
    if (lane % 8 != 0 || row >= product.rows) continue;
    device float* out = product.out + ulong(group.y) * product.rows + row;
    *out = product.add ? *out + sum : sum;
  }
}
