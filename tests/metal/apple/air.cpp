// What kernels that Apple's compiler made ask of a GPU, given to them by the executor: the
// functions air.* that their code calls, and those that the entries made by tests/apple_kernels.py
// call. APPLE_KERNELS(X) names them.
#include <cmath>
#include <cstdint>

#include "../executor/include/lane.h"

namespace {

// A call has no place in the sources here, but one in the code.
msl::Site caller(void* address) {
  msl::Site site{};
  site.line = static_cast<int>(reinterpret_cast<intptr_t>(address));
  return site;
}
#define HERE caller(__builtin_return_address(0))

}  // namespace

float simd_sum(float x) asm("air.simd_sum.f32");
float simd_sum(float x) {
  return msl::simd_sum(x, HERE);
}
float simd_max(float x) asm("air.simd_max.f32");
float simd_max(float x) {
  return msl::simd_max(x, HERE);
}
void barrier(unsigned flags, unsigned scope) asm("air.wg.barrier");
void barrier(unsigned, unsigned) {
  msl::threadgroup_barrier(HERE);
}
float rsqrt(float x) asm("air.rsqrt.f32");
float rsqrt(float x) {
  return 1.0f / std::sqrt(x);
}
float fast_exp(float x) asm("air.fast_exp.f32");
float fast_exp(float x) {
  return std::exp(x);
}
float from_signed(int x) asm("air.convert.f.f32.s.i32");
float from_signed(int x) {
  return static_cast<float>(x);
}
float from_unsigned(unsigned x) asm("air.convert.f.f32.u.i32");
float from_unsigned(unsigned x) {
  return static_cast<float>(x);
}

// All threadgroup memory of the library.
extern "C" unsigned char __start_threadgroup[], __stop_threadgroup[];

extern "C" void enter() {
  static uint64_t group = 0;
  msl::enter_threadgroup_memory(__start_threadgroup, __stop_threadgroup - __start_threadgroup,
                                &group);
}
// What the executor takes for a kernel's struct is here a table of addresses, by index.
extern "C" void* bound(int index, int, int) {
  const size_t at = static_cast<size_t>(index);
  const void* table = msl::arguments((at + 1) * sizeof(void*));
  return static_cast<void* const*>(table)[at];
}
#define PLACE(name, quantity)               \
  extern "C" unsigned name(int axis) {      \
    return msl::place(msl::quantity, axis); \
  }
PLACE(threadgroup_position_in_grid, kGroupInGrid)
PLACE(thread_position_in_threadgroup, kIndexInGroup)  // of a threadgroup in one dimension
PLACE(simdgroup_index_in_threadgroup, kSimdgroup)
PLACE(thread_index_in_simdgroup, kLane)

#define DECLARE(name) extern "C" void entry_##name();
#define ENTRY(name) {#name, 1024, entry_##name},
APPLE_KERNELS(DECLARE)

namespace msl {
extern const Kernel kernels[] = {APPLE_KERNELS(ENTRY){nullptr, 0, nullptr}};
}  // namespace msl
