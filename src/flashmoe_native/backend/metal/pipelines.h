// Kernels: their sources compiled at once, each specialised when first used.
#pragma once

#import <Metal/Metal.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "backend/launch/plan.h"
#include "backend/metal/owned.h"

namespace flashmoe {

class Pipelines {
 public:
  // Compiles the .metal files of a directory. Throws DeviceError with the compiler's message.
  Pipelines(id<MTLDevice> device, const std::string& directory);

  // What the compiler said though it compiled; "" for nothing.
  const std::string& log() const { return log_; }
  // As Backend::compiled().
  std::vector<std::string> compiled() const;

  // Throws DeviceError where the GPU cannot run the kernel with so many threads a threadgroup.
  id<MTLComputePipelineState> get(Kernel kernel, const Constants& constants, uint32_t threads);

 private:
  Owned<id<MTLComputePipelineState>> make(Kernel kernel, const Constants& constants) const;

  id<MTLDevice> device_;
  Owned<id<MTLLibrary>> library_;
  std::string log_;
  std::map<std::pair<Kernel, Constants>, Owned<id<MTLComputePipelineState>>> pipelines_;
};

}  // namespace flashmoe
