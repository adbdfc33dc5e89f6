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

/// Writes to PATH.tmp-PID in the same folder; finish() flushes to disk and renames. The destructor
/// of an unfinished file removes it; what a killed process left is removed by the next writer of
/// PATH. Every failure throws kIo with the path and the system's reason.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);
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
  std::string path_, temp_path_;
  int fd_ = -1;
  uint64_t size_ = 0;
};

/// Writes a whole text at once.
void write_text_file(const std::string& path, std::string_view text);

}  // namespace tq
