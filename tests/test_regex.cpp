// test_regex - patterns of tokenizer.json, run by PCRE2 as Oniguruma would: what is found, what is
// rewritten or refused, and limits for hostile patterns. Classes of characters: test_unicode.cpp.
#include <gtest/gtest.h>

#include <chrono>
#include <functional>

#include "model/error.h"
#include "tokenizer/regex.h"

namespace tq {
namespace {

double seconds_of(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

TEST(Regex, AHostilePatternEndsInAnError) {
  const Regex regex("(?:a+)+$", "pattern");
  const std::string text = std::string(60, 'a') + "b";
  RegexScratch scratch(text.size());
  std::vector<Span> matches;
  EXPECT_LT(seconds_of([&] { EXPECT_THROW(regex.find_all(text, scratch, matches), Error); }), 20.0);
}

TEST(Regex, AQuadraticPatternRunsIntoTheTimeLimit) {
  const Regex regex("a*b", "pattern");  // 10^12 steps on this text
  const std::string text(2'000'000, 'a');
  RegexScratch scratch(text.size(), 0.1);
  std::vector<Span> matches;
  EXPECT_LT(seconds_of([&] { EXPECT_THROW(regex.find_all(text, scratch, matches), Error); }), 20.0);
}

TEST(Regex, AMatchFarBehindTheStartIsFound) {
  const Regex regex("b|(?<=é)c|$", "pattern");
  for (size_t n = 0; n < 200; ++n) {
    std::string text;
    for (size_t i = 0; i < n; ++i) text += i % 3 ? "é" : "a";
    const size_t at = text.size();
    text += "béc";
    RegexScratch scratch(text.size());
    std::vector<Span> matches;
    regex.find_all(text, scratch, matches);
    ASSERT_EQ(matches.size(), 2u) << n;
    EXPECT_EQ(matches[0].begin, at);
    EXPECT_EQ(matches[1].begin, at + 3);
  }
}

TEST(Regex, DeepBacktrackingFallsBackOnTheHeap) {
  const Regex regex("(?:(?:a|b)+c)|.", "pattern");
  const std::string text = std::string(100'000, 'a') + "c";
  RegexScratch scratch(text.size());
  std::vector<Span> matches;
  regex.find_all(text, scratch, matches);
  ASSERT_EQ(matches.size(), 1u);
  EXPECT_EQ(matches[0].end, text.size());
}

TEST(Regex, LongSInAContractionFoldsAsInOniguruma) {
  const Regex regex("(?i:'s|'t)|.", "pattern");
  const std::string text = "x'\u017f'S'T";
  RegexScratch scratch(text.size());
  std::vector<Span> matches;
  regex.find_all(text, scratch, matches);
  ASSERT_EQ(matches.size(), 4u);
  EXPECT_EQ(matches[1].end - matches[1].begin, 3u);
}

TEST(Regex, WhatTheEnginesReadDifferentlyIsRewrittenOrRefused) {
  EXPECT_EQ(oniguruma_to_pcre2(R"([^\s\p{Lu}]\S)", "p"),
            R"([^\p{White_Space}\p{Lu}]\P{White_Space})");
  EXPECT_EQ(oniguruma_to_pcre2(R"(\p{Han}\p{^Lu}\v\u3042\x41)", "p"),
            R"(\p{sc:Han}\p{^Lu}\x0B\x{3042}\x{41})");
  EXPECT_EQ(oniguruma_to_pcre2(R"(\\s\[s])", "p"), R"(\\s\[s])");
  for (const char* bad : {R"(\h)",    R"(\R)",          R"(\X)",     R"(\K)",      R"(\b)",
                          R"(\A)",    R"(\1)",          R"(\k<a>)",  R"(\Q)",      R"(\pL)",
                          R"(\p{L)",  R"([\W])",        R"([a&&b])", R"([a[b]])",  R"([[:alpha:]])",
                          R"([]a])",  R"((?i)a)",       R"((?m:a))", R"((?<n>a))", R"((*UTF)a)",
                          R"((?#c))", R"((?i:\p{Lu}))", R"(a{,3})",  R"(a{1,2}+)", R"(a{2}?)",
                          R"(a{x})",  R"(\xE9)",        "\\",        "(",          "[a",
                          "a{99999}", R"(\p{Nonsense})"}) {
    EXPECT_THROW(Regex(bad, "p"), Error) << bad;
  }
}

}  // namespace
}  // namespace tq
