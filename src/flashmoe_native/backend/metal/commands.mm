#include "backend/metal/commands.h"

#include <string>
#include <utility>

#include "core/error.h"

namespace flashmoe {

Commands::Commands(id<MTLDevice> device)
    : queue_(Owned<id<MTLCommandQueue>>::adopt([device newCommandQueue])) {
  if (!queue_) throw DeviceError("Metal: the GPU gives no command queue");
}

Commands::~Commands() {
  end_encoding();
  for (const auto& buffer : committed_) [buffer.get() waitUntilCompleted];
}

id<MTLComputeCommandEncoder> Commands::encoder() {
  if (!encoder_) {
    open_ = Owned<id<MTLCommandBuffer>>::share([queue_.get() commandBuffer]);
    encoder_ = Owned<id<MTLComputeCommandEncoder>>::share([open_.get() computeCommandEncoder]);
  }
  return encoder_.get();
}

void Commands::end_encoding() {
  [encoder_.get() endEncoding];
  encoder_.reset();
}

void Commands::commit() {
  if (!encoder_) return;
  end_encoding();
  [open_.get() commit];
  committed_.push_back(std::move(open_));
}

void Commands::finish() {
  commit();
  std::string error;
  for (const auto& buffer : std::exchange(committed_, {})) {
    [buffer.get() waitUntilCompleted];
    if ([buffer.get() status] == MTLCommandBufferStatusError && error.empty()) {
      error = [[[buffer.get() error] localizedDescription] UTF8String];
    }
  }
  if (!error.empty()) throw DeviceError("Metal: the GPU could not finish its work: " + error);
}

}  // namespace flashmoe
