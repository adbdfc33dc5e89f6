// utf8 - see utf8.h. The table of well-formed sequences is Unicode table 3-7.
#include "tokenizer/utf8.h"

#include "tokenizer/tokenizer.h"

namespace tq {
namespace {

struct Lead {
  size_t length;            // bytes of the whole sequence; 0 = not a lead byte
  unsigned char low, high;  // allowed second byte
};

Lead lead_of(unsigned char byte) {
  if (byte < 0x80) return {1, 0, 0};
  if (byte < 0xC2) return {0, 0, 0};
  if (byte < 0xE0) return {2, 0x80, 0xBF};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};  // no overlong forms
  if (byte == 0xED) return {3, 0x80, 0x9F};  // no surrogates
  if (byte < 0xF0) return {3, 0x80, 0xBF};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte < 0xF4) return {4, 0x80, 0xBF};
  if (byte == 0xF4) return {4, 0x80, 0x8F};  // nothing above U+10FFFF
  return {0, 0, 0};
}

}  // namespace

Utf8Unit utf8_at(std::string_view text, size_t offset) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[offset + i]); };
  const Lead lead = lead_of(byte(0));
  if (lead.length == 0) return {Utf8Unit::Kind::kInvalid, 1, 0xFFFD};
  if (lead.length == 1) return {Utf8Unit::Kind::kValid, 1, byte(0)};
  char32_t code = byte(0) & (0x7Fu >> lead.length);
  for (size_t i = 1; i < lead.length; ++i) {
    if (offset + i >= text.size()) return {Utf8Unit::Kind::kIncomplete, i, 0xFFFD};
    const unsigned char low = i == 1 ? lead.low : 0x80, high = i == 1 ? lead.high : 0xBF;
    if (byte(i) < low || byte(i) > high) return {Utf8Unit::Kind::kInvalid, i, 0xFFFD};
    code = code << 6 | (byte(i) & 0x3Fu);
  }
  return {Utf8Unit::Kind::kValid, lead.length, code};
}

void append_utf8(std::string& out, char32_t code) {
  const auto put = [&](char32_t value) { out += static_cast<char>(value); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xC0 | code >> 6);
    put(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    put(0xE0 | code >> 12);
    put(0x80 | (code >> 6 & 0x3F));
    put(0x80 | (code & 0x3F));
  } else {
    put(0xF0 | code >> 18);
    put(0x80 | (code >> 12 & 0x3F));
    put(0x80 | (code >> 6 & 0x3F));
    put(0x80 | (code & 0x3F));
  }
}

bool is_white_space(char32_t code) {
  return (code >= 0x09 && code <= 0x0D) || code == 0x20 || code == 0x85 || code == 0xA0 ||
         code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 ||
         code == 0x202F || code == 0x205F || code == 0x3000;
}

bool is_valid_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    if (static_cast<unsigned char>(text[i]) < 0x80) {
      ++i;
      continue;
    }
    const Utf8Unit unit = utf8_at(text, i);
    if (unit.kind != Utf8Unit::Kind::kValid) return false;
    i += unit.length;
  }
  return true;
}

std::string replace_invalid_utf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    const Utf8Unit unit = utf8_at(text, i);
    if (unit.kind == Utf8Unit::Kind::kValid) {
      out.append(text.substr(i, unit.length));
    } else {
      append_utf8(out, 0xFFFD);
    }
    i += unit.length;
  }
  return out;
}

}  // namespace tq
