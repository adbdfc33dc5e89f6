// added_tokens - see added_tokens.h.
#include "tokenizer/added_tokens.h"

#include <algorithm>

#include "tokenizer/component.h"
#include "tokenizer/utf8.h"

namespace tq {
namespace {

// Search costs (bytes of text) x (bytes of the longest token) at worst.
constexpr size_t kMaxTokenBytes = 512;

size_t previous_char(std::string_view text, size_t at) {
  do {
    --at;
  } while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80);
  return at;
}

}  // namespace

AddedToken read_added_token(const Json& json, const std::string& where) {
  check_keys(
      json, {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special", "__type"},
      "added token", where);
  AddedToken token;
  token.content = require_string(json, "content", where);
  token.special = optional_bool(json, "special", false, where);
  token.normalized = optional_bool(json, "normalized", !token.special, where);
  token.single_word = optional_bool(json, "single_word", false, where);
  token.lstrip = optional_bool(json, "lstrip", false, where);
  token.rstrip = optional_bool(json, "rstrip", false, where);
  if (token.content.empty() || token.content.size() > kMaxTokenBytes) {
    bad_tokenizer("added token '" + token.content.substr(0, 40) + "'", where,
                  "content must have 1 to " + std::to_string(kMaxTokenBytes) + " bytes");
  }
  return token;
}

JsonStream AddedTokenList::stream() {
  return {{"added_tokens"}, [this](const std::string&, Json&& json) { add(json); }};
}

void AddedTokenList::add(const Json& json) {
  AddedToken token = read_added_token(json, where_);
  token.id = static_cast<int32_t>(require_int(json, "id", 0, INT32_MAX - 1, where_));
  if (!contents_.insert(token.content).second) {
    bad_tokenizer("added token '" + token.content + "'", where_, "is listed twice");
  }
  if (!ids_.insert(token.id).second) {
    bad_tokenizer("added token id " + std::to_string(token.id), where_, "is used twice");
  }
  if (tokens_.size() == kMaxTokens) too_many_tokens(where_);
  tokens_.push_back(std::move(token));
}

TokenFinder::TokenFinder(const std::vector<AddedToken>& tokens, bool normalized,
                         const Normalizer& normalizer)
    : first_byte_(256, false) {
  std::vector<std::pair<std::string, size_t>> found;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i].normalized != normalized) continue;
    std::string content = tokens[i].content;
    if (normalized && !normalizer.empty()) {
      RegexScratch scratch(content.size());
      content = normalizer.apply(content, scratch);
    }
    if (content.empty()) continue;
    first_byte_[static_cast<unsigned char>(content[0])] = true;
    found.emplace_back(std::move(content), i);
    if (tokens[i].single_word && !word_char_) {
      // Rust's \w, which the reference uses here.
      word_char_ = Regex::pcre2("[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{200C}\\x{200D}]");
    }
  }
  std::sort(found.begin(), found.end());
  for (size_t i = 0; i < found.size(); ++i) {
    // Of two tokens with one normalized form the later counts.
    if (i + 1 < found.size() && found[i].first == found[i + 1].first) continue;
    const AddedToken& token = tokens[found[i].second];
    tokens_.push_back({token.id, token.special, token.single_word, token.lstrip, token.rstrip});
    forms_.push_back(std::move(found[i].first));
  }
}

// Narrows the sorted forms byte by byte: those that begin like the text are neighbours.
bool TokenFinder::longest(std::string_view text, size_t at, int32_t& token, size_t& end) const {
  auto low = forms_.begin(), high = forms_.end();
  bool found = false;
  for (size_t n = 0; at + n < text.size(); ++n) {
    const auto byte = static_cast<unsigned char>(text[at + n]);
    // All in [low, high) have n bytes in common; the one that has no more stands first.
    const auto byte_of = [n](const std::string& form) {
      return form.size() == n ? -1 : static_cast<int>(static_cast<unsigned char>(form[n]));
    };
    low = std::lower_bound(low, high, byte, [&](const std::string& form, unsigned char value) {
      return byte_of(form) < value;
    });
    high = std::upper_bound(low, high, byte, [&](unsigned char value, const std::string& form) {
      return value < byte_of(form);
    });
    if (low == high) break;
    if (low->size() == n + 1) {
      token = static_cast<int32_t>(low - forms_.begin());
      end = at + n + 1;
      found = true;
    }
  }
  return found;
}

bool TokenFinder::touches_word(std::string_view text, size_t begin, size_t end,
                               RegexScratch& scratch) const {
  std::vector<Span> matches;
  if (begin > 0) {
    const size_t before = previous_char(text, begin);
    word_char_->find_all(text.substr(before, begin - before), scratch, matches);
  }
  if (end < text.size()) {
    word_char_->find_all(text.substr(end, utf8_at(text, end).length), scratch, matches);
  }
  return !matches.empty();
}

void TokenFinder::split(std::string_view text, bool match_special, RegexScratch& scratch,
                        std::vector<Segment>& segments) const {
  if (tokens_.empty()) {
    if (!text.empty()) segments.push_back({text, -1});
    return;
  }
  size_t done = 0;  // everything before it has been emitted
  for (size_t at = 0; at < text.size();) {
    int32_t index = 0;
    size_t end = 0;
    if (!first_byte_[static_cast<unsigned char>(text[at])] || !longest(text, at, index, end)) {
      ++at;
      continue;
    }
    const Token& token = tokens_[static_cast<size_t>(index)];
    size_t begin = at;
    at = end;  // the search goes on behind the match even if the match is refused
    if (token.special && !match_special) continue;
    if (token.single_word && touches_word(text, begin, end, scratch)) continue;
    if (token.lstrip) {
      while (begin > done) {
        const size_t before = previous_char(text, begin);
        if (!is_white_space(utf8_at(text, before).code)) break;
        begin = before;
      }
    }
    if (token.rstrip) {
      while (end < text.size() && is_white_space(utf8_at(text, end).code)) {
        end += utf8_at(text, end).length;
      }
    }
    if (begin > done) segments.push_back({text.substr(done, begin - done), -1});
    segments.push_back({text.substr(begin, end - begin), token.id});
    done = end;
  }
  if (done < text.size()) segments.push_back({text.substr(done), -1});
}

}  // namespace tq
