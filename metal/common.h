// What every kernel shares: stored elements as floats, sums over a threadgroup, activations.
#pragma once

#include <metal_stdlib>
using namespace metal;

#include "arguments.h"
using namespace shaders;

// What checks these files as C++ (tests/metal, benchmarks/metal_on_cuda) defines its own.
#ifndef THREADGROUP_ARRAY
#define THREADGROUP_ARRAY(type, name, extents) threadgroup type name extents
#endif
// A kernel and the most threads that a threadgroup of it has, which the compiler has registers for.
#ifndef KERNEL
#define KERNEL(name, threads) [[max_total_threads_per_threadgroup(threads)]] kernel void name
#endif
// Bounds of loops over arrays must be known and the loops unrolled, or a helper's arrays would live
// in memory: Metal's compiler does neither by itself where a function constant is among the bounds.
#define INLINE inline __attribute__((always_inline))
#ifndef FUNCTION_CONSTANT
#define FUNCTION_CONSTANT(name, index) constant uint name [[function_constant(index)]]
#endif

FUNCTION_CONSTANT(bits_constant, kBits);
FUNCTION_CONSTANT(group_constant, kGroup);
FUNCTION_CONSTANT(dtype_constant, kDType);
FUNCTION_CONSTANT(second_bits_constant, kSecondBits);
FUNCTION_CONSTANT(second_group_constant, kSecondGroup);
FUNCTION_CONSTANT(second_dtype_constant, kSecondDType);
FUNCTION_CONSTANT(cache_dtype_constant, kCacheDType);
FUNCTION_CONSTANT(quads_constant, kQuads);

// Function constants reach the helpers as arguments; they fold away when these are inlined.
struct Format {
  uint bits, group, dtype;
};
INLINE Format first_format() {
  return {bits_constant, group_constant, dtype_constant};
}
INLINE Format second_format() {
  return {second_bits_constant, second_group_constant, second_dtype_constant};
}

INLINE Stored stored(constant Stored& w) {
  return {w.weight, w.scales, w.biases};
}

INLINE float bf16_to_float(uint bits) {
  return as_type<float>(bits << 16);
}

// Round to nearest, ties to even. Caches hold finite values only.
INLINE ushort float_to_bf16(float value) {
  const uint bits = as_type<uint>(value);
  return ushort((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float half_to_float(uint bits) {
  return float(as_type<half>(ushort(bits)));
}

// Element `index` of an array of dtype.
INLINE float element(uint dtype, device const uchar* data, ulong index) {
  if (dtype == kF32) return ((device const float*)data)[index];
  const uint bits = ((device const ushort*)data)[index];
  return dtype == kBF16 ? bf16_to_float(bits) : half_to_float(bits);
}

// Element (row, column) of a weight with `columns` columns.
INLINE float weight_at(Format format, Stored w, ulong row, uint columns, uint column) {
  const ulong index = row * columns + column;
  if (format.bits == 0) return element(format.dtype, w.weight, index);
  const uint per_word = 32 / format.bits;
  const uint word = ((device const uint*)w.weight)[index / per_word];
  const uint q = (word >> (column % per_word * format.bits)) & ((1u << format.bits) - 1);
  const ulong group = index / format.group;
  return fma(float(q), element(format.dtype, w.scales, group),
             element(format.dtype, w.biases, group));
}

INLINE float pick(float4 v, uint i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

INLINE float sigmoid(float x) {
  return 1.0f / (1.0f + exp(-x));
}

INLINE float silu(float x) {
  return x * sigmoid(x);
}

// The sum of every thread's value, for a threadgroup of whole simdgroups. Every thread must call
// it; `partial` has room for one float a simdgroup and is free again after the next barrier.
INLINE float group_sum(float value, threadgroup float* partial, uint simdgroups, uint simdgroup,
                       uint lane) {
  const float sum = simd_sum(value);
  if (lane == 0) partial[simdgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_sum(lane < simdgroups ? partial[lane] : 0.0f);
}
