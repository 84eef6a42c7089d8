// Which buffers the GPU may use. Kernels find memory by address, so that Metal does not see what a
// dispatch touches and must be told.
//
// macOS 15 and later keep what a residency set names wired while it is asked for. Without, the
// system lets go of it after a second without work, and the next token takes five times as long
// (ggml-org/llama.cpp, pull requests 10119, 11427 and 17766). Older systems are told for each
// encoder.
#pragma once

#import <Metal/Metal.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "backend/metal/newer.h"
#include "backend/metal/owned.h"

namespace flashmoe {

class Residency {
 public:
  explicit Residency(id<MTLDevice> device);
  ~Residency();

  void attach(id<MTLCommandQueue> queue);
  void add(id<MTLBuffer> buffer);
  // Also of one that was never added.
  void remove(id<MTLBuffer> buffer);

  // Before dispatches are encoded that use what was added since the last call for this encoder.
  void use(id<MTLComputeCommandEncoder> encoder);
  // Before a command buffer is committed.
  void commit();

 private:
  void keep_alive();

  std::mutex mutex_;
  Owned<id<NewerMTLResidencySet>> set_;  // none before macOS 15
  std::vector<id<MTLBuffer>> buffers_;
  bool changed_ = false;                     // since commit()
  id<MTLComputeCommandEncoder> told_ = nil;  // the encoder that knows the first
  size_t told_count_ = 0;                    // so many of buffers_

  // Asks for residency again and again, until some minutes after the last commit().
  std::condition_variable wake_;
  bool stopping_ = false, used_ = false;
  std::thread keeper_;
};

}  // namespace flashmoe
