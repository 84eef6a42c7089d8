#include "core/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "core/error.h"

namespace flashmoe {
namespace {

std::string describe(const std::string& path, int64_t offset, int64_t length) {
  return path + ": reading " + std::to_string(length) + " bytes at offset " +
         std::to_string(offset);
}

// What the page cache holds of the range's beginning; -1 where the system or file system cannot
// tell.
int64_t read_cached([[maybe_unused]] int fd, [[maybe_unused]] int64_t offset,
                    [[maybe_unused]] int64_t length, [[maybe_unused]] std::byte* to) {
#ifdef RWF_NOWAIT
  int64_t done = 0;
  while (done < length) {
    const iovec part{to + done, static_cast<size_t>(length - done)};
    const ssize_t got = preadv2(fd, &part, 1, offset + done, RWF_NOWAIT);
    if (got > 0) {
      done += got;
    } else if (got < 0 && errno == EINTR) {
      continue;
    } else if (got < 0 && errno != EAGAIN) {
      return -1;
    } else {
      break;
    }
  }
  return done;
#else
  return -1;
#endif
}

}  // namespace

File::File(std::string path)
    : path_(std::move(path)), fd_(open(path_.c_str(), O_RDONLY | O_CLOEXEC)) {
  if (fd_ < 0) throw ReadError(path_ + ": cannot open: " + std::strerror(errno));
}

File::~File() {
  close(fd_);
}

int64_t File::read(int64_t offset, int64_t length, std::byte* to) const {
  const int64_t cached = read_cached(fd_, offset, length, to);
  int64_t done = cached < 0 ? 0 : cached;
  while (done < length) {
    const ssize_t got = pread(fd_, to + done, static_cast<size_t>(length - done), offset + done);
    if (got > 0) {
      done += got;
    } else if (got == 0) {
      struct stat status{};
      fstat(fd_, &status);
      throw ReadError(describe(path_, offset, length) + ": the file ends after " +
                      std::to_string(done) + " of them (it is now " +
                      std::to_string(status.st_size) +
                      " bytes long); it changed since it was opened");
    } else if (errno != EINTR) {
      throw ReadError(describe(path_, offset, length) + ": " + std::strerror(errno));
    }
  }
  return cached;
}

}  // namespace flashmoe
