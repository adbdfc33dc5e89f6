// error - see error.h.
#include "model/error.h"

#include <cstdio>
#include <stdexcept>

namespace tq {
namespace {

// Length of the control sequence at `i`: C0 and DEL are one byte, C1 two, bidi controls
// (U+200E/F, U+202A..E, U+2066..9) three. 0 if the byte is ordinary.
size_t control_length(const std::string& text, size_t i) {
  const auto byte = [&](size_t k) {
    return k < text.size() ? static_cast<unsigned char>(text[k]) : 0u;
  };
  if (byte(i) < 0x20 || byte(i) == 0x7F) return 1;
  if (byte(i) == 0xC2 && byte(i + 1) >= 0x80 && byte(i + 1) < 0xA0) return 2;
  if (byte(i) == 0xE2 && byte(i + 1) == 0x80 &&
      (byte(i + 2) == 0x8E || byte(i + 2) == 0x8F ||
       (byte(i + 2) >= 0xAA && byte(i + 2) <= 0xAE))) {
    return 3;
  }
  if (byte(i) == 0xE2 && byte(i + 1) == 0x81 && byte(i + 2) >= 0xA6 && byte(i + 2) <= 0xA9) {
    return 3;
  }
  return 0;
}

}  // namespace

std::string printable(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const size_t n = control_length(text, i);
    if (n == 0) out += text[i++];
    for (size_t k = 0; k < n; ++k, ++i) {
      char escape[5];
      std::snprintf(escape, sizeof escape, "\\x%02X", static_cast<unsigned char>(text[i]));
      out += escape;
    }
  }
  return out;
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
