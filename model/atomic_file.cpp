// atomic_file - see atomic_file.h.
#include "model/atomic_file.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <utility>

#include "model/error.h"

namespace tq {

namespace {

constexpr int kMaxLinks = 40;  // as the kernel follows

// Temporary files of this process, for remove_unfinished_files(): a signal handler may neither
// allocate nor wait, so names are copied into fixed places. Files beyond these are only missed
// there. The one global state of this folder.
struct Unfinished {
  std::atomic<bool> taken{false}, named{false};
  char path[PATH_MAX] = {};
};
constinit Unfinished g_unfinished[8];

std::string folder_of(const std::string& path) {
  const std::string folder = std::filesystem::path(path).parent_path().string();
  return folder.empty() ? "." : folder;
}

Error refused(const std::string& path, const std::string& why, const std::string& hint = "") {
  return Error(ErrorKind::kIo, "cannot write output", path, why, hint);
}

std::string read_link(const std::string& path) {
  std::string text(PATH_MAX, '\0');
  const ssize_t n = ::readlink(path.c_str(), text.data(), text.size());
  if (n < 0) throw refused(path, std::strerror(errno));
  text.resize(static_cast<size_t>(n));
  return text;
}

}  // namespace

bool lock_descriptor(int fd, bool wait) {
  int result;
  do {
    result = ::flock(fd, wait ? LOCK_EX : LOCK_EX | LOCK_NB);
  } while (result != 0 && errno == EINTR);
  return result == 0 || errno != EWOULDBLOCK;
}

bool still_named(int fd, const std::string& path) {
  struct stat opened = {}, named = {};
  return ::fstat(fd, &opened) == 0 && ::stat(path.c_str(), &named) == 0 &&
         opened.st_dev == named.st_dev && opened.st_ino == named.st_ino;
}

// A writer holds a lock until it ends, however it ends, so a file whose lock is free has no writer,
// or one that has not come to lock it yet: open_locked() then sees that its file is gone.
void remove_leftovers(const std::string& path) {
  const std::string prefix = std::filesystem::path(path).filename().string() + ".tmp-";
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(folder_of(path), ignored)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(prefix) ||
        name.find_first_not_of("0123456789", prefix.size()) != std::string::npos) {
      continue;
    }
    const int fd = ::open(entry.path().c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) continue;
    // Not lock_descriptor(): where nothing can be locked, nothing is known to be left over.
    if (::flock(fd, LOCK_EX | LOCK_NB) == 0 && still_named(fd, entry.path().string())) {
      ::unlink(entry.path().c_str());
    }
    ::close(fd);
  }
}

void remove_unfinished_files() noexcept {
  for (const Unfinished& file : g_unfinished) {
    if (file.named) ::unlink(file.path);
  }
}

std::string output_target(const std::string& path, Replace replace) {
  std::string target = path;
  if (path.empty()) throw refused(path, "its name is empty", "name a file, for example model.tq");
  for (int n_links = 0; n_links < kMaxLinks; ++n_links) {
    struct statfs system = {};
    if (::statfs(folder_of(target).c_str(), &system) == 0 && system.f_type == PROC_SUPER_MAGIC) {
      throw refused(path, "it names an open descriptor, not a file", "name a file");
    }
    struct stat info = {};
    if (::lstat(target.c_str(), &info) != 0) {
      if (errno != ENOENT) throw refused(path, std::strerror(errno));
      if (n_links > 0) throw refused(path, "it is a symbolic link to nothing, " + target);
      return target;
    }
    if (S_ISLNK(info.st_mode)) {
      const std::string text = read_link(target);
      target = text.starts_with('/') ? text : folder_of(target) + "/" + text;
      continue;
    }
    if (S_ISDIR(info.st_mode)) {
      throw refused(path, "it is a folder", "name a file, for example model.tq");
    }
    if (!S_ISREG(info.st_mode)) throw refused(path, "it is not a regular file");
    if (replace == Replace::kNever) throw refused(path, "it exists", "use --force to replace it");
    return target;
  }
  throw refused(path, std::strerror(ELOOP));
}

AtomicFile::AtomicFile(const std::string& path, Replace replace)
    : path_(path),
      target_(output_target(path, replace)),
      temp_path_(target_ + ".tmp-" + std::to_string(::getpid())),
      replace_(replace) {
  try {
    open_locked();
    remove_leftovers(target_);
    keep_mode();
  } catch (...) {
    forget();
    throw;
  }
}

AtomicFile::~AtomicFile() {
  forget();
}

// Closes and removes what is not finished.
void AtomicFile::forget() {
  if (fd_ >= 0) {
    ::unlink(temp_path_.c_str());
    ::close(std::exchange(fd_, -1));
  }
  if (slot_ < 0) return;
  g_unfinished[slot_].named = false;
  g_unfinished[slot_].taken = false;
  slot_ = -1;
}

// The file is not ours before it is locked: until then another writer takes it for left over. That
// writer holds the lock while it removes the file, so who waits for the lock and finds the file
// gone begins again.
void AtomicFile::open_locked() {
  for (size_t i = 0; i < std::size(g_unfinished) && slot_ < 0; ++i) {
    if (!g_unfinished[i].taken.exchange(true)) slot_ = static_cast<int>(i);
  }
  for (bool cleaned = false;;) {
    // O_EXCL: never follow or truncate something that is already there.
    fd_ = ::open(temp_path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd_ < 0 && errno == EEXIST && !std::exchange(cleaned, true)) {
      remove_leftovers(target_);  // of a process that had our number
      continue;
    }
    if (fd_ < 0) fail("cannot create output file");
    lock_descriptor(fd_, true);
    if (still_named(fd_, temp_path_)) break;
    ::close(std::exchange(fd_, -1));
  }
  if (slot_ < 0 || temp_path_.size() >= sizeof g_unfinished[0].path) return;
  std::memcpy(g_unfinished[slot_].path, temp_path_.c_str(), temp_path_.size() + 1);
  g_unfinished[slot_].named = true;
}

// From the beginning, so that a private file is not readable by others while it is written.
void AtomicFile::keep_mode() {
  struct stat info = {};
  if (replace_ == Replace::kNever || ::stat(target_.c_str(), &info) != 0) return;
  struct stat own = {};
  if (::fstat(fd_, &own) != 0) fail("cannot examine output file");
  // Only root may give a file away; for others it is theirs.
  const bool foreign = own.st_uid != info.st_uid || own.st_gid != info.st_gid;
  if (foreign && ::geteuid() == 0 && ::fchown(fd_, info.st_uid, info.st_gid) != 0) {
    fail("cannot keep the owner of the output file");
  }
  if (own.st_mode != info.st_mode && ::fchmod(fd_, info.st_mode & 07777) != 0) {
    fail("cannot keep the mode of the output file");
  }
}

void AtomicFile::fail(const std::string& what) {
  throw Error(ErrorKind::kIo, what, path_, std::strerror(errno));
}

void AtomicFile::write(const void* data, size_t bytes) {
  write_at(size_, data, bytes);
  size_ += bytes;
}

void AtomicFile::write_at(uint64_t offset, const void* data, size_t bytes) {
  const char* cursor = static_cast<const char*>(data);
  for (size_t left = bytes; left > 0;) {
    const ssize_t n = ::pwrite(fd_, cursor, left, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n == 0) errno = ENOSPC;  // POSIX leaves it open why
    if (n < 0 && errno == EFAULT) {
      throw refused(path_, "what is to be written cannot be read: a file became shorter");
    }
    if (n <= 0) fail("cannot write output file");
    cursor += n;
    offset += static_cast<uint64_t>(n);
    left -= static_cast<size_t>(n);
  }
}

void AtomicFile::rename_to_target() {
  const char *from = temp_path_.c_str(), *to = target_.c_str();
  if (replace_ == Replace::kAllowed) {
    // What was there may have become something else while we worked.
    if (output_target(path_, replace_) != target_) throw refused(path_, "it has been changed");
    if (::rename(from, to) != 0) fail("cannot rename output file");
    return;
  }
  if (::renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE) == 0) return;
  if (errno == EINVAL || errno == ENOSYS) {  // not known to this file system: NFS, for example
    if (::link(from, to) == 0) {
      ::unlink(from);
      return;
    }
    // Neither here: only a look before remains.
    struct stat info = {};
    if (errno != EEXIST && ::lstat(to, &info) != 0 && ::rename(from, to) == 0) return;
    errno = EEXIST;
  }
  if (errno != EEXIST) fail("cannot rename output file");
  throw refused(path_, "it has appeared meanwhile", "use --force to replace it");
}

void AtomicFile::finish() {
  // Data before name: a rename that survives a power cut must not point to missing bytes.
  if (::fsync(fd_) != 0) fail("cannot write output file");
  rename_to_target();
  const int fd = std::exchange(fd_, -1);
  forget();
  if (::close(fd) != 0) fail("cannot close output file");
  const int dir = ::open(folder_of(target_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (dir < 0) return;  // the file itself is safe
  ::fsync(dir);
  ::close(dir);
}

void write_text_file(const std::string& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text.data(), text.size());
  file.finish();
}

}  // namespace tq
