// turn_reader - see turn_reader.h.
#include "tools/turn_reader.h"

#include <histedit.h>
#include <poll.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <clocale>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <utility>

#include "model/error.h"
#include "tokenizer/utf8.h"
#include "tools/runtime.h"

namespace tq {
namespace {

constexpr int kHistoryLines = 200;
// Far more than any context; the rest of a longer line is read and forgotten.
constexpr size_t kMaxLineBytes = size_t{16} << 20;

// The terminal as it was; read by signal handlers.
termios g_terminal;
volatile std::sig_atomic_t g_saved = 0;

void remember_terminal() {
  if (::tcgetattr(STDIN_FILENO, &g_terminal) != 0) return;
  g_saved = 1;
  std::atexit(restore_terminal);
}

// Takes the terminal out of its line mode for the whole conversation: libedit does so only while it
// reads, and what is typed or pasted while the model answers would be cut like any other line.
// Ctrl-C keeps its meaning.
void leave_line_mode() {
  if (!g_saved) return;
  termios mode = g_terminal;
  mode.c_lflag &= ~static_cast<tcflag_t>(ICANON | ECHO);
  mode.c_cc[VMIN] = 1;
  mode.c_cc[VTIME] = 0;
  ::tcsetattr(STDIN_FILENO, TCSADRAIN, &mode);
}

// A byte of stdin; -1 at its end or after a signal. Looks for signals a few times a second: one
// that arrives just before a blocking read would wait for the next key.
int read_byte() {
  static const bool terminal = ::isatty(STDIN_FILENO) == 1;
  static unsigned char block[1 << 16];  // of a pipe; what a terminal has more is the shell's
  static ssize_t at = 0, size = 0;
  if (at < size && !interrupted()) return block[at++];
  while (!interrupted()) {
    pollfd input = {STDIN_FILENO, POLLIN, 0};
    const int ready = ::poll(&input, 1, 200);
    if (ready < 0 && errno != EINTR) return -1;
    if (ready <= 0) continue;
    const ssize_t n = ::read(STDIN_FILENO, block, terminal ? 1 : sizeof block);
    if (n == 0 || (n < 0 && errno != EINTR)) return -1;
    if (n > 0) {
      at = 1;
      size = n;
      return block[0];
    }
  }
  return -1;
}

}  // namespace

void restore_terminal() {
  if (g_saved) ::tcsetattr(STDIN_FILENO, TCSADRAIN, &g_terminal);
}

struct TurnReader::Editor {
  EditLine* line = nullptr;
  HistoryW* history = nullptr;
  bool broken = false;  // the present line had bytes that are no characters
  int next_byte = -1;   // read, but not a part of the character before it; -1: none

  Editor() {
    // What libedit prints goes through the locale; C.UTF-8 is everywhere. Numbers stay as they are.
    if (!std::setlocale(LC_CTYPE, "C.UTF-8")) std::setlocale(LC_CTYPE, "");
    ::setenv("TERM", "dumb", 0);
    remember_terminal();
    line = el_init("tq", stdin, stderr, stderr);
    history = history_winit();
    if (!line || !history) throw std::bad_alloc();
    HistEventW event;
    history_w(history, &event, H_SETSIZE, kHistoryLines);
    el_wset(line, EL_CLIENTDATA, this);
    el_wset(
        line, EL_PROMPT, +[](EditLine*) -> wchar_t* {
          static wchar_t prompt[] = L"> ";
          return prompt;
        });
    el_wset(line, EL_EDITOR, L"emacs");
    el_wset(line, EL_HIST, history_w, history);
    el_wset(line, EL_GETCFN, &Editor::get_char);
    leave_line_mode();
  }
  ~Editor() {
    if (line) el_end(line);
    if (history) history_wend(history);
    restore_terminal();
  }

  // libedit's own decoder drops what is no UTF-8 without a word; this one remembers.
  static int get_char(EditLine* line, wchar_t* out) {
    Editor* self = nullptr;
    el_wget(line, EL_CLIENTDATA, &self);
    const int lead = self->next_byte >= 0 ? std::exchange(self->next_byte, -1) : read_byte();
    if (lead < 0) return lead;
    const int more = lead < 0x80                    ? 0
                     : lead >= 0xC2 && lead < 0xE0  ? 1
                     : lead >= 0xE0 && lead < 0xF0  ? 2
                     : lead >= 0xF0 && lead <= 0xF4 ? 3
                                                    : -1;
    std::string bytes(1, static_cast<char>(lead));
    for (int i = 0; i < more; ++i) {
      const int byte = read_byte();
      if (byte < 0) return byte;
      if ((byte & 0xC0) != 0x80) {  // a character cut short must not take the end of the line along
        self->next_byte = byte;
        break;
      }
      bytes += static_cast<char>(byte);
    }
    if (more < 0 || !is_valid_utf8(bytes)) {
      self->broken = true;
      *out = L'\uFFFD';
      return 1;
    }
    uint32_t code =
        more == 0 ? static_cast<uint32_t>(lead) : static_cast<uint32_t>(lead) & (0x3Fu >> more);
    for (int i = 1; i <= more; ++i) {
      code = code << 6 | (static_cast<unsigned char>(bytes[static_cast<size_t>(i)]) & 0x3Fu);
    }
    *out = static_cast<wchar_t>(code);
    return 1;
  }

  std::optional<std::string> read() {
    broken = false;
    int count = 0;
    const wchar_t* text = el_wgets(line, &count);
    leave_line_mode();
    check_interrupted();
    if (!text || count <= 0) return std::nullopt;
    HistEventW event;
    if (count > 1) history_w(history, &event, H_ENTER, text);
    std::string bytes;
    for (int i = 0; i < count && text[i] != L'\n'; ++i) {
      append_utf8(bytes, static_cast<char32_t>(text[i]));
    }
    if (broken) bytes += '\xFF';  // makes the line what it was: not UTF-8
    return bytes;
  }
};

TurnReader::TurnReader() : terminal_(::isatty(STDIN_FILENO) == 1) {
  if (terminal_) editor_ = std::make_unique<Editor>();
}
TurnReader::~TurnReader() = default;

std::optional<std::string> TurnReader::next_line() {
  if (editor_) return editor_->read();
  std::string line;
  for (int byte; (byte = read_byte()) >= 0;) {
    if (byte == '\n') return line;
    if (line.size() <= kMaxLineBytes) line += static_cast<char>(byte);
  }
  check_interrupted();
  return line.empty() ? std::nullopt : std::optional(std::move(line));
}

std::optional<std::string> TurnReader::next() {
  while (std::optional<std::string> line = next_line()) {
    if (line->size() > kMaxLineBytes) {
      note("that line has more than " + std::to_string(kMaxLineBytes) + " bytes and was not sent");
      continue;
    }
    if (line->ends_with('\r')) line->pop_back();
    std::replace(line->begin(), line->end(), '\r', '\n');
    if (is_valid_utf8(*line)) return line;
    note("that line is not UTF-8 and was not sent");
  }
  return std::nullopt;
}

}  // namespace tq
