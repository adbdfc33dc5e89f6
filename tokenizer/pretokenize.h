// pretokenize - the "pre_tokenizer" of tokenizer.json: cuts text into the pieces that BPE merges.
//
// Split (regex or literal), Digits, ByteLevel, Metaspace, and sequences of them. BERT-style
// splitters are errors. Read next: regex.h (the engine), bpe.h (what happens to a piece).
#pragma once

#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "model/json.h"
#include "tokenizer/regex.h"

namespace tq {

class PreTokenizer {
 public:
  /// `json` may be null (the text is one piece). Throws Error(kBadData) naming what is unsupported.
  static PreTokenizer from_json(const Json* json, const std::string& where);

  /// True if pieces are bytes written in the GPT-2 alphabet (ByteLevel comes last).
  bool byte_level() const { return byte_level_; }

  /// Pieces of one stretch of normalized text; they view `text` or `owned`.
  /// at_start: the stretch begins where the whole text begins (Metaspace "first").
  void split(std::string_view text, bool at_start, RegexScratch& scratch,
             std::deque<std::string>& owned, std::vector<std::string_view>& pieces) const;

 private:
  enum class Behavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };
  enum class Prefix { kNever, kFirst, kAlways };
  struct Step {
    std::optional<Regex> pattern;  // cut at its matches
    Behavior behavior = Behavior::kIsolated;
    bool invert = false;             // matches and gaps change roles
    Prefix prefix = Prefix::kNever;  // put `mark` before a piece that does not begin with it
    std::string mark;                // " " (ByteLevel) or the Metaspace replacement
    bool replace_spaces = false;     // Metaspace: ' ' becomes `mark`
  };
  void add(const Json& json, const std::string& type);
  void add_split(const Json& json);
  void add_byte_level(const Json& json);
  void add_metaspace(const Json& json);
  static void cut(const Step& step, std::string_view piece, const std::vector<Span>& matches,
                  std::vector<std::string_view>& pieces);
  std::vector<Step> steps_;
  bool byte_level_ = false;
  std::string where_;
};

/// {"Regex": "..."} or {"String": "..."} as a pattern.
Regex regex_of(const Json& pattern, const std::string& where);

/// Metaspace fields shared by the pre-tokenizer and the decoder.
struct MetaspaceOptions {
  std::string replacement;  // one character
  std::string scheme;       // "always", "first" or "never"
  bool split = true;
};
MetaspaceOptions metaspace_options(const Json& json, const std::string& where);

/// The GPT-2 alphabet: a printable character for each byte.
char32_t byte_to_letter(unsigned char byte);
/// -1 if the character is not in the alphabet.
int letter_to_byte(char32_t letter);

}  // namespace tq
