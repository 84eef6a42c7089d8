#include "core/file.h"

#include <fcntl.h>
#include <sys/mman.h>
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
  struct stat status{};
  fstat(fd_, &status);
  size_ = status.st_size;
  // Every read says exactly what is wanted; reading ahead would fetch experts that nobody asked
  // for. Refusal is no error.
#if defined(POSIX_FADV_RANDOM)
  posix_fadvise(fd_, 0, 0, POSIX_FADV_RANDOM);
#elif defined(F_RDAHEAD)
  fcntl(fd_, F_RDAHEAD, 0);
#endif
}

File::~File() {
  close(fd_);
  if (direct_ >= 0) close(direct_);
}

bool File::open_direct() {
  if (direct_ >= 0) return true;
#if defined(O_DIRECT)
  direct_ = open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  // Some file systems take the flag and then refuse to read, each with its own word for it.
  alignas(kDirectUnit) std::byte unit[kDirectUnit];
  if (direct_ >= 0 && pread(direct_, unit, sizeof unit, 0) < 0 && errno != EINTR) {
    close(direct_);
    direct_ = -1;
  }
#elif defined(F_NOCACHE)
  direct_ = open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (direct_ >= 0) {
    fcntl(direct_, F_NOCACHE, 1);
    fcntl(direct_, F_RDAHEAD, 0);
  }
#endif
  return direct_ >= 0;
}

int64_t File::read(int64_t offset, int64_t length, std::byte* to) const {
  const int64_t cached = read_cached(fd_, offset, length, to);
  int64_t done = cached < 0 ? 0 : cached;
  while (done < length) {
    const ssize_t got = pread(fd_, to + done, static_cast<size_t>(length - done), offset + done);
    if (got > 0) {
      done += got;
    } else if (got == 0) {
      fail_short(fd_, offset, length, done);
    } else if (errno != EINTR) {
      throw ReadError(describe(path_, offset, length) + ": " + std::strerror(errno));
    }
  }
  return cached;
}

void File::forget([[maybe_unused]] int64_t offset, [[maybe_unused]] int64_t length) const {
#ifdef POSIX_FADV_DONTNEED
  posix_fadvise(fd_, offset, length, POSIX_FADV_DONTNEED);
#endif
}

void File::read_direct(int64_t offset, int64_t length, std::byte* to) const {
  const int64_t whole = (length + kDirectUnit - 1) / kDirectUnit * kDirectUnit;
  int64_t done = 0;
  int fd = direct_;
  while (done < length) {
    const ssize_t got = pread(fd, to + done, static_cast<size_t>(whole - done), offset + done);
    if (got > 0) {
      done += got;
      // What is not a whole unit is the end of the file.
      if (fd == direct_ && done < length && done % kDirectUnit != 0) {
        fail_short(fd, offset, length, done);
      }
    } else if (got == 0) {
      fail_short(fd, offset, length, done);
    } else if (fd == direct_ && (errno == EINVAL || errno == ENOTSUP)) {
      fd = fd_;  // a file system that reads some of its files directly
    } else if (errno != EINTR) {
      throw ReadError(describe(path_, offset, length) + ": " + std::strerror(errno));
    }
  }
}

void File::fail_short(int fd, int64_t offset, int64_t length, int64_t done) const {
  struct stat status{};
  fstat(fd, &status);
  throw ReadError(describe(path_, offset, length) + ": the file ends after " +
                  std::to_string(done) + " of them (it is now " + std::to_string(status.st_size) +
                  " bytes long); it changed since it was opened");
}

void File::require_whole() const {
  struct stat status{};
  if (fstat(fd_, &status) == 0 && status.st_size >= size_) return;
  throw ReadError(path_ + ": expected " + std::to_string(size_) + " bytes, found " +
                  std::to_string(status.st_size) +
                  "; it changed since it was opened: restore it, and open the model again");
}

std::byte* File::map(int64_t offset, size_t length) const {
  void* base = mmap(nullptr, length, PROT_READ, MAP_SHARED, fd_, offset);
  if (base == MAP_FAILED) {
    throw ReadError(describe(path_, offset, static_cast<int64_t>(length)) +
                    ": cannot map it: " + std::strerror(errno));
  }
  return static_cast<std::byte*>(base);
}

}  // namespace flashmoe
