// Memory that the CPU and the GPU see, each at addresses of its own.
#pragma once

#import <Metal/Metal.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "backend/backend.h"
#include "backend/metal/owned.h"
#include "backend/metal/residency.h"
#include "core/file.h"

namespace flashmoe {

class DeviceMemory {
 public:
  // Throws DeviceError where `residency` cannot be had.
  explicit DeviceMemory(id<MTLDevice> device);

  // Zeroed memory, as Backend::allocate promises. Where `unit` is given, pieces of whole units are
  // buffers of their own, which only become resident when they are used. Throws DeviceError where
  // the GPU may not use as much, and says what to do.
  Buffer allocate(size_t bytes, size_t unit = 0);
  // The pages of a file that hold the range.
  Buffer map(const File& file, int64_t offset, int64_t length);
  // Where the GPU finds what a pointer into such memory points at, which is resident from now on.
  uint64_t address(const void* pointer);

  Residency& residency() { return residency_; }

 private:
  struct Region {
    size_t length;
    Owned<id<MTLBuffer>> buffer;
    bool resident = false;
  };

  using Pages = std::shared_ptr<void>;  // of memory; every buffer over them has a share

  void require_room(size_t length) const;
  void add_buffer(std::byte* base, size_t length, const Pages& pages);
  // Hands out base + offset; forgets the buffers within when that is freed.
  Buffer hand_out(std::byte* base, size_t length, size_t offset);

  id<MTLDevice> device_;
  const size_t page_;
  Residency residency_;
  std::mutex mutex_;  // a State may be freed by any thread
  std::map<const std::byte*, Region> regions_;
};

}  // namespace flashmoe
