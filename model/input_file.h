// input_file - opening what others wrote: what may stand behind a path, and whether it stays as it
// was while we read it.
//
// Files of a model are regular files. A pipe or a device is refused, never waited for. A text that
// the user names (a prompt, a calibration text) may be a pipe: bash writes <(command) as one.
#pragma once

#include <sys/stat.h>

#include <cstddef>
#include <string>
#include <string_view>

namespace tq {

enum class Accept { kRegularFiles, kPipesToo };

/// An open file. Throws kIo with the system's reason, or with what else it is.
class InputFile {
 public:
  explicit InputFile(const std::string& path, Accept accept = Accept::kRegularFiles);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;
  /// Up to `bytes` from where the last read ended; 0 at the end.
  size_t read(void* out, size_t bytes);
  /// Of a regular file, when it was opened; 0 of a pipe.
  size_t size() const { return S_ISREG(info_.st_mode) ? static_cast<size_t>(info_.st_size) : 0; }
  int descriptor() const { return fd_; }
  const std::string& path() const { return path_; }
  /// Throws kIo if the file was written to, or cut, since it was opened (size, time of change).
  void check_unchanged() const;

 private:
  std::string path_;
  int fd_ = -1;
  struct stat info_ = {};
};

/// Read-only mapping of a whole file. Throws kIo; kBadData for a Git LFS pointer. The size is the
/// one at open time: reading what another process has cut off since raises SIGBUS.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  const std::string& path() const { return file_.path(); }
  /// As InputFile.
  void check_unchanged() const { file_.check_unchanged(); }
  /// Tells the kernel that this span will not be needed soon, so that resident memory stays small.
  void release(const std::byte* begin, size_t bytes) const;
  /// Printable path of the mapped file that has this address, or null. For a signal handler.
  static const char* path_at(const void* address) noexcept;

 private:
  InputFile file_;
  std::string printable_path_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

/// True if `path` is a regular file that begins with these bytes. Never waits. Throws kIo if such a
/// file cannot be read: it would be taken for something else.
bool begins_with(const std::string& path, std::string_view magic);

/// Throws kBadData if this is a Git LFS pointer: what `git clone` leaves in place of a large file
/// where git-lfs is not installed.
void refuse_lfs_pointer(std::string_view contents, const std::string& path);
/// The same for the file at `path`, if it is a regular one.
void refuse_lfs_pointer_at(const std::string& path);

}  // namespace tq
