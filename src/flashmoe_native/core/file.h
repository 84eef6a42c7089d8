// Positional reads from one file, safe from any number of threads at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace flashmoe {

class File {
 public:
  // What read_direct() asks of offsets, lengths and addresses: to be multiples of it. macOS asks
  // for nothing.
#ifdef __APPLE__
  static constexpr int64_t kDirectUnit = 1;
#else
  static constexpr int64_t kDirectUnit = 4096;
#endif

  // Opens for reading; throws ReadError naming the file.
  explicit File(std::string path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // Reads exactly `length` bytes at `offset`, or throws ReadError with file, offset, expected,
  // found. Returns how many of them were in the page cache, or -1 where the system cannot tell. It
  // can on Linux: a read with RWF_NOWAIT gives what is cached and refuses to wait for the disk.
  int64_t read(int64_t offset, int64_t length, std::byte* to) const;
  // Lets the page cache forget what it holds of the range, where the system takes such advice.
  void forget(int64_t offset, int64_t length) const;

  // Makes read_direct() possible; false where the system or the file system has no such reads.
  bool open_direct();
  // Reads past the page cache, into which nothing is put: at least `length` bytes at `offset`, and
  // up to the next unit where the file goes on. All three are multiples of the unit, but for
  // `length`. Throws ReadError likewise.
  void read_direct(int64_t offset, int64_t length, std::byte* to) const;

  // Maps `length` bytes from `offset`, a multiple of the page size, to be read; munmap frees them.
  // Throws ReadError.
  std::byte* map(int64_t offset, size_t length) const;

  // Throws ReadError where the file is shorter than when it was opened.
  void require_whole() const;

  const std::string& path() const { return path_; }

 private:
  [[noreturn]] void fail_short(int fd, int64_t offset, int64_t length, int64_t done) const;

  std::string path_;
  int fd_ = -1;
  int64_t size_ = 0;  // when it was opened
  int direct_ = -1;
};

}  // namespace flashmoe
