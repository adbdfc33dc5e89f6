// added_tokens - see added_tokens.h.
#include "tokenizer/added_tokens.h"

#include <algorithm>
#include <unordered_set>

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

std::vector<AddedToken> parse_added_tokens(const Json* json, const std::string& where) {
  std::vector<AddedToken> tokens;
  if (!json) return tokens;
  if (!json->is_array()) bad_tokenizer("added_tokens", where, "must be a list");
  std::unordered_set<std::string> contents;
  std::unordered_set<int32_t> ids;
  for (const Json& item : *json) {
    AddedToken token = read_added_token(item, where);
    token.id = static_cast<int32_t>(require_int(item, "id", 0, INT32_MAX - 1, where));
    if (!contents.insert(token.content).second) {
      bad_tokenizer("added token '" + token.content + "'", where, "is listed twice");
    }
    if (!ids.insert(token.id).second) {
      bad_tokenizer("added token id " + std::to_string(token.id), where, "is used twice");
    }
    tokens.push_back(std::move(token));
  }
  return tokens;
}

TokenFinder::TokenFinder(const std::vector<AddedToken>& tokens, bool normalized,
                         const Normalizer& normalizer)
    : nodes_(1), first_byte_(256, false) {
  for (const AddedToken& token : tokens) {
    if (token.normalized != normalized) continue;
    std::string content = token.content;
    if (normalized && !normalizer.empty()) {
      RegexScratch scratch(content.size());
      content = normalizer.apply(content, scratch);
    }
    if (content.empty()) continue;
    insert(content, static_cast<int32_t>(tokens_.size()));
    tokens_.push_back(token);
    if (token.single_word && !word_char_) {
      // Rust's \w, which the reference uses here.
      word_char_ = Regex::pcre2("[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{200C}\\x{200D}]");
    }
  }
}

void TokenFinder::insert(const std::string& content, int32_t token) {
  int32_t node = 0;
  for (const char c : content) {
    const auto byte = static_cast<unsigned char>(c);
    if (const int32_t* found = child(node, byte)) {
      node = *found;
      continue;
    }
    const auto fresh = static_cast<int32_t>(nodes_.size());
    nodes_.emplace_back();
    auto& next = nodes_[static_cast<size_t>(node)].next;
    next.insert(std::upper_bound(next.begin(), next.end(), std::pair(byte, int32_t{0})),
                {byte, fresh});
    node = fresh;
  }
  nodes_[static_cast<size_t>(node)].token = token;
  first_byte_[static_cast<unsigned char>(content[0])] = true;
}

const int32_t* TokenFinder::child(int32_t node, unsigned char byte) const {
  const auto& next = nodes_[static_cast<size_t>(node)].next;
  const auto found = std::lower_bound(next.begin(), next.end(), std::pair(byte, int32_t{0}));
  return found == next.end() || found->first != byte ? nullptr : &found->second;
}

bool TokenFinder::longest(std::string_view text, size_t at, int32_t& token, size_t& end) const {
  int32_t node = 0;
  bool found = false;
  for (size_t i = at; i < text.size(); ++i) {
    const int32_t* next = child(node, static_cast<unsigned char>(text[i]));
    if (!next) break;
    node = *next;
    if (nodes_[static_cast<size_t>(node)].token >= 0) {
      token = nodes_[static_cast<size_t>(node)].token;
      end = i + 1;
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
    const AddedToken& token = tokens_[static_cast<size_t>(index)];
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
