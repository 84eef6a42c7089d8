#include "backend/metal/commands.h"

#include <string>
#include <utility>

#include "core/error.h"

namespace flashmoe {
namespace {

// Metal's words for a failed command buffer, and what to do about it.
std::string explain(NSError* error) {
  std::string text = "Metal: the GPU could not finish its work: ";
  const std::string words = [[error localizedDescription] UTF8String];
  text += words;
  if ([error code] == MTLCommandBufferErrorTimeout ||
      words.find("Interactivity") != std::string::npos) {
    return text + ". macOS ended it because it held the GPU too long: close what else uses the GPU "
                  "and try "
                  "again, or use backend=\"cpu\"";
  }
  if ([error code] == MTLCommandBufferErrorOutOfMemory) {
    return text +
           ". Give experts a smaller cache (cache=0 uses the page cache), shorten the context, "
           "or close other models";
  }
  return text;
}

}  // namespace

Commands::Commands(id<MTLDevice> device, Residency& residency)
    : residency_(residency),
      queue_(Owned<id<MTLCommandQueue>>::adopt([device newCommandQueue])),
      fence_(Owned<id<MTLFence>>::adopt([device newFence])) {
  if (!queue_ || !fence_) throw DeviceError("Metal: the GPU gives no command queue");
  residency_.attach(queue_.get());
}

Commands::~Commands() {
  end_encoding();
  for (const auto& buffer : committed_) [buffer.get() waitUntilCompleted];
}

id<MTLComputeCommandEncoder> Commands::encoder() {
  if (!encoder_) {
    open_ = Owned<id<MTLCommandBuffer>>::share([queue_.get() commandBuffer]);
    encoder_ = Owned<id<MTLComputeCommandEncoder>>::share([open_.get() computeCommandEncoder]);
    [encoder_.get() waitForFence:fence_.get()];
  }
  residency_.use(encoder_.get());
  return encoder_.get();
}

void Commands::end_encoding() {
  [encoder_.get() updateFence:fence_.get()];
  [encoder_.get() endEncoding];
  encoder_.reset();
}

void Commands::commit() {
  if (!encoder_) return;
  end_encoding();
  residency_.commit();
  [open_.get() commit];
  committed_.push_back(std::move(open_));
}

void Commands::finish() {
  commit();
  std::string error;
  for (const auto& buffer : std::exchange(committed_, {})) {
    [buffer.get() waitUntilCompleted];
    if ([buffer.get() status] == MTLCommandBufferStatusError && error.empty()) {
      error = explain([buffer.get() error]);
    }
  }
  if (!error.empty()) throw DeviceError(error);
}

}  // namespace flashmoe
