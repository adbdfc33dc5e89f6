// fuzz_regex - patterns of a pre-tokenizer: the pattern, a zero byte, a text to search.
#include "tests/fuzz/fuzz.h"
#include "tokenizer/regex.h"
#include "tokenizer/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tq;
  Parts parts{as_text(data, size)};
  const std::string pattern = parts.next();
  const std::string text = replace_invalid_utf8(parts.next());
  if (!is_valid_utf8(pattern)) return 0;  // JSON has no other
  expect_result_or_refusal([&] {
    const Regex regex(pattern, "pattern");
    for (const std::string& subject : {text, std::string("It's 12345  a\xcc\x81\n\nb")}) {
      RegexScratch scratch(subject.size(), 0.5);
      std::vector<Span> matches;
      regex.find_all(subject, scratch, matches);
      size_t end = 0;
      for (const Span& match : matches) {
        TQ_FUZZ_EXPECT(match.begin >= end && match.end >= match.begin);
        TQ_FUZZ_EXPECT(match.end <= subject.size());
        end = match.end;
      }
    }
  });
  expect_result_or_refusal([&] { static_cast<void>(Regex::literal(pattern, "pattern")); });
  return 0;
}
