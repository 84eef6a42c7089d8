// Which of up to four products, one input for all, a threadgroup works on.
#pragma once

#include "common.h"

struct Product {
  Stored w;
  device float* out;
  uint rows;
  uint block;  // of its rows
  bool add;
};

INLINE Product select_product(constant ProductArguments& args, uint block) {
  uint p = 0;
  while (p + 1 < args.count && block >= args.products[p + 1].first_block) ++p;
  constant ProductEntry& entry = args.products[p];
  return {stored(entry.weight), entry.out, entry.rows, block - entry.first_block, entry.add != 0};
}
