#include "backend/metal/metal_backend.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "backend/launch/gpu_backend.h"
#include "backend/metal/commands.h"
#include "backend/metal/memory.h"
#include "backend/metal/pipelines.h"
#include "core/error.h"

namespace flashmoe {
namespace {

Owned<id<MTLDevice>> open_device() {
  auto device = Owned<id<MTLDevice>>::adopt(MTLCreateSystemDefaultDevice());
  if (!device) throw DeviceError("Metal: this machine has no GPU; use backend=\"cpu\"");
  const std::string name = [[device.get() name] UTF8String];
  if (![device.get() supportsFamily:MTLGPUFamilyApple7] || ![device.get() hasUnifiedMemory]) {
    throw DeviceError("Metal: " + name +
                      " is not a GPU of Apple silicon (family Apple7, unified memory), which the "
                      "kernels are written for; use backend=\"cpu\"");
  }
  if (![device.get() supportsFamily:MTLGPUFamilyMetal3]) {
    throw DeviceError("Metal: " + name +
                      " has no Metal 3 here, which macOS 13 brought; update macOS, or use "
                      "backend=\"cpu\"");
  }
  return device;
}

class MetalBackend final : public GpuBackend {
 public:
  MetalBackend(const std::string& kernels, bool overlap)
      : GpuBackend(overlap),
        device_(open_device()),
        memory_(device_.get()),
        pipelines_(device_.get(), kernels),
        commands_(device_.get(), memory_.residency()) {}

  Buffer allocate(Memory, size_t bytes, size_t unit) override {
    const Pool pool;
    return memory_.allocate(bytes, unit);
  }

  Buffer map(const File& file, int64_t offset, int64_t length) override {
    const Pool pool;
    return memory_.map(file, offset, length);
  }

  void finish() override {
    const Pool pool;
    launch_waiting();
    commands_.finish();
    encoded_ = 0;
    staging_.used = 0;
    replaced_.clear();
  }

  DeviceTimes times() const override { return commands_.times(); }

  std::vector<std::string> compiled() const override { return pipelines_.compiled(); }

  std::vector<std::pair<std::string, std::string>> describe() const override {
    const Pool pool;
    int family = MTLGPUFamilyApple7;
    while ([device_.get() supportsFamily:static_cast<MTLGPUFamily>(family + 1)]) ++family;
    return {{"device", [[device_.get() name] UTF8String]},
            {"family", "Apple" + std::to_string(family - MTLGPUFamilyApple7 + 7)},
            {"maxBufferLength", std::to_string([device_.get() maxBufferLength])},
            {"recommendedMaxWorkingSetSize",
             std::to_string([device_.get() recommendedMaxWorkingSetSize])},
            {"compiler", pipelines_.log()}};
  }

 protected:
  uint64_t address(const void* pointer) override { return memory_.address(pointer); }

  uint64_t scratch(Scratch which, size_t bytes) override {
    return address(grown(scratch_[static_cast<size_t>(which)], bytes));
  }

  uint64_t stage(std::span<const int32_t> values) override {
    const size_t wanted = (values.size_bytes() + 15) / 16 * 16;
    if (staging_.used + wanted > staging_.size) {
      grown(staging_, std::max(2 * staging_.size, wanted));
      staging_.used = 0;
    }
    std::byte* to = staging_.memory.get() + staging_.used;
    std::memcpy(to, values.data(), values.size_bytes());
    staging_.used += wanted;
    return address(to);
  }

  void launch(const Plan& plan) override {
    const Pool pool;
    id<MTLComputePipelineState> pipeline =
        pipelines_.get(plan.kernel, plan.constants, plan.threads);
    id<MTLComputeCommandEncoder> encoder = commands_.encoder();
    [encoder setComputePipelineState:pipeline];
    [encoder setBytes:plan.arguments.data() length:plan.size atIndex:0];
    [encoder dispatchThreadgroups:MTLSizeMake(plan.grid[0], plan.grid[1], plan.grid[2])
            threadsPerThreadgroup:MTLSizeMake(plan.threads, 1, 1)];
    encoded_ += plan.seconds;
    if (encoded_ > tuning().longest_seconds) commit();
  }

  void commit() override {
    commands_.commit();
    encoded_ = 0;
  }

 private:
  struct Growing {
    Buffer memory;
    size_t size = 0, used = 0;
  };

  // At least `bytes`. What it replaces stays until finish(), for kernels may still use it.
  std::byte* grown(Growing& growing, size_t bytes) {
    if (bytes > growing.size) {
      growing.size = std::max(bytes, growing.size + growing.size / 2);
      Buffer fresh = allocate(Memory::kState, growing.size, 0);
      replaced_.push_back(std::exchange(growing.memory, std::move(fresh)));
    }
    return growing.memory.get();
  }

  Owned<id<MTLDevice>> device_;
  DeviceMemory memory_;
  Pipelines pipelines_;
  double encoded_ = 0;  // seconds of what is encoded and not committed
  std::array<Growing, static_cast<size_t>(Scratch::kCount)> scratch_;
  Growing staging_;
  std::vector<Buffer> replaced_;
  Commands commands_;  // last, so that what is in flight ends before its memory goes
};

}  // namespace

std::unique_ptr<Backend> make_metal_backend(const std::string& kernels, bool overlap) {
  const Pool pool;
  return std::make_unique<MetalBackend>(kernels, overlap);
}

}  // namespace flashmoe
