// error - the one exception type of tq, its exit codes, and TQ_CHECK.
//
// Bad input (files, options, prompts) throws tq::Error; a broken invariant of our own code fails
// TQ_CHECK. main() turns either into one line on stderr and an exit code. Nothing else throws by
// design. Read next: model/json.h.
#pragma once

#include <exception>
#include <string>

namespace tq {

/// What kind of failure; the value is the process exit code (docs/contributing.md lists them).
enum class ErrorKind : int {
  kInternal = 1,      // a bug in tq
  kUsage = 2,         // command line
  kBadData = 3,       // model, tokenizer, calibration or prompt data is wrong or unsupported
  kResource = 4,      // memory or device
  kIo = 5,            // a path cannot be read or written
  kInterrupted = 130  // SIGINT
};

/// A failure the user can act on. The message is one line: `WHAT (WHERE): WHY[; HINT]`.
/// Control characters in any part (file names, tensor names of untrusted files) are escaped.
class Error : public std::exception {
 public:
  Error(ErrorKind kind, std::string what, std::string where, std::string why,
        std::string hint = "");
  ErrorKind kind() const { return kind_; }
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  ErrorKind kind_;
  std::string message_;
};

/// Replaces control characters (C0, C1, DEL, bidi overrides) and bytes that are not UTF-8 by \xNN,
/// so that a message stays one harmless line.
std::string printable(const std::string& text);

/// The same for text of a model on its way to a terminal: newlines, tabs and the direction marks of
/// right-to-left scripts stay.
std::string printable_text(const std::string& text);

[[noreturn]] void check_failed(const char* condition, const char* file, int line,
                               const std::string& note);

/// Invariant of our own code. Never used on input: input errors throw tq::Error.
#define TQ_CHECK(condition, ...)                                                          \
  do {                                                                                    \
    if (!(condition)) ::tq::check_failed(#condition, __FILE__, __LINE__, "" __VA_ARGS__); \
  } while (0)

}  // namespace tq
