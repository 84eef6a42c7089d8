// One vector of the instruction set that the including file is compiled for, with the few
// operations that GCC's and Clang's vector types lack.
// The including file has opened a namespace, named kLanes, and included backend/cpu/kernels.h, the
// header of its intrinsics, <math.h> and <utility>: no .inl may, for it stands in that namespace.
#pragma once

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

#define FLASHMOE_INLINE [[gnu::always_inline]] inline

// Before a loop whose body should stand `count` times behind itself.
#define FLASHMOE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FLASHMOE_UNROLL(count) FLASHMOE_PRAGMA(clang loop unroll_count(count))
#else
#define FLASHMOE_UNROLL(count) FLASHMOE_PRAGMA(GCC unroll count)
#endif

// Sixteen lanes: sixteen groups of a row, or sixteen rows.
constexpr int kParts = 16 / kLanes;
template <class Vector>
struct Block {
  Vector part[kParts];
};

FLASHMOE_INLINE Floats splat(float value) {
  return Floats{} + value;
}

FLASHMOE_INLINE Floats load(const float* from) {
  Floats value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

FLASHMOE_INLINE void store(float* to, Floats value) {
  __builtin_memcpy(to, &value, sizeof value);
}

// For what is not read again soon: past the caches where the address allows it. Call
// fence_streams() before another thread may read it.
FLASHMOE_INLINE void stream(float* to, Floats value) {
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    return _mm512_stream_ps(to, reinterpret_cast<__m512>(value));
  }
#elif defined(__AVX2__)
  if (reinterpret_cast<uintptr_t>(to) % 32 == 0) {
    return _mm256_stream_ps(to, reinterpret_cast<__m256>(value));
  }
#endif
  store(to, value);
}
FLASHMOE_INLINE void fence_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Asks memory for the line at `at`, into the second-level cache, which can wait for many lines at
// once; the first level can for few. Any address will do.
FLASHMOE_INLINE void prefetch_far(const void* at) {
  __builtin_prefetch(at, 0, 2);
}

// The first `count` lanes, the others zero; count may be any number.
FLASHMOE_INLINE Floats load(const float* from, int count) {
  if (count >= kLanes) return load(from);
  float lanes[kLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
}

FLASHMOE_INLINE void store(float* to, Floats value, int count) {
  if (count >= kLanes) return store(to, value);
  float lanes[kLanes];
  store(lanes, value);
  for (int i = 0; i < count; ++i) to[i] = lanes[i];
}

FLASHMOE_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_fmadd_ps(a, b, c));
#elif defined(__FMA__)
  return reinterpret_cast<Floats>(_mm256_fmadd_ps(a, b, c));
#elif defined(FLASHMOE_NEON)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

FLASHMOE_INLINE Floats maximum(Floats a, Floats b) {
  return a > b ? a : b;
}

FLASHMOE_INLINE Floats plus(Floats a, Floats b) {
  return a + b;
}

// Each lane and the one whose index differs in the bit `Distance`.
template <int Distance, class Vector, int... Lane>
FLASHMOE_INLINE Vector partners(Vector value, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(value, value, (Lane ^ Distance)...);
}
template <int Distance, class Vector>
FLASHMOE_INLINE Vector partners(Vector value) {
  return partners<Distance>(value, std::make_integer_sequence<int, kLanes>());
}

// All lanes combined: those half a vector apart, then a quarter, ...
template <class Vector, class Combine>
FLASHMOE_INLINE auto fold(Vector value, Combine combine) {
  if constexpr (kLanes > 8) value = combine(value, partners<8>(value));
  if constexpr (kLanes > 4) value = combine(value, partners<4>(value));
  value = combine(value, partners<2>(value));
  return combine(value, partners<1>(value))[0];
}

FLASHMOE_INLINE float sum(Floats value) {
  return fold(value, plus);
}

FLASHMOE_INLINE float largest(Floats value) {
  return fold(value, maximum);
}

// e^x to about 2 ulp; 0 below -87.3, e^88 above 88, NaN for NaN. Reduced to |r| <= ln 2 / 2 by
// Cody and Waite's two-part ln 2, then the polynomial of Cephes' expf.
FLASHMOE_INLINE Floats exponential(Floats x) {
  const Floats clamped = x > 88.0f ? splat(88.0f) : (x < -87.3f ? splat(-87.3f) : x);
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Floats shifted = clamped * 1.44269504088896341f + kRound;
  const Floats n = shifted - kRound;
  Floats r = multiply_add(n, splat(-0.693359375f), clamped);
  r = multiply_add(n, splat(2.12194440e-4f), r);
  Floats p = splat(1.9875691500e-4f);
  p = multiply_add(p, r, splat(1.3981999507e-3f));
  p = multiply_add(p, r, splat(8.3334519073e-3f));
  p = multiply_add(p, r, splat(4.1665795894e-2f));
  p = multiply_add(p, r, splat(1.6666665459e-1f));
  p = multiply_add(p, r, splat(5.0000001201e-1f));
  p = multiply_add(p, r * r, r) + 1.0f;
  const Words exponent = (reinterpret_cast<Words>(shifted) << 23) + (127u << 23);  // of NaN: any
  const Floats result = p * reinterpret_cast<Floats>(exponent);
  return x < -87.3f ? Floats{} : result;
}

FLASHMOE_INLINE Floats sigmoid(Floats x) {
  return 1.0f / (1.0f + exponential(-x));
}
FLASHMOE_INLINE Floats silu(Floats x) {
  return x * sigmoid(x);
}
