// The avx512 table with attention over a bfloat16 cache in bfloat16.
#include <array>
#include <type_traits>
#include <utility>

#include "backend/cpu/kernels.h"

#ifdef __AVX512BF16__
// See kernels_avx512.cpp.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

namespace flashmoe {

const Kernels* avx512_kernels();

namespace {
constexpr int kLanes = 16;
#include "backend/cpu/attention_bf16.inl"

void attention_block(const AttentionCall& call, const AttentionBlock& block, const float* q,
                     const AttentionPartial& out, float* scratch) {
  if (call.cache_dtype == DType::BF16) {
    attention_block_bf16(call, block, q, out, scratch);
  } else {
    avx512_kernels()->attention_block(call, block, q, out, scratch);
  }
}
}  // namespace

const Kernels* avx512_bf16_kernels() {
  static const Kernels table = [] {
    Kernels result = *avx512_kernels();
    result.name = "avx512-bf16";
    result.attention_block = attention_block;
    return result;
  }();
  return &table;
}

}  // namespace flashmoe
#endif
