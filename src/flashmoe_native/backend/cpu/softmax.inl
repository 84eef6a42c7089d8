// A block of attention's scores to weights.
#pragma once

#include "backend/cpu/simd.inl"

// The first `count` of kKeyBlock scores become exp(score - max), the rest of them 0.
FLASHMOE_INLINE void exponentiate(float* scores, int count, float* max, float* total) {
  for (int i = count; i < kKeyBlock; ++i) scores[i] = -__builtin_inff();
  Floats top = load(scores);
  for (int i = kLanes; i < count; i += kLanes) top = maximum(top, load(scores + i));
  *max = largest(top);
  Floats sums = {};
  for (int i = 0; i < kKeyBlock; i += kLanes) {
    const Floats p = i < count ? exponential(load(scores + i) - *max) : Floats{};
    store(scores + i, p);
    sums += p;
  }
  *total = sum(sums);
}
