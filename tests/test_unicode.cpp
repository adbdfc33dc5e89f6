// The Unicode tables behind the patterns of a pre-tokenizer, over all code points, against those of
// the tokenizers library (fixture: tools/unicode_classes.py).
#include <gtest/gtest.h>

#include <cstdio>

#include "model/json.h"
#include "tokenizer/regex.h"
#include "tokenizer/utf8.h"

namespace tq {
namespace {

std::string fixture_text(const std::string& name) {
  return read_text_file(std::string(TQ_FIXTURES) + "/tokenizers/" + name + ".json", 1 << 24);
}

// Every code point but the surrogates, and where each begins.
struct AllCodes {
  std::string text;
  std::vector<size_t> begins;
  std::vector<char32_t> codes;
  AllCodes() {
    for (char32_t code = 0; code < 0x110000; ++code) {
      if (code >= 0xD800 && code < 0xE000) continue;
      begins.push_back(text.size());
      codes.push_back(code);
      append_utf8(text, code);
    }
  }
};

std::vector<bool> in_ranges(const Json& ranges) {
  std::vector<bool> found(0x110000, false);
  for (const Json& range : ranges) {
    for (size_t code = range[0]; code <= range[1].get<size_t>(); ++code) found[code] = true;
  }
  return found;
}

TEST(Unicode, ClassesOfThePreTokenizersEqualThoseOfTheTokenizersLibrary) {
  const Json reference = Json::parse(fixture_text("unicode"));
  const AllCodes all;
  RegexScratch scratch(all.text.size());
  for (const char* name : {"\\p{L}", "\\p{N}", "\\s"}) {
    const std::vector<bool> expected = in_ranges(reference["classes"][name]);
    std::vector<Span> matches;
    Regex(name, "t").find_all(all.text, scratch, matches);
    std::vector<bool> got(0x110000, false);
    size_t at = 0;
    for (const Span& match : matches) {
      while (all.begins[at] < match.begin) ++at;
      got[all.codes[at]] = true;
    }
    std::string differ;
    for (const char32_t code : all.codes) {
      if (got[code] == expected[code]) continue;
      const bool starts = code == 0 || got[code - 1] == expected[code - 1];
      char text[32];
      std::snprintf(text, sizeof text, starts ? " %c%X" : "", got[code] ? '+' : '-',
                    static_cast<unsigned>(code));
      differ += text;
      if (code + 1 < 0x110000 && got[code + 1] == expected[code + 1]) {
        std::snprintf(text, sizeof text, "..%X", static_cast<unsigned>(code));
        differ += text;
      }
    }
    EXPECT_EQ(differ, reference["differ"].value(name, "")) << name;
  }
}

TEST(Unicode, ContractionsFoldCaseAsInTheTokenizersLibrary) {
  const Json reference = Json::parse(fixture_text("unicode"));
  const Regex pattern("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "t");
  const AllCodes all;
  RegexScratch scratch(all.text.size());
  for (const auto& item : reference["contractions"].items()) {
    const size_t hole = item.key().find("{}");
    std::vector<char32_t> got;
    std::vector<Span> matches;
    for (const char32_t code : all.codes) {
      std::string text = item.key().substr(0, hole);
      append_utf8(text, code);
      text += item.key().substr(hole + 2);
      matches.clear();
      pattern.find_all(text, scratch, matches);
      if (matches.size() == 1 && matches[0].end - matches[0].begin == text.size()) {
        got.push_back(code);
      }
    }
    EXPECT_EQ(got, item.value().get<std::vector<char32_t>>()) << item.key();
  }
}

// As tokenizers 0.23.3 matches them: Oniguruma looks up a bare class below U+0100 in ISO 8859-1.
TEST(Unicode, SuperscriptDigitsAndFractionsAreWordCharactersOutsideAClassOnly) {
  const std::string text = "\xC2\xB2 \xC2\xB3 \xC2\xB9 \xC2\xBC \xC2\xBD \xC2\xBE";
  const auto count = [&](const char* pattern) {
    RegexScratch scratch(text.size());
    std::vector<Span> matches;
    Regex(pattern, "t").find_all(text, scratch, matches);
    return matches.size();
  };
  EXPECT_EQ(count("\\w"), 6u);
  EXPECT_EQ(count("\\W"), 5u);  // the blanks
  EXPECT_EQ(count("[\\w]"), 0u);
}

}  // namespace
}  // namespace tq
