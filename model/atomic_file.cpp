// atomic_file - see atomic_file.h.
#include "model/atomic_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "model/error.h"

namespace tq {

namespace {

std::string folder_of(const std::string& path) {
  const std::string folder = std::filesystem::path(path).parent_path().string();
  return folder.empty() ? "." : folder;
}

// Removes what a killed process left of `path`. A writer holds a lock until it ends, however it
// ends, so a file whose lock is free has no writer.
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
    if (::flock(fd, LOCK_EX | LOCK_NB) == 0) ::unlink(entry.path().c_str());
    ::close(fd);
  }
}

}  // namespace

AtomicFile::AtomicFile(const std::string& path)
    : path_(path), temp_path_(path + ".tmp-" + std::to_string(::getpid())) {
  remove_leftovers(path);
  // O_EXCL: never follow or truncate something that is already there.
  fd_ = ::open(temp_path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (fd_ < 0) fail("cannot create output file");
  ::flock(fd_, LOCK_EX | LOCK_NB);  // a file system without locks only keeps leftovers
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(temp_path_.c_str());
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
    if (n <= 0) fail("cannot write output file");
    cursor += n;
    offset += static_cast<uint64_t>(n);
    left -= static_cast<size_t>(n);
  }
}

void AtomicFile::finish() {
  // Data before name: a rename that survives a power cut must not point to missing bytes.
  if (::fsync(fd_) != 0) fail("cannot write output file");
  if (::rename(temp_path_.c_str(), path_.c_str()) != 0) fail("cannot rename output file");
  if (::close(std::exchange(fd_, -1)) != 0) fail("cannot close output file");
  const int dir = ::open(folder_of(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
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
