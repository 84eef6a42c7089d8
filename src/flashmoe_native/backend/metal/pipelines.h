// Kernels: their sources compiled at once, each specialised when first used.
#pragma once

#import <Metal/Metal.h>

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "arguments.h"
#include "backend/metal/owned.h"

namespace flashmoe {

#define FLASHMOE_KERNEL(name) name,
enum class Kernel { FLASHMOE_KERNELS(FLASHMOE_KERNEL) };
#undef FLASHMOE_KERNEL

class Pipelines {
 public:
  // Values by shaders::FunctionConstant; a kernel ignores those that it does not declare.
  using Constants = std::array<uint32_t, shaders::kFunctionConstants>;

  // Compiles the .metal files of a directory. Throws DeviceError with the compiler's message.
  Pipelines(id<MTLDevice> device, const std::string& directory);

  // Throws DeviceError where the GPU cannot run the kernel with so many threads a threadgroup.
  id<MTLComputePipelineState> get(Kernel kernel, const Constants& constants, uint32_t threads);

 private:
  Owned<id<MTLComputePipelineState>> make(Kernel kernel, const Constants& constants) const;

  id<MTLDevice> device_;
  Owned<id<MTLLibrary>> library_;
  std::map<std::pair<Kernel, Constants>, Owned<id<MTLComputePipelineState>>> pipelines_;
};

}  // namespace flashmoe
