// Memory that the CPU addresses by pointer and the GPU by buffer and offset.
#pragma once

#import <Metal/Metal.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "backend/backend.h"
#include "backend/metal/owned.h"
#include "core/file.h"

namespace flashmoe {

class DeviceMemory {
 public:
  struct Place {
    id<MTLBuffer> buffer;
    NSUInteger offset;
  };

  static constexpr int kWeightAlignment = 16;  // bytes: what kernels load at once

  explicit DeviceMemory(id<MTLDevice> device);

  // Zeroed memory, as Backend::allocate promises. Throws DeviceError where the GPU may not use as
  // much, and says what to do.
  Buffer allocate(size_t bytes);
  // The pages of a file that hold the range, or nothing where its offset does not suit kernels.
  Buffer map(const File& file, int64_t offset, int64_t length);
  // Where the GPU finds what a pointer into such memory points at.
  Place find(const void* pointer) const;
  // What offset 0 of that buffer is to the CPU.
  const std::byte* base(const void* pointer) const;

 private:
  using Deallocator = void (^)(void* pointer, NSUInteger length);
  struct Region {
    size_t length;
    Owned<id<MTLBuffer>> buffer;
  };

  void require_room(size_t length) const;
  // Hands out base + offset; `deallocator` frees the pages once Metal no longer uses them.
  Buffer wrap(std::byte* base, size_t length, size_t offset, Deallocator deallocator);
  void forget(const std::byte* data);
  const std::pair<const std::byte* const, Region>& region(const void* pointer) const;

  id<MTLDevice> device_;
  const size_t page_;
  mutable std::mutex mutex_;  // a State may be freed by any thread
  std::map<const std::byte*, Region> regions_;
};

}  // namespace flashmoe
