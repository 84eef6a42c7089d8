// Memory that frees itself, and large aligned memory straight from the operating system.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

namespace flashmoe {

using Buffer = std::unique_ptr<std::byte[], std::function<void(std::byte*)>>;

// `bytes` zeroed bytes, page-aligned; from 2 MiB on 2 MiB-aligned, and on huge pages where the
// system gives them. No page is touched before its first use. Throws std::bad_alloc.
Buffer allocate_pages(size_t bytes);

// Memory that grows and is reused; its contents are lost when it grows. Aligned to 64 bytes or
// more.
class Scratch {
 public:
  template <class T>
  T* get(size_t count) {
    return static_cast<T*>(reserve(count * sizeof(T)));
  }

  int64_t bytes() const { return static_cast<int64_t>(capacity_); }

 private:
  void* reserve(size_t bytes);

  Buffer buffer_;
  size_t capacity_ = 0;
};

}  // namespace flashmoe
