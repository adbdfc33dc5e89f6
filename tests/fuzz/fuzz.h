// fuzz - what the fuzz targets share. A target is one .cpp with LLVMFuzzerTestOneInput: it may
// throw tq::Error of a kind that bad input has, and nothing else.
//
// `make fuzz` links each to libFuzzer, `make test` to standalone.cpp.
#pragma once

#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <string_view>

#include "model/error.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace tq {

/// Runs body(); an Error that bad input may cause is as good as none.
template <typename Body>
void expect_result_or_refusal(const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kInternal) return;
    std::fprintf(stderr, "%s\n", error.what());
    std::abort();
  }
}

#define TQ_FUZZ_EXPECT(condition)                              \
  do {                                                         \
    if (!(condition)) {                                        \
      std::fprintf(stderr, "does not hold: %s\n", #condition); \
      std::abort();                                            \
    }                                                          \
  } while (0)

/// A folder of this process in memory, where there is /dev/shm; it stays when the process is
/// killed.
inline const std::string& fuzz_folder() {
  static const std::string folder = [] {
    const std::string name = (access("/dev/shm", W_OK) == 0 ? "/dev/shm" : ".") +
                             std::string("/tq-fuzz-") + std::to_string(getpid());
    mkdir(name.c_str(), 0700);
    return name;
  }();
  return folder;
}

inline std::string write_file(const std::string& name, std::string_view bytes) {
  const std::string path = fuzz_folder() + "/" + name;
  std::ofstream(path, std::ios::binary | std::ios::trunc)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return path;
}

/// Parts of an input, separated by a byte that no text of ours holds.
struct Parts {
  std::string_view rest;
  std::string next() {
    const size_t end = rest.find('\0');
    const std::string part(rest.substr(0, end));
    rest = end == std::string_view::npos ? std::string_view() : rest.substr(end + 1);
    return part;
  }
};

inline std::string_view as_text(const uint8_t* data, size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

}  // namespace tq
