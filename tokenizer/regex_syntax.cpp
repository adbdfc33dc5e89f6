// regex_syntax - Oniguruma (Ruby) pattern syntax to PCRE2 syntax, or an error.
//
// A scanner, not a parser: PCRE2 itself finds malformed patterns. What it must catch are the
// constructs that both engines accept but read differently. Read next: regex.cpp.
#include <cctype>
#include <vector>

#include "model/error.h"
#include "tokenizer/regex.h"

namespace tq {
namespace {

// Oniguruma's \w: alphabetic, marks, decimal digits, connector punctuation. (PCRE2: L, N, _.)
constexpr const char* kWord = "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}";
// Outside a class Oniguruma looks up characters below U+0100 in the table of ISO 8859-1, where the
// superscript digits and the fractions are word characters too.
constexpr const char* kBareWord = "\\x{B2}\\x{B3}\\x{B9}\\x{BC}-\\x{BE}";

// Letters and numbers of Unicode 16, which the tokenizers library knows and PCRE2 10.42 (Unicode
// 14) does not. A later PCRE2 has them, too: then they change nothing.
constexpr const char* kLaterLetters =
    "\\x{1C89}-\\x{1C8A}\\x{A7CB}-\\x{A7CD}\\x{A7DA}-\\x{A7DC}\\x{105C0}-\\x{105F3}"
    "\\x{10D4A}-\\x{10D65}\\x{10D6F}-\\x{10D85}\\x{10EC2}-\\x{10EC4}"
    "\\x{1123F}-\\x{11240}\\x{11380}-\\x{11389}\\x{1138B}\\x{1138E}"
    "\\x{11390}-\\x{113B5}\\x{113B7}\\x{113D1}\\x{113D3}\\x{11BC0}-\\x{11BE0}"
    "\\x{11F02}\\x{11F04}-\\x{11F10}\\x{11F12}-\\x{11F33}\\x{1342F}"
    "\\x{13441}-\\x{13446}\\x{13460}-\\x{143FA}\\x{16100}-\\x{1611D}"
    "\\x{16D40}-\\x{16D6C}\\x{18CFF}\\x{1B132}\\x{1B155}\\x{1DF25}-\\x{1DF2A}"
    "\\x{1E030}-\\x{1E06D}\\x{1E4D0}-\\x{1E4EB}\\x{1E5D0}-\\x{1E5ED}\\x{1E5F0}"
    "\\x{2B739}\\x{2EBF0}-\\x{2EE5D}\\x{31350}-\\x{323AF}";
constexpr const char* kLaterNumbers =
    "\\x{10D40}-\\x{10D49}\\x{116D0}-\\x{116E3}\\x{11BF0}-\\x{11BF9}"
    "\\x{11F50}-\\x{11F59}\\x{16130}-\\x{16139}\\x{16D70}-\\x{16D79}"
    "\\x{1CCF0}-\\x{1CCF9}\\x{1D2C0}-\\x{1D2D3}\\x{1E4F0}-\\x{1E4F9}"
    "\\x{1E5F1}-\\x{1E5FA}";

class Translator {
 public:
  Translator(const std::string& pattern, const std::string& where) : in_(pattern), where_(where) {}

  std::string run() {
    while (at_ < in_.size()) {
      if (in_[at_] == '\\') {
        escape();
      } else if (in_class_) {
        class_char();
      } else {
        plain_char();
      }
    }
    return out_;
  }

 private:
  [[noreturn]] void refuse(const std::string& construct) const {
    throw Error(ErrorKind::kBadData, "unsupported regular expression", where_,
                construct + " in '" + in_.substr(0, 300) + "'");
  }
  char peek(size_t ahead) const { return at_ + ahead < in_.size() ? in_[at_ + ahead] : '\0'; }
  void copy(size_t n) {
    out_.append(in_, at_, n);
    at_ += n;
  }
  void emit(const std::string& text, size_t consumed) {
    out_ += text;
    at_ += consumed;
  }
  // Ignoring case, the engines disagree on what a property matches.
  void refuse_if_caseless(const std::string& construct) const {
    for (bool caseless : groups_) {
      if (caseless) refuse(construct + " inside (?i:");
    }
  }

  void escape() {
    const char c = peek(1);
    if (c == '\0') refuse("trailing backslash");
    if (std::ispunct(static_cast<unsigned char>(c)) || c == ' ' || (c & 0x80)) return copy(2);
    switch (c) {
      case 'r':
      case 'n':
      case 't':
      case 'f':
      case 'a':
      case 'e':
        return copy(2);
      case 'd':
      case 'D':
        return copy(2);  // both: Nd
      case 's':
        return emit("\\p{White_Space}", 2);  // PCRE2's own \s has U+180E as well
      case 'S':
        return emit("\\P{White_Space}", 2);
      case 'v':
        return emit("\\x0B", 2);  // PCRE2's \v is a class
      case 'w':
        return emit(in_class_ ? kWord : "[" + std::string(kWord) + kBareWord + "]", 2);
      case 'W':
        if (in_class_) refuse("\\W inside a class");
        return emit("[^" + std::string(kWord) + kBareWord + "]", 2);
      case 'p':
      case 'P':
        return property();
      case 'x':
      case 'u':
        return hex();
      default:
        refuse(std::string("\\") + c);
    }
  }

  void property() {
    if (peek(2) != '{') refuse(in_.substr(at_, 3));
    const size_t close = in_.find('}', at_);
    if (close == std::string::npos) refuse("\\p without }");
    refuse_if_caseless("\\p");
    std::string name = in_.substr(at_ + 3, close - at_ - 3);
    std::string caret;
    if (!name.empty() && name[0] == '^') {
      caret = "^";
      name.erase(0, 1);
    }
    if (name.empty()) refuse("empty property");
    for (char c : name) {
      if (!std::isalpha(static_cast<unsigned char>(c)) && c != '_') refuse("\\p{" + name + "}");
    }
    // One and two letters are general categories in both. A longer name is a script: PCRE2 would
    // take Script_Extensions unless told otherwise.
    if (name.size() > 2) name = "sc:" + name;
    if (name == "L" || name == "N") {
      const bool negated = (peek(1) == 'P') != !caret.empty();
      if (!in_class_ || !negated) {
        const std::string all = "\\p{" + name + "}" + (name == "L" ? kLaterLetters : kLaterNumbers);
        return emit(in_class_ ? all : (negated ? "[^" : "[") + all + "]", close + 1 - at_);
      }
    }
    emit(std::string("\\") + peek(1) + "{" + caret + name + "}", close + 1 - at_);
  }

  void hex() {
    if (peek(1) == 'x' && peek(2) == '{') {
      const size_t close = in_.find('}', at_);
      if (close == std::string::npos) refuse("\\x without }");
      return copy(close + 1 - at_);
    }
    const size_t digits = peek(1) == 'x' ? 2 : 4;
    for (size_t i = 0; i < digits; ++i) {
      if (!std::isxdigit(static_cast<unsigned char>(peek(2 + i)))) refuse(in_.substr(at_, 6));
    }
    const std::string value = in_.substr(at_ + 2, digits);
    // \x80 and above is a raw byte in Oniguruma.
    if (digits == 2 && value[0] > '7') refuse("\\x" + value);
    emit("\\x{" + value + "}", 2 + digits);
  }

  void class_char() {
    const char c = in_[at_];
    if (c == '[') refuse("'[' inside a class");
    if (c == '&' && peek(1) == '&') refuse("'&&' inside a class");
    if (c == ']') in_class_ = false;
    copy(1);
  }

  void plain_char() {
    switch (in_[at_]) {
      case '[':
        in_class_ = true;
        copy(peek(1) == '^' ? 2 : 1);
        if (at_ < in_.size() && in_[at_] == ']') refuse("']' first in a class");
        return;
      case '(':
        return open_group();
      case ')':
        if (!groups_.empty()) groups_.pop_back();
        return copy(1);
      case '{':
        return interval();
      default:
        return copy(1);
    }
  }

  void open_group() {
    static constexpr const char* kAllowed[] = {"?:", "?=", "?!", "?>", "?<=", "?<!", "?i:"};
    if (groups_.size() > 200) refuse("nesting over 200");
    if (peek(1) != '?' && peek(1) != '*') {
      groups_.push_back(false);
      return copy(1);
    }
    for (const std::string allowed : kAllowed) {
      if (in_.compare(at_ + 1, allowed.size(), allowed) == 0) {
        groups_.push_back(allowed == "?i:");
        return copy(1 + allowed.size());
      }
    }
    refuse(in_.substr(at_, 4));
  }

  // {n}, {n,} and {n,m} agree; {,m}, and a ? or + after the brace do not.
  void interval() {
    const size_t close = in_.find('}', at_);
    if (close == std::string::npos) refuse("'{' without '}'");
    const std::string body = in_.substr(at_ + 1, close - at_ - 1);
    if (body.empty() || body[0] == ',') refuse("{" + body + "}");
    for (char c : body) {
      if (!std::isdigit(static_cast<unsigned char>(c)) && c != ',') refuse("{" + body + "}");
    }
    copy(close + 1 - at_);
    if (peek(0) == '+' || peek(0) == '?') refuse("'}" + in_.substr(at_, 1) + "'");
  }

  const std::string& in_;
  const std::string& where_;
  std::string out_;
  size_t at_ = 0;
  bool in_class_ = false;
  std::vector<bool> groups_;  // open groups: is it (?i: ?
};

}  // namespace

std::string oniguruma_to_pcre2(const std::string& pattern, const std::string& where) {
  return Translator(pattern, where).run();
}

}  // namespace tq
