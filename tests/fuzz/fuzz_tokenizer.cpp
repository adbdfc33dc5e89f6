// fuzz_tokenizer - tokenizer.json; what it accepts encodes and decodes a text.
#include "tests/fuzz/fuzz.h"
#include "tokenizer/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tq;
  expect_result_or_refusal([&] {
    const Tokenizer tokenizer =
        Tokenizer::from_json(std::string(as_text(data, size)), "tokenizer.json");
    static_cast<void>(tokenizer.describe());
    for (const char* text :
         {"Once upon a time, 12345 <|im_start|>it's\n\n  \t e\xcc\x81 \xe2\x96\x81x", "the  thin.",
          ""}) {
      expect_result_or_refusal([&] {
        const std::vector<int32_t> ids = tokenizer.encode(text, true, true);
        for (int32_t id : ids) TQ_FUZZ_EXPECT(id >= 0 && id < tokenizer.size());
        static_cast<void>(tokenizer.decode(ids, false));
        static_cast<void>(tokenizer.decode(ids, true));
      });
    }
  });
  return 0;
}
