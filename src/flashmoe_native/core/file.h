// Positional reads from one file, safe from any number of threads at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace flashmoe {

class File {
 public:
  // Opens for reading; throws ReadError naming the file.
  explicit File(std::string path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // Reads exactly `length` bytes at `offset`, or throws ReadError with file, offset, expected,
  // found. Returns how many of them were in the page cache, or -1 where the system cannot tell. It
  // can on Linux: a read with RWF_NOWAIT gives what is cached and refuses to wait for the disk.
  int64_t read(int64_t offset, int64_t length, std::byte* to) const;

  const std::string& path() const { return path_; }

 private:
  std::string path_;
  int fd_ = -1;
};

}  // namespace flashmoe
