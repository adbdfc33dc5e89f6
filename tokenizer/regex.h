// regex - the patterns of tokenizer.json, run by PCRE2.
//
// Hugging Face runs these patterns with Oniguruma (Ruby syntax). The constructs whose meaning is
// the same in PCRE2 pass, those with an exact counterpart are rewritten (\s, \w, \v, \uHHHH,
// script names), all others are an error: a pattern never silently means something else here.
// Read next: pretokenize.h.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace tq {

/// Byte range [begin, end) of a text.
struct Span {
  size_t begin = 0, end = 0;
};

/// Working memory and limits of one encode call; not shared between threads.
class RegexScratch {
 public:
  /// `text_bytes`: size of the whole text. The backtracking limit grows with it, because a run of
  /// n spaces legitimately costs n steps. So does the time limit, which real patterns stay 100
  /// times below; it is there for patterns that are quadratic without much backtracking.
  explicit RegexScratch(size_t text_bytes);
  RegexScratch(size_t text_bytes, double max_seconds);
  ~RegexScratch();
  RegexScratch(const RegexScratch&) = delete;
  RegexScratch& operator=(const RegexScratch&) = delete;

 private:
  friend class Regex;
  struct State;
  std::unique_ptr<State> state_;
};

class Regex {
 public:
  /// Compiles a pattern of tokenizer.json. Throws Error(kBadData) naming the pattern.
  Regex(const std::string& pattern, const std::string& where);
  /// A pattern of our own, in PCRE2 syntax.
  static Regex pcre2(const std::string& pattern);
  /// Matches exactly this text.
  static Regex literal(const std::string& text, const std::string& where);

  /// All matches from left to right, as Oniguruma's find_iter yields them: an empty match is kept
  /// unless it touches the match before it. `text` must be valid UTF-8.
  /// Throws Error(kBadData) when a limit of the scratch is reached.
  void find_all(std::string_view text, RegexScratch& scratch, std::vector<Span>& matches) const;

 private:
  struct Code;
  Regex() = default;
  void compile(const std::string& pattern);
  /// Runs the engine once from `at`; false if no match begins there or in the next few bytes.
  bool match(std::string_view text, size_t at, RegexScratch& scratch, Span& found) const;
  [[noreturn]] void give_up(const std::string& reason) const;
  std::shared_ptr<const Code> code_;  // immutable after compilation
  std::string shown_, where_;         // for messages
};

/// The same pattern in PCRE2 syntax; throws Error(kBadData) for what cannot be carried over.
std::string oniguruma_to_pcre2(const std::string& pattern, const std::string& where);

}  // namespace tq
