// The GPU's queue: what is encoded, committed and waited for.
#pragma once

#import <Metal/Metal.h>

#include <vector>

#include "backend/metal/owned.h"
#include "backend/metal/residency.h"

namespace flashmoe {

class Commands {
 public:
  Commands(id<MTLDevice> device, Residency& residency);
  // Waits for what is in flight; what was not committed is dropped.
  ~Commands();

  // The open encoder: dispatches on it run in order, each seeing what those before it wrote, on
  // this encoder and on earlier ones.
  id<MTLComputeCommandEncoder> encoder();
  // Lets the GPU begin what was encoded.
  void commit();
  // Commits, and returns when all is done. Throws DeviceError with Metal's message and what to do.
  void finish();

 private:
  void end_encoding();

  Residency& residency_;
  Owned<id<MTLCommandQueue>> queue_;
  // Kernels find memory by address, so that Metal does not see which encoder needs which: one
  // begins when the one before it has ended.
  Owned<id<MTLFence>> fence_;
  Owned<id<MTLCommandBuffer>> open_;
  Owned<id<MTLComputeCommandEncoder>> encoder_;
  std::vector<Owned<id<MTLCommandBuffer>>> committed_;
};

}  // namespace flashmoe
