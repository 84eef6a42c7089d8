// Everything that is compiled once for each instruction set; the including file names kLanes, kName
// and the file with the integer dot products.
#pragma once

#include "backend/cpu/attention.inl"
#include "backend/cpu/delta.inl"
#include "backend/cpu/dense.inl"
#include "backend/cpu/elementwise.inl"
#include "backend/cpu/int8.inl"
#include "backend/cpu/int8_quantize.inl"

constexpr Kernels kTable = {
    kName,           expand_row,      rms_norm,         quantize,    matmul_float,
    matmul_int8,     swiglu,          causal_conv,      gated_delta, attention_append,
    attention_block, attention_merge, attention_finish, combine,
};
