// utf8 - decoding, checking and repairing UTF-8.
//
// Not a Unicode library: categories come from PCRE2 (regex.h), normal forms from utf8proc
// (normalize.h). Read next: tokenizer.h, which declares the two public functions.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace tq {

/// What stands at one position of a byte string.
struct Utf8Unit {
  enum class Kind { kValid, kInvalid, kIncomplete };
  Kind kind;
  // Bytes of the character, of the broken start of one ("maximal subpart", Unicode 3.9), or of the
  // start that the end of the text cuts off. Never 0.
  size_t length;
  char32_t code;  // U+FFFD unless kValid
};

/// `offset` < text.size().
Utf8Unit utf8_at(std::string_view text, size_t offset);

/// Appends the UTF-8 form of a code point (a scalar value: no surrogates, at most U+10FFFF).
void append_utf8(std::string& out, char32_t code);

/// White_Space property (what \s means to Oniguruma and to Rust).
bool is_white_space(char32_t code);

}  // namespace tq
