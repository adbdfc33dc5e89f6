// turn_reader - the lines that a user gives to `tq chat`, from a terminal or a pipe.
//
// On a terminal libedit reads and edits: lines of any length (a terminal's own line mode cuts them
// at 4,095 bytes), characters and not bytes under Backspace, a history. Prompt and echo go to
// stderr.
#pragma once

#include <memory>
#include <optional>
#include <string>

namespace tq {

/// Gives the terminal back its modes if a TurnReader changed them. For every way out of the
/// process; may be called in a signal handler.
void restore_terminal();

class TurnReader {
 public:
  TurnReader();
  ~TurnReader();
  TurnReader(const TurnReader&) = delete;
  TurnReader& operator=(const TurnReader&) = delete;

  bool terminal() const { return terminal_; }
  /// One line without its end, nothing at the end of input. The end of a line may be LF or CRLF; a
  /// lone CR inside is a line break of old files and becomes one. A line that is not UTF-8 is not
  /// returned: a note says so, and the next one is read. Throws kInterrupted after a signal.
  std::optional<std::string> next();

 private:
  struct Editor;
  std::optional<std::string> next_line();
  bool terminal_;
  std::unique_ptr<Editor> editor_;  // null where input is no terminal
};

}  // namespace tq
