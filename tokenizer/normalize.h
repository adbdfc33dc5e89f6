// normalize - the "normalizer" of tokenizer.json: NFC, Prepend, Replace, and sequences of them.
//
// Lowercasing, accent stripping and the Precompiled maps of Unigram models are errors. Read next:
// added_tokens.h (what runs before), pretokenize.h (what runs after).
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "model/json.h"
#include "tokenizer/regex.h"

namespace tq {

class Normalizer {
 public:
  /// `json` may be null (no normalizer). Throws Error(kBadData) naming an unsupported part.
  static Normalizer from_json(const Json* json, const std::string& where);

  bool empty() const { return steps_.empty(); }
  /// Throws Error(kBadData) if a Replace makes the text explode.
  std::string apply(std::string_view text, RegexScratch& scratch) const;

 private:
  struct Step {
    enum class Kind { kNfc, kPrepend, kReplace } kind;
    std::string content;           // kPrepend, kReplace
    std::optional<Regex> pattern;  // kReplace
  };
  void add(const Json& json, const std::string& type);
  std::vector<Step> steps_;
  std::string where_;
};

/// Unicode normal form C.
std::string to_nfc(std::string_view text);

}  // namespace tq
