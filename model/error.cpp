// error - see error.h.
#include "model/error.h"

#include <cstdio>

namespace tq {
namespace {

// Bytes of the UTF-8 character at `i`, 0 if there is no valid one. Overlong forms and surrogates
// are left to the terminal: they cannot start a control sequence there.
size_t utf8_length(const std::string& text, size_t i) {
  const auto byte = [&](size_t k) {
    return k < text.size() ? static_cast<unsigned char>(text[k]) : 0u;
  };
  const unsigned lead = byte(i);
  const size_t length = lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  if (lead > 0xF4) return 0;
  for (size_t k = 1; k < length; ++k) {
    if ((byte(i + k) & 0xC0) != 0x80) return 0;
  }
  return length;
}

// Whether the valid character at `i` is C0, DEL or C1.
bool is_control(const std::string& text, size_t i) {
  const auto byte = [&](size_t k) { return static_cast<unsigned char>(text[i + k]); };
  return byte(0) < 0x20 || byte(0) == 0x7F || (byte(0) == 0xC2 && byte(1) < 0xA0);
}

// Whether it is a bidi control (U+200E/F, U+202A..E, U+2066..9): it can reorder a message.
bool is_bidi(const std::string& text, size_t i) {
  const auto byte = [&](size_t k) { return static_cast<unsigned char>(text[i + k]); };
  if (byte(0) != 0xE2) return false;
  if (byte(1) == 0x80) {
    return byte(2) == 0x8E || byte(2) == 0x8F || (byte(2) >= 0xAA && byte(2) <= 0xAE);
  }
  return byte(1) == 0x81 && byte(2) >= 0xA6 && byte(2) <= 0xA9;
}

// What passes(i), for a valid character at i, does not let through is escaped.
template <typename Passes>
std::string escaped(const std::string& text, const Passes& passes) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const size_t length = utf8_length(text, i);
    if (length > 0 && passes(i)) {
      out.append(text, i, length);
      i += length;
      continue;
    }
    // A stray byte of a broken character is escaped alone: what follows may be valid again.
    for (size_t k = 0; k < (length > 0 ? length : 1); ++k, ++i) {
      char escape[5];
      std::snprintf(escape, sizeof escape, "\\x%02X", static_cast<unsigned char>(text[i]));
      out += escape;
    }
  }
  return out;
}

}  // namespace

std::string printable(const std::string& text) {
  return escaped(text, [&](size_t i) { return !is_control(text, i) && !is_bidi(text, i); });
}

std::string printable_text(const std::string& text) {
  return escaped(
      text, [&](size_t i) { return text[i] == '\n' || text[i] == '\t' || !is_control(text, i); });
}

Error::Error(ErrorKind kind, std::string what, std::string where, std::string why, std::string hint)
    : kind_(kind), message_(printable(what + " (" + where + "): " + why)) {
  if (!hint.empty()) message_ += "; " + printable(hint);
}

void check_failed(const char* condition, const char* file, int line, const std::string& note) {
  throw Error(ErrorKind::kInternal, "internal check failed",
              std::string(file) + ":" + std::to_string(line),
              condition + (note.empty() ? "" : ", " + note), "please report it");
}

}  // namespace tq
