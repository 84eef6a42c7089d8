// What a GPU is asked to run: plain values, which Metal encodes, tests execute, and another host
// can launch. metal/arguments.h says what kernels want.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "arguments.h"

namespace flashmoe {

#define FLASHMOE_KERNEL(name) name,
enum class Kernel { FLASHMOE_KERNELS(FLASHMOE_KERNEL) };
#undef FLASHMOE_KERNEL

const char* name_of(Kernel kernel);

// Values by shaders::FunctionConstant; a kernel ignores those that it does not declare.
using Constants = std::array<uint32_t, shaders::kFunctionConstants>;

// A kernel and those of its constants that are not 0 (F32 is), for people.
std::string spell(Kernel kernel, const Constants& constants);

// One dispatch.
struct Plan {
  using Grid = std::array<uint32_t, 3>;  // in threadgroups

  Plan(Kernel kernel, Grid grid, uint32_t threads, double seconds)
      : kernel(kernel), grid(grid), threads(threads), seconds(seconds) {}

  Kernel kernel;
  Grid grid;
  uint32_t threads;  // of a threadgroup
  double seconds;    // that it takes at most, on the slowest GPU there is a kernel for
  Constants constants{};
  uint32_t size = 0;                                                        // of arguments
  alignas(16) std::array<std::byte, shaders::kMaxArgumentBytes> arguments;  // the kernel's struct

  template <class Arguments>
  void set(const Arguments& values) {
    static_assert(std::is_trivially_copyable_v<Arguments>);
    static_assert(sizeof values <= shaders::kMaxArgumentBytes);
    size = sizeof values;
    std::memcpy(arguments.data(), &values, size);
  }
};

// What a plan takes on an M1 of 7 cores (68 GB/s; 2.3 TFLOP/s, of which a quarter is counted on).
inline double seconds_for(double operations, double bytes) {
  const double slower = operations / 0.6e12 > bytes / 60e9 ? operations / 0.6e12 : bytes / 60e9;
  return slower + 5e-6;
}

}  // namespace flashmoe
