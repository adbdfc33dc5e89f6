// pretokenize - see pretokenize.h.
#include "tokenizer/pretokenize.h"

#include <algorithm>
#include <array>
#include <utility>

#include "tokenizer/component.h"
#include "tokenizer/utf8.h"

namespace tq {
namespace {

// GPT-2's pattern, which ByteLevel uses when use_regex is true (Oniguruma syntax).
constexpr const char* kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// Bytes that print as themselves in Latin-1; the others follow from U+0100 in byte order.
constexpr bool prints_as_itself(unsigned byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

struct Alphabet {
  std::array<char32_t, 256> letter{};
  std::array<int, 0x200> byte{};
};

constexpr Alphabet make_alphabet() {
  Alphabet alphabet;
  for (int& byte : alphabet.byte) byte = -1;
  char32_t next = 0x100;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const char32_t letter = prints_as_itself(byte) ? byte : next++;
    alphabet.letter[byte] = letter;
    alphabet.byte[letter] = static_cast<int>(byte);
  }
  return alphabet;
}

constexpr Alphabet kAlphabet = make_alphabet();

bool starts_with(std::string_view text, std::string_view prefix) {
  return text.substr(0, prefix.size()) == prefix;
}

}  // namespace

char32_t byte_to_letter(unsigned char byte) {
  return kAlphabet.letter[byte];
}
int letter_to_byte(char32_t letter) {
  return letter < 0x200 ? kAlphabet.byte[letter] : -1;
}

Regex regex_of(const Json& pattern, const std::string& where) {
  check_keys(pattern, {"String", "Regex"}, "pattern", where);
  if (pattern.size() != 1) bad_tokenizer("pattern", where, "must be a String or a Regex");
  const std::string kind = pattern.items().begin().key();
  const std::string text = require_string(pattern, kind.c_str(), where);
  if (text.empty()) bad_tokenizer("pattern", where, "is empty");
  return kind == "String" ? Regex::literal(text, where) : Regex(text, where);
}

MetaspaceOptions metaspace_options(const Json& json, const std::string& where) {
  check_keys(json,
             {"type", "replacement", "add_prefix_space", "prepend_scheme", "split", "str_rep"},
             "Metaspace", where);
  MetaspaceOptions options;
  options.replacement = require_string(json, "replacement", where);
  if (options.replacement.empty() ||
      utf8_at(options.replacement, 0).length != options.replacement.size()) {
    bad_tokenizer("Metaspace replacement", where, "must be one character");
  }
  options.scheme = "always";
  if (member(json, "prepend_scheme"))
    options.scheme = require_string(json, "prepend_scheme", where);
  if (options.scheme != "always" && options.scheme != "first" && options.scheme != "never") {
    bad_tokenizer("Metaspace prepend_scheme '" + options.scheme + "'", where,
                  "known: always, first, never");
  }
  // The older spelling; it may stand beside the new one but must not contradict it.
  if (member(json, "add_prefix_space") && !optional_bool(json, "add_prefix_space", true, where)) {
    if (member(json, "prepend_scheme") && options.scheme != "never") {
      bad_tokenizer("Metaspace add_prefix_space", where, "contradicts prepend_scheme");
    }
    options.scheme = "never";
  }
  options.split = optional_bool(json, "split", true, where);
  return options;
}

PreTokenizer PreTokenizer::from_json(const Json* json, const std::string& where) {
  PreTokenizer result;
  result.where_ = where;
  if (!json) return result;
  for_each_step(*json, "pre_tokenizer", "pretokenizers", where,
                [&](const Json& step, const std::string& type) { result.add(step, type); });
  return result;
}

void PreTokenizer::add(const Json& json, const std::string& type) {
  // After ByteLevel the text is in the byte alphabet; another step would cut that.
  if (byte_level_) bad_tokenizer("pre_tokenizer " + type, where_, "stands after ByteLevel");
  if (type == "Split") {
    add_split(json);
  } else if (type == "Digits") {
    check_keys(json, {"type", "individual_digits"}, "Digits", where_);
    Step step;
    step.pattern = Regex("\\p{N}", where_);
    step.behavior = optional_bool(json, "individual_digits", false, where_) ? Behavior::kIsolated
                                                                            : Behavior::kContiguous;
    steps_.push_back(std::move(step));
  } else if (type == "ByteLevel") {
    add_byte_level(json);
  } else if (type == "Metaspace") {
    add_metaspace(json);
  } else {
    bad_tokenizer("unsupported pre_tokenizer '" + type + "'", where_,
                  "known: Split, Digits, ByteLevel, Metaspace, Sequence");
  }
}

void PreTokenizer::add_split(const Json& json) {
  check_keys(json, {"type", "pattern", "behavior", "invert"}, "Split", where_);
  static constexpr std::pair<const char*, Behavior> kBehaviors[] = {
      {"Isolated", Behavior::kIsolated},
      {"Removed", Behavior::kRemoved},
      {"MergedWithPrevious", Behavior::kMergedWithPrevious},
      {"MergedWithNext", Behavior::kMergedWithNext},
      {"Contiguous", Behavior::kContiguous}};
  const std::string name = require_string(json, "behavior", where_);
  for (const auto& [known, behavior] : kBehaviors) {
    if (name != known) continue;
    Step step;
    step.pattern = regex_of(require(json, "pattern", where_), where_);
    step.behavior = behavior;
    step.invert = optional_bool(json, "invert", false, where_);
    steps_.push_back(std::move(step));
    return;
  }
  bad_tokenizer("unknown Split behavior '" + name + "'", where_, "not one of tokenizers' five");
}

void PreTokenizer::add_byte_level(const Json& json) {
  // trim_offsets moves character offsets only, never ids.
  check_keys(json, {"type", "add_prefix_space", "trim_offsets", "use_regex"}, "ByteLevel", where_);
  Step step;
  if (optional_bool(json, "add_prefix_space", true, where_)) {
    step.prefix = Prefix::kAlways;
    step.mark = " ";
  }
  if (optional_bool(json, "use_regex", true, where_)) step.pattern = Regex(kGpt2Pattern, where_);
  steps_.push_back(std::move(step));
  byte_level_ = true;
}

void PreTokenizer::add_metaspace(const Json& json) {
  const MetaspaceOptions options = metaspace_options(json, where_);
  Step step;
  step.mark = options.replacement;
  step.replace_spaces = true;
  step.prefix = options.scheme == "always"  ? Prefix::kAlways
                : options.scheme == "first" ? Prefix::kFirst
                                            : Prefix::kNever;
  // "first" needs to know where a piece came from, which earlier cuts would obscure.
  if (step.prefix == Prefix::kFirst && !steps_.empty()) {
    bad_tokenizer("Metaspace with prepend_scheme first", where_, "must be the first pre_tokenizer");
  }
  if (options.split) step.pattern = Regex::literal(options.replacement, where_);
  step.behavior = Behavior::kMergedWithNext;
  steps_.push_back(std::move(step));
}

void PreTokenizer::cut(const Step& step, std::string_view piece, const std::vector<Span>& matches,
                       std::vector<std::string_view>& pieces) {
  struct Part {
    size_t begin, end;
    bool match;
  };
  std::vector<Part> parts;
  parts.reserve(matches.size() * 2 + 1);
  size_t at = 0;
  for (const Span& match : matches) {
    if (match.begin > at) parts.push_back({at, match.begin, step.invert});
    parts.push_back({match.begin, match.end, !step.invert});
    at = match.end;
  }
  if (at < piece.size()) parts.push_back({at, piece.size(), step.invert});

  std::vector<Part> merged;
  merged.reserve(parts.size());
  const auto emit = [&](const Part& part, bool join) {
    if (!join || merged.empty()) {
      merged.push_back(part);
    } else {
      merged.back().begin = std::min(merged.back().begin, part.begin);
      merged.back().end = std::max(merged.back().end, part.end);
    }
  };
  bool previous = false;  // was the part before it a match?
  switch (step.behavior) {
    case Behavior::kIsolated:
      merged = parts;
      break;
    case Behavior::kRemoved:
      for (const Part& part : parts) {
        if (!part.match) merged.push_back(part);
      }
      break;
    case Behavior::kContiguous:
      for (const Part& part : parts) {
        emit(part, part.match == previous);
        previous = part.match;
      }
      break;
    case Behavior::kMergedWithPrevious:
      for (const Part& part : parts) {
        emit(part, part.match && !previous);
        previous = part.match;
      }
      break;
    case Behavior::kMergedWithNext:
      for (auto part = parts.rbegin(); part != parts.rend(); ++part) {
        emit(*part, part->match && !previous);
        previous = part->match;
      }
      std::reverse(merged.begin(), merged.end());
      break;
  }
  for (const Part& part : merged) {
    if (part.end > part.begin) pieces.push_back(piece.substr(part.begin, part.end - part.begin));
  }
}

void PreTokenizer::split(std::string_view text, bool at_start, RegexScratch& scratch,
                         std::deque<std::string>& owned,
                         std::vector<std::string_view>& pieces) const {
  pieces.clear();
  if (text.empty()) return;
  pieces.push_back(text);
  std::vector<std::string_view> next;
  std::vector<Span> matches;
  for (const Step& step : steps_) {
    next.clear();
    for (size_t i = 0; i < pieces.size(); ++i) {
      std::string_view piece = pieces[i];
      if (step.replace_spaces && piece.find(' ') != std::string_view::npos) {
        std::string& copy = owned.emplace_back();
        for (char c : piece) c == ' ' ? copy += step.mark : copy += c;
        piece = copy;
      }
      const bool wanted =
          step.prefix == Prefix::kAlways || (step.prefix == Prefix::kFirst && at_start && i == 0);
      if (wanted && !starts_with(piece, step.mark)) {
        piece = owned.emplace_back(step.mark + std::string(piece));
      }
      if (step.pattern) {
        matches.clear();
        step.pattern->find_all(piece, scratch, matches);
        cut(step, piece, matches, next);
      } else {
        next.push_back(piece);
      }
    }
    pieces.swap(next);
  }
}

}  // namespace tq
