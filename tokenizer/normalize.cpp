// normalize - see normalize.h. NFC uses the tables of utf8proc.
#include "tokenizer/normalize.h"

#include <utf8proc.h>

#include <algorithm>
#include <new>

#include "tokenizer/component.h"
#include "tokenizer/pretokenize.h"
#include "tokenizer/utf8.h"

namespace tq {
namespace {

// utf8proc_map() would do all of this, but it reorders combining marks by exchanging neighbours:
// quadratic on a long run of marks. A stable sort of each run gives the same order.
void sort_marks(std::vector<utf8proc_int32_t>& codes) {
  const auto combining = [](utf8proc_int32_t code) {
    return utf8proc_get_property(code)->combining_class;
  };
  for (size_t i = 0; i < codes.size();) {
    if (combining(codes[i]) == 0) {
      ++i;
      continue;
    }
    size_t end = i;
    while (end < codes.size() && combining(codes[end]) != 0) ++end;
    std::stable_sort(codes.begin() + static_cast<ptrdiff_t>(i),
                     codes.begin() + static_cast<ptrdiff_t>(end),
                     [&](auto a, auto b) { return combining(a) < combining(b); });
    i = end;
  }
}

// U+11A7 stands one before the final consonants and composes with nothing, but utf8proc 2.8 takes
// it for a final consonant and swallows it. Text is therefore composed up to it and from there on.
constexpr utf8proc_int32_t kHangulTBase = 0x11A7;

void compose(utf8proc_int32_t* codes, size_t count, std::string& out) {
  const utf8proc_ssize_t n =
      utf8proc_normalize_utf32(codes, static_cast<utf8proc_ssize_t>(count),
                               static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  TQ_CHECK(n >= 0);
  for (utf8proc_ssize_t i = 0; i < n; ++i) append_utf8(out, static_cast<char32_t>(codes[i]));
}

}  // namespace

std::string to_nfc(std::string_view text) {
  // Nothing below U+0300 (lead byte 0xCC) changes unless a later character combines with it.
  if (std::none_of(text.begin(), text.end(),
                   [](char c) { return static_cast<unsigned char>(c) >= 0xCC; })) {
    return std::string(text);
  }
  std::vector<utf8proc_int32_t> codes;
  codes.reserve(text.size() + 8);
  for (size_t i = 0; i < text.size();) {
    const Utf8Unit unit = utf8_at(text, i);
    utf8proc_int32_t parts[8];  // the longest canonical decomposition has 4 code points
    int boundary = 0;
    const utf8proc_ssize_t n = utf8proc_decompose_char(
        static_cast<utf8proc_int32_t>(unit.code), parts, 8,
        static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE), &boundary);
    TQ_CHECK(n >= 0 && n <= 8);
    codes.insert(codes.end(), parts, parts + n);
    i += unit.length;
  }
  sort_marks(codes);
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < codes.size();) {
    size_t end = i;
    while (end < codes.size() && codes[end] != kHangulTBase) ++end;
    compose(codes.data() + i, end - i, out);
    if (end < codes.size()) append_utf8(out, kHangulTBase);
    i = end + 1;
  }
  return out;
}

Normalizer Normalizer::from_json(const Json* json, const std::string& where) {
  Normalizer normalizer;
  normalizer.where_ = where;
  if (!json) return normalizer;
  for_each_step(*json, "normalizer", "normalizers", where,
                [&](const Json& step, const std::string& type) { normalizer.add(step, type); });
  return normalizer;
}

void Normalizer::add(const Json& json, const std::string& type) {
  if (type == "NFC") {
    check_keys(json, {"type"}, "normalizer NFC", where_);
    steps_.push_back({Step::Kind::kNfc, "", std::nullopt});
  } else if (type == "Prepend") {
    check_keys(json, {"type", "prepend"}, "normalizer Prepend", where_);
    steps_.push_back({Step::Kind::kPrepend, require_string(json, "prepend", where_), std::nullopt});
  } else if (type == "Replace") {
    check_keys(json, {"type", "pattern", "content"}, "normalizer Replace", where_);
    steps_.push_back({Step::Kind::kReplace, require_string(json, "content", where_),
                      regex_of(require(json, "pattern", where_), where_)});
  } else {
    bad_tokenizer("unsupported normalizer '" + type + "'", where_,
                  "known: NFC, Prepend, Replace, Sequence");
  }
}

std::string Normalizer::apply(std::string_view text, RegexScratch& scratch) const {
  // Untrusted Replace steps can multiply: "a" -> "aaaa..." several times over.
  const size_t limit = text.size() * 32 + 4096;
  std::string now(text);
  std::vector<Span> matches;
  for (const Step& step : steps_) {
    if (step.kind == Step::Kind::kNfc) {
      now = to_nfc(now);
    } else if (step.kind == Step::Kind::kPrepend) {
      if (!now.empty()) now.insert(0, step.content);
    } else {
      matches.clear();
      step.pattern->find_all(now, scratch, matches);
      if (step.content.size() > limit || matches.size() * step.content.size() > limit) {
        bad_tokenizer("normalizer Replace", where_, "the text grows more than 32-fold");
      }
      std::string next;
      size_t at = 0;
      for (const Span& match : matches) {
        next.append(now, at, match.begin - at).append(step.content);
        at = match.end;
      }
      now = next.append(now, at, std::string::npos);
    }
    if (now.size() > limit) {
      bad_tokenizer("normalizer", where_, "the text grows more than 32-fold");
    }
  }
  return now;
}

}  // namespace tq
