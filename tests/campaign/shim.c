// LD_PRELOAD library: lets the Nth call of one kind fail, of those on files below a directory.
//     gcc -shared -fPIC -O2 shim.c -o shim.so -ldl
// Python arms it through ctypes. A file descriptor counts where its path began with the prefix.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

// In the order of OPERATIONS in inject.py.
enum Operation { OPEN, READ, PREAD, FSTAT, STAT, MAP, WRITE, FSYNC, RENAME, UNLINK, MKDIR, TRUNCATE,
                 LOCK, THREAD, SEEK, STATVFS, LIST, CLOSE, NEW, CHMOD, OPERATIONS };
// In the order of MODES in inject.py.
enum Mode { ONCE, ALWAYS, SHORT, END, INTERRUPTED };

enum { MAX_FDS = 65536 };
static atomic_int armed, operation, mode, code, fired;
static atomic_long nth, count[OPERATIONS];
static char prefix[4096];
static atomic_char below[MAX_FDS];  // whether a descriptor is of a file below the prefix

void shim_arm(int o, long n, int m, int c, const char* p) {
  armed = 0;
  operation = o;
  nth = n;
  mode = m;
  code = c;
  fired = 0;
  strncpy(prefix, p, sizeof prefix - 1);
  for (int i = 0; i < OPERATIONS; ++i) count[i] = 0;
  armed = 1;
}
int shim_disarm(void) {
  armed = 0;
  return fired;
}
void shim_watch(const char* p) { strncpy(prefix, p, sizeof prefix - 1); }

enum Verdict { GO_ON, FAIL, HALF, NOTHING };

static enum Verdict verdict(enum Operation o) {
  if (!armed || (int)o != operation) return GO_ON;
  const long now = ++count[o];
  if (mode == INTERRUPTED ? now % 3 == 0 : mode == ONCE || mode == END ? now != nth : now < nth) {
    return GO_ON;
  }
  ++fired;
  if (mode == SHORT) return HALF;
  if (mode == END) return NOTHING;
  errno = code;
  return FAIL;
}

static int is_below(const char* path) {
  return prefix[0] && path && strstr(path, prefix) != NULL;
}
static int is_marked(int fd) { return fd >= 0 && fd < MAX_FDS && below[fd]; }
static int mark(int fd, const char* path) {
  if (fd >= 0 && fd < MAX_FDS) below[fd] = (char)is_below(path);
  return fd;
}

#define REAL(result, name, ...)                                 \
  static result (*real)(__VA_ARGS__);                           \
  if (!real) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define PATH_CALL(o, result, failure, name, parameters, arguments, path, ...) \
  result name parameters {                                                    \
    REAL(result, name, __VA_ARGS__);                                          \
    if (is_below(path) && verdict(o) == FAIL) return failure;                 \
    return real arguments;                                                    \
  }
#define FD_CALL(o, result, failure, name, parameters, arguments, fd, ...) \
  result name parameters {                                                \
    REAL(result, name, __VA_ARGS__);                                      \
    if (is_marked(fd) && verdict(o) == FAIL) return failure;              \
    return real arguments;                                                \
  }
#define TRANSFER(o, name, pointer, extra, extra_arguments, ...)           \
  ssize_t name(int fd, pointer buffer, size_t size extra) {               \
    REAL(ssize_t, name, __VA_ARGS__);                                     \
    if (is_marked(fd)) {                                                  \
      const enum Verdict v = verdict(o);                                  \
      if (v == FAIL) return -1;                                           \
      if (v == NOTHING) return 0;                                         \
      if (v == HALF && size > 1) size /= 2;                               \
    }                                                                     \
    return real(fd, buffer, size extra_arguments);                        \
  }
#define COMMA ,

#define OPEN_CALL(name)                                                         \
  int name(const char* path, int flags, ...) {                                  \
    REAL(int, name, const char*, int, ...);                                     \
    va_list list;                                                               \
    va_start(list, flags);                                                      \
    const mode_t permissions = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; \
    va_end(list);                                                               \
    if (is_below(path) && verdict(OPEN) == FAIL) return -1;                     \
    return mark(real(path, flags, permissions), path);                          \
  }
#define OPENAT_CALL(name)                                                       \
  int name(int at, const char* path, int flags, ...) {                          \
    REAL(int, name, int, const char*, int, ...);                                \
    va_list list;                                                               \
    va_start(list, flags);                                                      \
    const mode_t permissions = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; \
    va_end(list);                                                               \
    if (is_below(path) && verdict(OPEN) == FAIL) return -1;                     \
    return mark(real(at, path, flags, permissions), path);                      \
  }
OPEN_CALL(open)
OPEN_CALL(open64)
OPENAT_CALL(openat)
OPENAT_CALL(openat64)

int close(int fd) {
  REAL(int, close, int);
  const int failing = is_marked(fd) && verdict(CLOSE) == FAIL;
  if (fd >= 0 && fd < MAX_FDS) below[fd] = 0;
  const int result = real(fd);
  if (!failing) return result;
  errno = code;
  return -1;
}

TRANSFER(READ, read, void*, , , int, void*, size_t)
TRANSFER(PREAD, pread, void*, COMMA off_t at, COMMA at, int, void*, size_t, off_t)
TRANSFER(PREAD, pread64, void*, COMMA off64_t at, COMMA at, int, void*, size_t, off64_t)
TRANSFER(WRITE, write, const void*, , , int, const void*, size_t)
TRANSFER(WRITE, pwrite, const void*, COMMA off_t at, COMMA at, int, const void*, size_t, off_t)
TRANSFER(WRITE, pwrite64, const void*, COMMA off64_t at, COMMA at, int, const void*, size_t, off64_t)

#define VECTORED(name, offset)                                                                \
  ssize_t name(int fd, const struct iovec* parts, int n, offset at, int flags) {              \
    REAL(ssize_t, name, int, const struct iovec*, int, offset, int);                          \
    if (is_marked(fd)) {                                                                      \
      const enum Verdict v = verdict(PREAD);                                                  \
      if (v == FAIL) return -1;                                                               \
      if (v == NOTHING) return 0;                                                             \
      struct iovec half = parts[0];                                                           \
      if (v == HALF && half.iov_len > 1) {                                                    \
        half.iov_len /= 2;                                                                    \
        return real(fd, &half, 1, at, flags);                                                 \
      }                                                                                       \
    }                                                                                         \
    return real(fd, parts, n, at, flags);                                                     \
  }
VECTORED(preadv2, off_t)
VECTORED(preadv64v2, off64_t)

FD_CALL(FSTAT, int, -1, fstat, (int fd, struct stat* s), (fd, s), fd, int, struct stat*)
FD_CALL(FSTAT, int, -1, fstat64, (int fd, struct stat64* s), (fd, s), fd, int, struct stat64*)
FD_CALL(FSYNC, int, -1, fsync, (int fd), (fd), fd, int)
FD_CALL(TRUNCATE, int, -1, ftruncate, (int fd, off_t n), (fd, n), fd, int, off_t)
FD_CALL(TRUNCATE, int, -1, ftruncate64, (int fd, off64_t n), (fd, n), fd, int, off64_t)
FD_CALL(LOCK, int, -1, flock, (int fd, int how), (fd, how), fd, int, int)
FD_CALL(SEEK, off_t, -1, lseek, (int fd, off_t at, int whence), (fd, at, whence), fd, int, off_t, int)
FD_CALL(SEEK, off64_t, -1, lseek64, (int fd, off64_t at, int whence), (fd, at, whence), fd, int,
        off64_t, int)
FD_CALL(CHMOD, int, -1, fchmod, (int fd, mode_t m), (fd, m), fd, int, mode_t)

PATH_CALL(STAT, int, -1, stat, (const char* path, struct stat* s), (path, s), path, const char*,
          struct stat*)
PATH_CALL(STAT, int, -1, stat64, (const char* path, struct stat64* s), (path, s), path,
          const char*, struct stat64*)
PATH_CALL(STAT, int, -1, lstat, (const char* path, struct stat* s), (path, s), path, const char*,
          struct stat*)
PATH_CALL(STAT, int, -1, lstat64, (const char* path, struct stat64* s), (path, s), path,
          const char*, struct stat64*)
PATH_CALL(STAT, int, -1, fstatat64, (int at, const char* path, struct stat64* s, int flags),
          (at, path, s, flags), path, int, const char*, struct stat64*, int)
PATH_CALL(RENAME, int, -1, rename, (const char* from, const char* to), (from, to), to, const char*,
          const char*)
PATH_CALL(UNLINK, int, -1, unlink, (const char* path), (path), path, const char*)
PATH_CALL(MKDIR, int, -1, mkdir, (const char* path, mode_t m), (path, m), path, const char*, mode_t)
PATH_CALL(STATVFS, int, -1, statvfs64, (const char* path, struct statvfs64* s), (path, s), path,
          const char*, struct statvfs64*)
PATH_CALL(LIST, DIR*, NULL, opendir, (const char* path), (path), path, const char*)

#define MAP_CALL(name, offset)                                                          \
  void* name(void* at, size_t n, int protection, int flags, int fd, offset from) {      \
    REAL(void*, name, void*, size_t, int, int, int, offset);                            \
    if (fd < 0 && verdict(MAP) == FAIL) return MAP_FAILED;                              \
    return real(at, n, protection, flags, fd, from);                                    \
  }
MAP_CALL(mmap, off_t)
MAP_CALL(mmap64, off64_t)

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*),
                   void* argument) {
  REAL(int, pthread_create, pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  return verdict(THREAD) == FAIL ? EAGAIN : real(thread, attributes, start, argument);
}

// operator new of the native module, which throws std::bad_alloc.
void* shim_new(size_t size) __asm__("_Znwm");
void* shim_new(size_t size) {
  if (armed && operation == NEW) {
    Dl_info caller;
    const int native = dladdr(__builtin_return_address(0), &caller) && caller.dli_fname &&
                       strstr(caller.dli_fname, "_native");
    if (native && verdict(NEW) == FAIL) {
      void* library = dlopen("libstdc++.so.6", RTLD_LAZY | RTLD_NOLOAD);
      ((void (*)(void))dlsym(library, "_ZSt17__throw_bad_allocv"))();
    }
  }
  return malloc(size ? size : 1);
}
