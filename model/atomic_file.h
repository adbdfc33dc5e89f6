// atomic_file - a file that appears under its name only when it is complete and on disk.
//
// Every file tq writes goes through here: an interrupted or failed write leaves the old file as it
// was and nothing else behind.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace tq {

/// What becomes of a file that is there already.
enum class Replace { kNever, kAllowed };

/// The place that writing `path` means: behind its symbolic links, or `path` itself where nothing
/// is there yet. Throws kIo for what is never replaced: an existing file with kNever; a folder, a
/// device, a pipe; a link to nothing; the name of an open descriptor (/dev/stdout,
/// /proc/self/fd/1), whatever is behind it.
std::string output_target(const std::string& path, Replace replace);

/// Writes to TARGET.tmp-PID in the folder of the target; finish() flushes to disk and renames. The
/// destructor of an unfinished file removes it; what a killed process left is removed by the next
/// writer of the target. A new file has the mode 0666 less the umask, another keeps its mode. With
/// kNever, one of several writers of a new file finishes and the others fail. Every failure throws
/// kIo with the path and the system's reason.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path, Replace replace = Replace::kAllowed);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t bytes);
  /// Overwrites bytes written before, without moving the end.
  void write_at(uint64_t offset, const void* data, size_t bytes);
  uint64_t size() const { return size_; }
  /// Where the bytes are until finish().
  const std::string& temp_path() const { return temp_path_; }
  void finish();

 private:
  [[noreturn]] void fail(const std::string& what);
  void open_locked();
  void keep_mode();
  void rename_to_target();
  void forget();
  std::string path_, target_, temp_path_;
  Replace replace_;
  int fd_ = -1, slot_ = -1;
  uint64_t size_ = 0;
};

/// Writes a whole text at once.
void write_text_file(const std::string& path, std::string_view text);

/// Removes what killed writers of `path` left beside it.
void remove_leftovers(const std::string& path);

/// Removes the temporary files of this process. For a signal handler that ends the process.
void remove_unfinished_files() noexcept;

/// Locks an open file or folder for this process; false if another holds it. A file system without
/// locks gives true: nothing is known there. `wait`: until the other lets go.
bool lock_descriptor(int fd, bool wait);
/// True if `path` still names what `fd` was opened from.
bool still_named(int fd, const std::string& path);

}  // namespace tq
