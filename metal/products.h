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

INLINE Product select_product(constant ProductArguments& args, uint block, Stored w0, Stored w1,
                              Stored w2, Stored w3, device float* out0, device float* out1,
                              device float* out2, device float* out3) {
  uint p = 0;
  while (p + 1 < args.count && block >= args.first_block[p + 1]) ++p;
  Product product;
  product.w = p == 0 ? w0 : p == 1 ? w1 : p == 2 ? w2 : w3;
  product.out = p == 0 ? out0 : p == 1 ? out1 : p == 2 ? out2 : out3;
  product.rows = args.rows[p];
  product.block = block - args.first_block[p];
  product.add = args.add[p] != 0;
  return product;
}

// The buffers of four products, for a kernel's argument list and for select_product.
#define PRODUCT_ARGUMENTS                                                                      \
  device const uchar *weight0 [[buffer(kProductWeight)]],                                      \
      device const uchar *weight1 [[buffer(kProductWeight1)]],                                 \
      device const uchar *weight2 [[buffer(kProductWeight2)]],                                 \
      device const uchar *weight3 [[buffer(kProductWeight3)]],                                 \
      device const uchar *scales0 [[buffer(kProductScales)]],                                  \
      device const uchar *scales1 [[buffer(kProductScales1)]],                                 \
      device const uchar *scales2 [[buffer(kProductScales2)]],                                 \
      device const uchar *scales3 [[buffer(kProductScales3)]],                                 \
      device const uchar *biases0 [[buffer(kProductBiases)]],                                  \
      device const uchar *biases1 [[buffer(kProductBiases1)]],                                 \
      device const uchar *biases2 [[buffer(kProductBiases2)]],                                 \
      device const uchar *biases3 [[buffer(kProductBiases3)]],                                 \
      device float *out0 [[buffer(kProductOut)]], device float *out1 [[buffer(kProductOut1)]], \
      device float *out2 [[buffer(kProductOut2)]], device float *out3 [[buffer(kProductOut3)]]
#define PRODUCTS                                                                         \
  {weight0, scales0, biases0}, {weight1, scales1, biases1}, {weight2, scales2, biases2}, \
      {weight3, scales3, biases3}, out0, out1, out2, out3
