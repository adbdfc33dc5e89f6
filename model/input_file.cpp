// input_file - see input_file.h.
#include "model/input_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>

#include "model/error.h"

namespace tq {
namespace {

constexpr size_t kMaxPointerBytes = 1024;  // of a Git LFS pointer, by its specification

// The living mappings, for path_at(): a signal handler may not take a lock. One beyond these is
// only missed there.
constinit std::atomic<const MappedFile*> g_mappings[1024];

Error cannot(const char* what, const std::string& path) {
  const bool memory = errno == ENOMEM;
  return Error(memory ? ErrorKind::kResource : ErrorKind::kIo, what, path, std::strerror(errno));
}

const char* kind_of(mode_t mode) {
  if (S_ISFIFO(mode)) return "it is a pipe";
  if (S_ISSOCK(mode)) return "it is a socket";
  if (S_ISCHR(mode) || S_ISBLK(mode)) return "it is a device";
  return "it is not a file";
}

void refuse_pointer(InputFile& file) {
  if (file.size() > kMaxPointerBytes) return;
  std::string contents(kMaxPointerBytes + 1, '\0');
  contents.resize(file.read(contents.data(), contents.size()));
  refuse_lfs_pointer(contents, file.path());
}

}  // namespace

InputFile::InputFile(const std::string& path, Accept accept) : path_(path) {
  // Looked at before it is opened: opening a pipe waits for its writer, and a device may do
  // anything. O_NONBLOCK for what takes its place in between.
  if (::stat(path.c_str(), &info_) != 0) throw cannot("cannot open file", path);
  const bool pipe = S_ISFIFO(info_.st_mode) || S_ISCHR(info_.st_mode);
  if (S_ISDIR(info_.st_mode)) {
    errno = EISDIR;
    throw cannot("cannot read file", path);
  }
  if (!S_ISREG(info_.st_mode) && !(pipe && accept == Accept::kPipesToo)) {
    throw Error(ErrorKind::kIo, "cannot read file", path, kind_of(info_.st_mode),
                "expected a regular file");
  }
  fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY | (pipe ? 0 : O_NONBLOCK));
  if (fd_ < 0) throw cannot("cannot open file", path);
  const bool regular = S_ISREG(info_.st_mode);
  if (::fstat(fd_, &info_) == 0 && S_ISREG(info_.st_mode) == regular) return;
  ::close(fd_);
  throw Error(ErrorKind::kIo, "cannot read file", path, "it was replaced while it was opened");
}

InputFile::~InputFile() {
  ::close(fd_);
}

size_t InputFile::read(void* out, size_t bytes) {
  ssize_t n;
  do {
    n = ::read(fd_, out, bytes);
  } while (n < 0 && errno == EINTR);
  if (n < 0) throw cannot("cannot read file", path_);
  return static_cast<size_t>(n);
}

void InputFile::check_unchanged() const {
  struct stat now = {};
  if (::fstat(fd_, &now) != 0) throw cannot("cannot examine file", path_);
  if (now.st_size == info_.st_size && now.st_mtim.tv_sec == info_.st_mtim.tv_sec &&
      now.st_mtim.tv_nsec == info_.st_mtim.tv_nsec) {
    return;
  }
  throw Error(
      ErrorKind::kIo, "file changed while it was read", path_,
      now.st_size == info_.st_size ? "another program has written to it" : "its size is another",
      "start again");
}

MappedFile::MappedFile(const std::string& path)
    : file_(path), printable_path_(printable(path)), size_(file_.size()) {
  refuse_pointer(file_);
  if (size_ == 0) return;  // an empty mapping is an error of mmap; an empty file is not one of ours
  void* data = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file_.descriptor(), 0);
  if (data == MAP_FAILED) throw cannot("cannot map file", path);
  data_ = static_cast<const std::byte*>(data);
  for (auto& slot : g_mappings) {
    const MappedFile* none = nullptr;
    if (slot.compare_exchange_strong(none, this)) break;
  }
}

MappedFile::~MappedFile() {
  if (!data_) return;
  for (auto& slot : g_mappings) {
    const MappedFile* own = this;
    if (slot.compare_exchange_strong(own, nullptr)) break;
  }
  ::munmap(const_cast<std::byte*>(data_), size_);
}

void MappedFile::release(const std::byte* begin, size_t bytes) const {
  // Only whole pages inside the span: neighbours may still be in use.
  const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) / page * page;
  if (last > first) ::madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

const char* MappedFile::path_at(const void* address) noexcept {
  for (const auto& slot : g_mappings) {
    const MappedFile* file = slot;
    if (!file) continue;
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(file->data_);
    if (at >= begin && at - begin < file->size_) return file->printable_path_.c_str();
  }
  return nullptr;
}

bool begins_with(const std::string& path, std::string_view magic) {
  struct stat info = {};
  if (::stat(path.c_str(), &info) != 0 || !S_ISREG(info.st_mode)) return false;
  InputFile file(path);
  std::string begin(magic.size(), '\0');
  return file.read(begin.data(), begin.size()) == begin.size() && begin == magic;
}

void refuse_lfs_pointer(std::string_view contents, const std::string& path) {
  if (contents.size() > kMaxPointerBytes ||
      (!contents.starts_with("version https://git-lfs.github.com/spec/") &&
       !contents.starts_with("version https://hawser.github.com/spec/"))) {
    return;
  }
  throw Error(ErrorKind::kBadData, "the file was not downloaded", path,
              "a Git LFS pointer stands in its place",
              "download the file: git lfs pull, or huggingface-cli download");
}

void refuse_lfs_pointer_at(const std::string& path) {
  struct stat info = {};
  if (::stat(path.c_str(), &info) != 0 || !S_ISREG(info.st_mode)) return;
  InputFile file(path);
  refuse_pointer(file);
}

}  // namespace tq
