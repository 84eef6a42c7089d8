#include "backend/metal/residency.h"

#include <algorithm>
#include <chrono>
#include <string>

#include "core/error.h"

namespace flashmoe {
namespace {

constexpr auto kBeat = std::chrono::milliseconds(500);
constexpr auto kIdle = std::chrono::minutes(3);  // after which memory is let go

}  // namespace

Residency::Residency(id<MTLDevice> device) {
  if (![device respondsToSelector:@selector(newResidencySetWithDescriptor:error:)]) return;
  NSError* error = nil;
  const auto descriptor =
      Owned<id>::adopt([[NSClassFromString(@"MTLResidencySetDescriptor") alloc] init]);
  set_ = Owned<id<NewerMTLResidencySet>>::adopt(
      [(id<NewerMTLDevice>)device newResidencySetWithDescriptor:descriptor.get() error:&error]);
  if (!set_) {
    throw DeviceError(std::string("Metal: no residency set: ") +
                      [[error localizedDescription] UTF8String]);
  }
  keeper_ = std::thread([this] { keep_alive(); });
}

Residency::~Residency() {
  if (!keeper_.joinable()) return;
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_one();
  keeper_.join();
}

void Residency::attach(id<MTLCommandQueue> queue) {
  if (set_) [(id<NewerMTLCommandQueue>)queue addResidencySet:set_.get()];
}

void Residency::add(id<MTLBuffer> buffer) {
  std::lock_guard lock(mutex_);
  buffers_.push_back(buffer);
  [set_.get() addAllocation:buffer];
  changed_ = true;
}

void Residency::remove(id<MTLBuffer> buffer) {
  std::lock_guard lock(mutex_);
  const auto found = std::find(buffers_.begin(), buffers_.end(), buffer);
  if (found == buffers_.end()) return;
  buffers_.erase(found);
  [set_.get() removeAllocation:buffer];
  [set_.get() commit];  // now, for it keeps the buffer
  told_ = nil;
}

void Residency::use(id<MTLComputeCommandEncoder> encoder) {
  std::lock_guard lock(mutex_);
  if (set_) return;
  if (told_ != encoder) told_count_ = 0;
  told_ = encoder;
  if (told_count_ == buffers_.size()) return;
  std::vector<id<MTLResource>> fresh(buffers_.begin() + static_cast<ptrdiff_t>(told_count_),
                                     buffers_.end());
  [encoder
      useResources:fresh.data()
             count:fresh.size()
             usage:static_cast<MTLResourceUsage>(MTLResourceUsageRead | MTLResourceUsageWrite)];
  told_count_ = buffers_.size();
}

void Residency::commit() {
  std::lock_guard lock(mutex_);
  told_ = nil;
  if (!set_) return;
  if (changed_) {
    [set_.get() commit];
    [set_.get() requestResidency];
  }
  changed_ = false;
  used_ = true;
  wake_.notify_one();
}

void Residency::keep_alive() {
  using Clock = std::chrono::steady_clock;
  std::unique_lock lock(mutex_);
  Clock::time_point last;
  while (!stopping_) {
    const bool active = used_ || Clock::now() - last < kIdle;
    if (used_) last = Clock::now();
    used_ = false;
    if (active) {
      wake_.wait_for(lock, kBeat, [&] { return stopping_; });
      const Pool pool;
      if (!stopping_) [set_.get() requestResidency];
    } else {
      wake_.wait(lock, [&] { return stopping_ || used_; });
    }
  }
}

}  // namespace flashmoe
