// fuzz_templates - the small texts of a model folder that decide how a chat looks and ends:
// tokenizer_config.json, chat_template.jinja, generation_config.json, then a user's turn, with zero
// bytes between.
#include "model/json.h"
#include "tests/fuzz/fuzz.h"
#include "tokenizer/chat.h"

namespace tq {
namespace {

const Tokenizer& tokenizer() {
  static const Tokenizer known = Tokenizer::from_json(
      read_text_file(TQ_FIXTURES "/tokenizers/qwen3.json", 1 << 24), "qwen3.json");
  return known;
}

}  // namespace
}  // namespace tq

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tq;
  Parts parts{as_text(data, size)};
  ModelTexts texts;
  texts.tokenizer_config = parts.next();
  texts.chat_template = parts.next();
  texts.generation_config = parts.next();
  const std::string turn = parts.next();
  expect_result_or_refusal([&] { static_cast<void>(detect_chat_kind(texts, "folder")); });
  expect_result_or_refusal(
      [&] { static_cast<void>(sampling_of(texts, SamplingWishes(), "folder")); });
  expect_result_or_refusal([&] {
    for (int32_t id : stop_tokens(texts, Config(), tokenizer(), "folder")) {
      TQ_FUZZ_EXPECT(id >= 0 && id < tokenizer().size());
    }
  });
  for (const std::string& name : chat_template_names()) {
    expect_result_or_refusal([&] {
      const std::vector<Message> messages = {{"system", turn}, {"user", turn}};
      static_cast<void>(
          encode_chat(tokenizer(), chat_kind_of_name(name), messages, ChatOptions(), false));
    });
  }
  return 0;
}
