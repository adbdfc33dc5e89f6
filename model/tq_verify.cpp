// tq_verify - the checksums of a .tq file, at memory speed: tensors side by side on all cores.
#include <xxhash.h>

#include <atomic>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>

#include "model/error.h"
#include "model/tq_layout.h"

namespace tq {
namespace {

// Below this a thread takes longer to start than to help.
constexpr size_t kBytesOfAThread = 8 << 20;
// More do not read memory faster.
constexpr unsigned kMostThreads = 16;

Error damaged(const MappedFile& file, const std::string& why) {
  return Error(ErrorKind::kBadData, "file is damaged", file.path(), why, "copy the file again");
}

void check_padding(const MappedFile& file, uint64_t begin, uint64_t end) {
  for (uint64_t i = begin; i < end; ++i) {
    if (file.data()[i] != std::byte{0}) {
      throw damaged(file, "padding byte " + std::to_string(i) + " is not zero");
    }
  }
}

}  // namespace

void check_tensor(const MappedFile& file, const TqTensor& tensor) {
  if (hash_text(XXH3_64bits(file.data() + tensor.offset, tensor.bytes)) == tensor.hash) return;
  throw damaged(file, "checksum of tensor " + tensor.name + " does not match");
}

void check_contents(const MappedFile& file, const TqLayout& layout) {
  uint64_t end = sizeof(TqPrologue);
  for (const TqTensor& tensor : layout.tensors) {
    check_padding(file, end, tensor.offset);
    end = tensor.offset + tensor.bytes;
  }
  check_padding(file, end, layout.header_offset);

  std::atomic<size_t> next{0}, first_wrong{SIZE_MAX};
  std::optional<Error> wrong;
  std::mutex wrong_is_set;
  const auto work = [&] {
    for (size_t i; (i = next++) < layout.tensors.size();) {
      try {
        check_tensor(file, layout.tensors[i]);
      } catch (const Error& error) {
        const std::lock_guard lock(wrong_is_set);
        if (i < first_wrong) {
          first_wrong = i;
          wrong = error;
        }
      }
    }
  };
  const unsigned n_cores = std::max(1u, std::thread::hardware_concurrency());
  const size_t n_threads = std::min<size_t>(
      {n_cores, kMostThreads, 1 + file.size() / kBytesOfAThread, layout.tensors.size()});
  std::vector<std::thread> others;
  try {
    others.reserve(n_threads);
    while (others.size() + 1 < n_threads) others.emplace_back(work);
  } catch (const std::system_error&) {
    // A limit on threads: those there are do it.
  }
  work();
  for (std::thread& thread : others) thread.join();
  if (wrong) throw *wrong;
}

}  // namespace tq
