#include "core/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "core/round.h"

namespace flashmoe {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

#ifndef __SANITIZE_ADDRESS__
// What release() must unmap; it lies at the end of the page before the memory handed out.
struct Mapping {
  void* base;
  size_t length;
};

void release(std::byte* data) {
  const Mapping mapping = reinterpret_cast<Mapping*>(data)[-1];
  ::munmap(mapping.base, mapping.length);
}
#endif

}  // namespace

#ifdef __SANITIZE_ADDRESS__
// Memory that ends where it was asked to, so that AddressSanitizer sees what goes past its end.
Buffer allocate_pages(size_t bytes) {
  void* data = nullptr;
  const size_t alignment = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  if (::posix_memalign(&data, alignment, std::max<size_t>(bytes, 1)) != 0) throw std::bad_alloc();
  std::memset(data, 0, bytes);
  return Buffer(static_cast<std::byte*>(data), [](std::byte* memory) { std::free(memory); });
}
#else
Buffer allocate_pages(size_t bytes) {
  const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  const size_t alignment = bytes >= kHugePage ? kHugePage : page;
  if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
  const size_t length = round_up(bytes, page) + page + (alignment - page);
  void* base = ::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  auto* data =
      reinterpret_cast<std::byte*>(round_up(reinterpret_cast<uintptr_t>(base) + page, alignment));
#ifdef MADV_HUGEPAGE
  // Only whole huge pages: a tail rounded up would cost memory. Refusal is no error.
  if (bytes >= kHugePage) ::madvise(data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  reinterpret_cast<Mapping*>(data)[-1] = {base, length};
  return Buffer(data, release);
}
#endif

void* Scratch::reserve(size_t bytes) {
  if (bytes > capacity_) {
    const size_t grown = std::max(bytes, capacity_ + capacity_ / 2);
    buffer_.reset();
    capacity_ = 0;
    buffer_ = allocate_pages(grown);
    capacity_ = grown;
  }
  return buffer_.get();
}

}  // namespace flashmoe
