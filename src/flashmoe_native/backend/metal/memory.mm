#include "backend/metal/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <stdexcept>
#include <string>

#include "core/error.h"
#include "core/memory.h"

namespace flashmoe {
namespace {

size_t round_up(size_t value, size_t unit) {
  return (value + unit - 1) / unit * unit;
}

std::string gigabytes(uint64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f GB", static_cast<double>(bytes) / 1e9);
  return text;
}

}  // namespace

DeviceMemory::DeviceMemory(id<MTLDevice> device)
    : device_(device), page_(static_cast<size_t>(::sysconf(_SC_PAGESIZE))) {}

void DeviceMemory::require_room(size_t length) const {
  const uint64_t used = [device_ currentAllocatedSize];
  const uint64_t limit = [device_ recommendedMaxWorkingSetSize];
  if (length > [device_ maxBufferLength]) {
    throw DeviceError("Metal: " + gigabytes(length) + " in one piece; this GPU allows " +
                      gigabytes([device_ maxBufferLength]) +
                      ". Give experts a smaller cache (cache=0 uses the page cache)");
  }
  if (used + length > limit) {
    throw DeviceError("Metal: " + gigabytes(length) + " more than the " + gigabytes(used) +
                      " in use; this GPU may use " + gigabytes(limit) +
                      ". Give experts a smaller cache (cache=0 uses the page cache), shorten the "
                      "context, close other models, or use backend=\"cpu\"");
  }
}

Buffer DeviceMemory::allocate(size_t bytes) {
  const size_t length = round_up(bytes > 0 ? bytes : 1, page_);
  require_room(length);
  Buffer pages = allocate_pages(length);
  const auto free_pages = pages.get_deleter();
  Buffer result = wrap(pages.get(), length, 0, ^(void* pointer, NSUInteger) {
    free_pages(static_cast<std::byte*>(pointer));
  });
  pages.release();
  return result;
}

Buffer DeviceMemory::map(const File& file, int64_t offset, int64_t length) {
  if (offset % kWeightAlignment != 0) return nullptr;
  const int64_t begin = offset / static_cast<int64_t>(page_) * static_cast<int64_t>(page_);
  const size_t pages = round_up(static_cast<size_t>(offset + length - begin), page_);
  require_room(pages);
  std::byte* base = file.map(begin, pages);
  return wrap(base, pages, static_cast<size_t>(offset - begin),
              ^(void* pointer, NSUInteger mapped) {
                ::munmap(pointer, mapped);
              });
}

Buffer DeviceMemory::wrap(std::byte* base, size_t length, size_t offset, Deallocator deallocator) {
  auto buffer =
      Owned<id<MTLBuffer>>::adopt([device_ newBufferWithBytesNoCopy:base
                                                             length:length
                                                            options:MTLResourceStorageModeShared
                                                        deallocator:deallocator]);
  if (!buffer) throw DeviceError("Metal: no buffer over " + gigabytes(length) + " of memory");
  std::lock_guard lock(mutex_);
  regions_.emplace(base, Region{length, std::move(buffer)});
  return Buffer(base + offset, [this](std::byte* data) { forget(data); });
}

void DeviceMemory::forget(const std::byte* data) {
  std::lock_guard lock(mutex_);
  regions_.erase(std::prev(regions_.upper_bound(data)));
}

DeviceMemory::Place DeviceMemory::find(const void* pointer) const {
  const auto& [base, region] = this->region(pointer);
  return {region.buffer.get(),
          static_cast<NSUInteger>(static_cast<const std::byte*>(pointer) - base)};
}

const std::byte* DeviceMemory::base(const void* pointer) const {
  return region(pointer).first;
}

const std::pair<const std::byte* const, DeviceMemory::Region>& DeviceMemory::region(
    const void* pointer) const {
  const auto* data = static_cast<const std::byte*>(pointer);
  std::lock_guard lock(mutex_);
  const auto after = regions_.upper_bound(data);
  if (after != regions_.begin()) {
    const auto& found = *std::prev(after);
    if (data < found.first + found.second.length) return found;
  }
  throw std::logic_error("Metal: a pointer into memory that is not the backend's");
}

}  // namespace flashmoe
