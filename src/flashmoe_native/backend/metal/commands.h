// The GPU's queue: what is encoded, committed and waited for.
#pragma once

#import <Metal/Metal.h>

#include <vector>

#include "backend/metal/owned.h"

namespace flashmoe {

class Commands {
 public:
  explicit Commands(id<MTLDevice> device);
  // Waits for what is in flight; what was not committed is dropped.
  ~Commands();

  // The open encoder: dispatches on it run in order, each seeing what those before it wrote.
  id<MTLComputeCommandEncoder> encoder();
  // Lets the GPU begin what was encoded.
  void commit();
  // Commits, and returns when all is done. Throws DeviceError with Metal's message.
  void finish();

 private:
  void end_encoding();

  Owned<id<MTLCommandQueue>> queue_;
  Owned<id<MTLCommandBuffer>> open_;
  Owned<id<MTLComputeCommandEncoder>> encoder_;
  std::vector<Owned<id<MTLCommandBuffer>>> committed_;
};

}  // namespace flashmoe
