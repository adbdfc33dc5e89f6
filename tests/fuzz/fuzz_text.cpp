// fuzz_text - text and ids through the tokenizers of the fixtures: the first byte chooses one.
//
// Byte-level BPE gives every text back; a stream of ids decodes to what all of them decode to.
#include <algorithm>
#include <cstring>
#include <vector>

#include "model/json.h"
#include "tests/fuzz/fuzz.h"
#include "tokenizer/pretokenize.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/utf8.h"

namespace tq {
namespace {

struct Known {
  Tokenizer tokenizer;
  bool lossless;  // no normalizer
};

const std::vector<Known>& tokenizers() {
  static const std::vector<Known> all = [] {
    std::vector<Known> list;
    const std::string root = TQ_FIXTURES;
    for (const auto& [name, lossless] : {std::pair("tokenizers/llama3", true),
                                         {"tokenizers/smollm2", true},
                                         {"tokenizers/qwen3", false},
                                         {"stories260k/tokenizer", false},
                                         {"babyllama-tok105/tokenizer", false}}) {
      const std::string path = root + "/" + name + ".json";
      list.push_back({Tokenizer::from_json(read_text_file(path, 1 << 24), path), lossless});
    }
    return list;
  }();
  return all;
}

// A vocabulary may lack bytes that no text of its training had: they are left out.
bool has_bytes_of(const Tokenizer& tokenizer, std::string_view text) {
  return std::all_of(text.begin(), text.end(), [&](char byte) {
    std::string letter;
    append_utf8(letter, byte_to_letter(static_cast<unsigned char>(byte)));
    return tokenizer.id_of(letter).has_value();
  });
}

void check_text(const Known& known, std::string_view text) {
  const Tokenizer& tokenizer = known.tokenizer;
  for (bool parse_special : {false, true}) {
    const std::vector<int32_t> ids = tokenizer.encode(text, false, parse_special);
    const std::string back = tokenizer.decode(ids, false);
    if (known.lossless && has_bytes_of(tokenizer, text)) TQ_FUZZ_EXPECT(back == text);
  }
}

void check_ids(const Tokenizer& tokenizer, std::string_view bytes) {
  std::vector<int32_t> ids(bytes.size() / 2);
  for (size_t i = 0; i < ids.size(); ++i) {
    uint16_t id = 0;
    std::memcpy(&id, bytes.data() + 2 * i, 2);
    ids[i] = static_cast<int32_t>(id % tokenizer.size());
  }
  for (bool skip_special : {false, true}) {
    StreamDecoder decoder(tokenizer, skip_special);
    std::string streamed;
    for (int32_t id : ids) streamed += decoder.next(id);
    streamed += decoder.finish();
    TQ_FUZZ_EXPECT(streamed == replace_invalid_utf8(tokenizer.decode(ids, skip_special)));
  }
}

}  // namespace
}  // namespace tq

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tq;
  if (size == 0) return 0;
  const Known& known = tokenizers()[data[0] % tokenizers().size()];
  const std::string_view text = as_text(data + 1, size - 1);
  expect_result_or_refusal([&] { check_text(known, text); });
  expect_result_or_refusal([&] { check_text(known, replace_invalid_utf8(text)); });
  expect_result_or_refusal([&] { check_ids(known.tokenizer, text); });
  return 0;
}
