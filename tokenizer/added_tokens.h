// added_tokens - cuts the added tokens (<|im_end|>, <think>, ...) out of a text before anything
// else sees it.
//
// Leftmost match, longest token first. Tokens with "normalized": false are searched in the raw
// text, the others in the normalized rest. Read next: normalize.h.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "model/json.h"
#include "tokenizer/normalize.h"
#include "tokenizer/regex.h"

namespace tq {

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool special = false;                 // hidden by skip_special
  bool normalized = false;              // matched after the normalizer, in its normalized form
  bool single_word = false;             // only where no word character touches it
  bool lstrip = false, rstrip = false;  // takes the white space beside it

  bool same_flags(const AddedToken& other) const {
    return special == other.special && normalized == other.normalized &&
           single_word == other.single_word && lstrip == other.lstrip && rstrip == other.rstrip;
  }
};

/// One token but for its id, with the defaults of the tokenizers library. Throws Error(kBadData).
AddedToken read_added_token(const Json& json, const std::string& where);

/// The "added_tokens" list, taken from the parser entry by entry. Throws Error(kBadData) for
/// unknown keys, duplicates and bad values.
class AddedTokenList {
 public:
  explicit AddedTokenList(const std::string& where) : where_(where) {}
  /// The stream for parse_json(); it refers to this object.
  JsonStream stream();
  std::vector<AddedToken> take() { return std::move(tokens_); }

 private:
  void add(const Json& json);
  std::vector<AddedToken> tokens_;
  std::unordered_set<std::string> contents_;
  std::unordered_set<int32_t> ids_;
  std::string where_;
};

/// A stretch of text: a token, or (id < 0) ordinary text.
struct Segment {
  std::string_view text;
  int32_t id = -1;
};

/// Finds a set of tokens in a text.
class TokenFinder {
 public:
  /// Keeps the tokens whose `normalized` equals the argument.
  TokenFinder(const std::vector<AddedToken>& tokens, bool normalized, const Normalizer& normalizer);
  /// Appends the segments of `text` in order; they cover it, except for text that rstrip took.
  /// Without `match_special`, special tokens are ordinary text.
  void split(std::string_view text, bool match_special, RegexScratch& scratch,
             std::vector<Segment>& segments) const;

 private:
  /// Longest token at `at`: its index and end. False if none.
  bool longest(std::string_view text, size_t at, int32_t& token, size_t& end) const;
  bool touches_word(std::string_view text, size_t begin, size_t end, RegexScratch& scratch) const;

  // What a match needs to know, without the content.
  struct Token {
    int32_t id;
    bool special, single_word, lstrip, rstrip;
  };
  std::vector<Token> tokens_;
  std::vector<std::string> forms_;  // sorted: what is searched for, of tokens_
  std::vector<bool> first_byte_;    // [256]: does a token begin with it?
  std::optional<Regex> word_char_;  // compiled if a token asks for single_word
};

}  // namespace tq
