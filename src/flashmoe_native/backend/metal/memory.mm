#include "backend/metal/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>

#include "core/error.h"
#include "core/memory.h"

namespace flashmoe {
namespace {

constexpr size_t kPiece = size_t{256} << 20;  // of memory in units: what is wired at a time

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
    : device_(device), page_(static_cast<size_t>(::sysconf(_SC_PAGESIZE))), residency_(device) {}

void DeviceMemory::require_room(size_t length) const {
  const uint64_t used = [device_ currentAllocatedSize];
  const uint64_t limit = [device_ recommendedMaxWorkingSetSize];
  if (used + length > limit) {
    throw DeviceError("Metal: " + gigabytes(length) + " more than the " + gigabytes(used) +
                      " in use; this GPU may use " + gigabytes(limit) +
                      ". Give experts a smaller cache (cache=0 uses the page cache), shorten the "
                      "context, close other models, or use backend=\"cpu\"");
  }
}

Buffer DeviceMemory::allocate(size_t bytes, size_t unit) {
  const size_t length = round_up(std::max<size_t>(bytes, 1), page_);
  require_room(length);
  const size_t most = [device_ maxBufferLength];
  size_t piece = length;
  if (unit > 0 && unit % page_ == 0) {
    piece = std::min(length, std::max(std::min(kPiece, most) / unit, size_t{1}) * unit);
  }
  if (piece > most) {
    throw DeviceError("Metal: " + gigabytes(piece) + " in one piece; this GPU allows " +
                      gigabytes(most) + ". Shorten the context, or use backend=\"cpu\"");
  }
  Buffer memory = allocate_pages(length);
  std::byte* const base = memory.get();
  const Pages pages(memory.release(), [free = memory.get_deleter()](void* data) {
    free(static_cast<std::byte*>(data));
  });
  Buffer result = hand_out(base, length, 0);
  for (size_t at = 0; at < length; at += piece) {
    add_buffer(base + at, std::min(piece, length - at), pages);
  }
  return result;
}

Buffer DeviceMemory::map(const File& file, int64_t offset, int64_t length) {
  const int64_t begin = offset / static_cast<int64_t>(page_) * static_cast<int64_t>(page_);
  const size_t mapped = round_up(static_cast<size_t>(offset + length - begin), page_);
  if (mapped > [device_ maxBufferLength]) return nullptr;
  require_room(mapped);
  std::byte* const base = file.map(begin, mapped);
  const Pages pages(base, [mapped](void* data) { ::munmap(data, mapped); });
  Buffer result = hand_out(base, mapped, static_cast<size_t>(offset - begin));
  add_buffer(base, mapped, pages);
  return result;
}

void DeviceMemory::add_buffer(std::byte* base, size_t length, const Pages& pages) {
  const Pages share = pages;
  auto buffer =
      Owned<id<MTLBuffer>>::adopt([device_ newBufferWithBytesNoCopy:base
                                                             length:length
                                                            options:MTLResourceStorageModeShared
                                                        deallocator:^(void*, NSUInteger) {
                                                          (void)share;  // until Metal is done
                                                        }]);
  if (!buffer) throw DeviceError("Metal: no buffer over " + gigabytes(length) + " of memory");
  std::lock_guard lock(mutex_);
  regions_.emplace(base, Region{length, std::move(buffer)});
}

Buffer DeviceMemory::hand_out(std::byte* base, size_t length, size_t offset) {
  return Buffer(base + offset, [this, base, length](std::byte*) {
    std::lock_guard lock(mutex_);
    const auto begin = regions_.lower_bound(base), end = regions_.lower_bound(base + length);
    for (auto at = begin; at != end; ++at) residency_.remove(at->second.buffer.get());
    regions_.erase(begin, end);
  });
}

uint64_t DeviceMemory::address(const void* pointer) {
  const auto* data = static_cast<const std::byte*>(pointer);
  std::lock_guard lock(mutex_);
  const auto after = regions_.upper_bound(data);
  if (after != regions_.begin()) {
    auto& [base, region] = *std::prev(after);
    if (data < base + region.length) {
      if (!region.resident) residency_.add(region.buffer.get());
      region.resident = true;
      return [region.buffer.get() gpuAddress] + static_cast<uint64_t>(data - base);
    }
  }
  throw std::logic_error("Metal: a pointer into memory that is not the backend's");
}

}  // namespace flashmoe
