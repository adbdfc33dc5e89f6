// faults - a library for LD_PRELOAD that makes the n-th call of one kind fail. No test by itself:
// inject.py loops over all n.
//
//   TQ_FAULT_KIND   alloc, write, fsync, rename, close, mmap, thread or open
//   TQ_FAULT_FIRST  the call that fails, from 1; 0: none, only count
//   TQ_FAULT_LAST   and all up to this one; absent: that one alone
//   TQ_FAULT_COUNT  file to write the number of calls to when the process ends in the usual way
//
// Nothing here may allocate. The real functions come from dlsym, those of the heap from glibc's own
// names, because dlsym allocates.
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
}

namespace {

std::atomic<long> g_calls{0};

long number_of(const char* name, long absent) {
  const char* text = std::getenv(name);
  if (!text) return absent;
  long value = 0;
  for (; *text >= '0' && *text <= '9'; ++text) value = 10 * value + (*text - '0');
  return value;
}

// True if this call of `kind` is to fail.
bool fails(const char* kind) {
  const char* wanted = std::getenv("TQ_FAULT_KIND");
  if (!wanted || std::strcmp(wanted, kind) != 0) return false;
  const long first = number_of("TQ_FAULT_FIRST", 0);
  const long call = ++g_calls;
  return first > 0 && call >= first && call <= number_of("TQ_FAULT_LAST", first);
}

bool fails(const char* kind, int reason) {
  if (!fails(kind)) return false;
  errno = reason;
  return true;
}

template <typename Function>
Function real(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

__attribute__((destructor)) void report() {
  const char* path = std::getenv("TQ_FAULT_COUNT");
  if (!path) return;
  char text[32];
  const int length = std::snprintf(text, sizeof text, "%ld", g_calls.load());
  const long fd = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  if (fd >= 0) syscall(SYS_write, fd, text, static_cast<size_t>(length));
}

}  // namespace

extern "C" {

void* malloc(size_t bytes) {
  return fails("alloc", ENOMEM) ? nullptr : __libc_malloc(bytes);
}
void* calloc(size_t n, size_t bytes) {
  return fails("alloc", ENOMEM) ? nullptr : __libc_calloc(n, bytes);
}
void* realloc(void* old, size_t bytes) {
  return fails("alloc", ENOMEM) ? nullptr : __libc_realloc(old, bytes);
}
void* memalign(size_t alignment, size_t bytes) {
  return fails("alloc", ENOMEM) ? nullptr : __libc_memalign(alignment, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) {
  return memalign(alignment, bytes);
}
int posix_memalign(void** out, size_t alignment, size_t bytes) {
  void* memory = memalign(alignment, bytes);
  if (!memory) return ENOMEM;
  *out = memory;
  return 0;
}

ssize_t write(int fd, const void* data, size_t bytes) {
  // What is said on stderr is what the test reads.
  if (fd != STDERR_FILENO && fails("write", ENOSPC)) return -1;
  return syscall(SYS_write, fd, data, bytes);
}
ssize_t pwrite64(int fd, const void* data, size_t bytes, off64_t offset) {
  if (fails("write", ENOSPC)) return -1;
  return syscall(SYS_pwrite64, fd, data, bytes, offset);
}
ssize_t pwrite(int fd, const void* data, size_t bytes, off_t offset) {
  return pwrite64(fd, data, bytes, offset);
}
int fsync(int fd) {
  return fails("fsync", EIO) ? -1 : static_cast<int>(syscall(SYS_fsync, fd));
}
int rename(const char* from, const char* to) {
  return fails("rename", EIO) ? -1 : static_cast<int>(syscall(SYS_rename, from, to));
}
int renameat2(int from_dir, const char* from, int to_dir, const char* to, unsigned flags) {
  if (fails("rename", EIO)) return -1;
  return static_cast<int>(syscall(SYS_renameat2, from_dir, from, to_dir, to, flags));
}
int close(int fd) {
  // As on Linux: the descriptor is gone, whatever close says.
  const int result = static_cast<int>(syscall(SYS_close, fd));
  return fails("close", EIO) ? -1 : result;
}

void* mmap64(void* at, size_t bytes, int protection, int flags, int fd, off64_t offset) {
  if (fails("mmap", ENOMEM)) return MAP_FAILED;
  return reinterpret_cast<void*>(syscall(SYS_mmap, at, bytes, protection, flags, fd, offset));
}
void* mmap(void* at, size_t bytes, int protection, int flags, int fd, off_t offset) {
  return mmap64(at, bytes, protection, flags, fd, offset);
}

int open64(const char* path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  const mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  if (fails("open", EMFILE)) return -1;
  return static_cast<int>(syscall(SYS_openat, AT_FDCWD, path, flags, mode));
}
int open(const char* path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  const mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return open64(path, flags, mode);
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*),
                   void* argument) {
  using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const Create create = real<Create>("pthread_create");
  return fails("thread") ? EAGAIN : create(thread, attributes, start, argument);
}

}  // extern "C"
