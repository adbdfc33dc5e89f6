// test_tokenizer - ids and texts equal those of Hugging Face's `tokenizers`, and hostile files or
// texts end in an error. Fixtures: tests/fixtures/tokenizers/README.md. With TQ_SHARED_DATA naming
// the shared data folder the full-size tokenizers are checked as well.
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <random>

#include "model/error.h"
#include "model/json.h"
#include "tokenizer/normalize.h"
#include "tokenizer/regex.h"
#include "tokenizer/tokenizer.h"

namespace tq {
namespace {

std::string fixture_path(const std::string& name) {
  const std::string root = TQ_FIXTURES;
  if (name == "stories260k" || name == "babyllama-tok105") {
    return root + "/" + name + "/tokenizer.json";
  }
  return root + "/tokenizers/" + name + ".json";
}

std::string fixture_text(const std::string& name) {
  return read_text_file(fixture_path(name), 1 << 24);
}

Tokenizer load(const std::string& name) {
  return Tokenizer::from_json(fixture_text(name), name);
}

Json corpus() {
  return parse_json(fixture_text("corpus"), "corpus");
}

using Ids = std::vector<int32_t>;

// The message of the error that parsing `text` gives; "" if it gives none.
std::string error_of(const std::string& text) {
  try {
    Tokenizer::from_json(text, "t.json");
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kBadData);
    return error.what();
  }
  return "";
}

// A small valid tokenizer, to be broken by the tests.
Json tiny() {
  return parse_json(R"({"version": "1.0", "truncation": null, "padding": null,
    "added_tokens": [{"id": 4, "content": "<x>", "single_word": false, "lstrip": false,
                      "rstrip": false, "normalized": false, "special": true}],
    "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
    "model": {"type": "BPE", "dropout": null, "unk_token": null,
              "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
              "byte_fallback": false, "vocab": {"a": 0, "b": 1, "ab": 2, "abab": 3},
              "merges": ["a b", "ab ab"]}})",
                    "tiny");
}

std::string error_with(const std::function<void(Json&)>& change) {
  Json json = tiny();
  change(json);
  return error_of(json.dump());
}

// ---------------------------------------------------------------- equality with the reference

class Reference : public testing::TestWithParam<const char*> {};

TEST_P(Reference, GivesTheSameIds) {
  const Json all = corpus();
  const Tokenizer tokenizer = load(GetParam());
  const Json& expected = all["ids"][GetParam()];
  ASSERT_GE(all["texts"].size(), 1000u);
  ASSERT_EQ(all["texts"].size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    const auto text = all["texts"][i].get<std::string>();
    EXPECT_EQ(tokenizer.encode(text, false, true), expected[i].get<Ids>())
        << i << ": " << all["texts"][i].dump();
  }
}

TEST_P(Reference, DecodesTheSameText) {
  const Json all = corpus();
  const Tokenizer tokenizer = load(GetParam());
  for (const Json& entry : all["decode"][GetParam()]) {
    const std::string bytes = tokenizer.decode(entry[0].get<Ids>(), entry[1].get<bool>());
    EXPECT_EQ(replace_invalid_utf8(bytes), entry[2].get<std::string>()) << entry.dump();
  }
}

TEST_P(Reference, StreamsTheSameTextAndNeverCutsACharacter) {
  const Json all = corpus();
  const Tokenizer tokenizer = load(GetParam());
  std::vector<Ids> sequences;
  for (const Json& entry : all["decode"][GetParam()]) sequences.push_back(entry[0].get<Ids>());
  for (const Json& ids : all["ids"][GetParam()]) sequences.push_back(ids.get<Ids>());
  for (const Ids& ids : sequences) {
    for (const bool skip : {false, true}) {
      StreamDecoder stream(tokenizer, skip);
      std::string text;
      for (const int32_t id : ids) {
        const std::string part = stream.next(id);
        ASSERT_TRUE(is_valid_utf8(part));
        text += part;
      }
      text += stream.finish();
      ASSERT_EQ(text, replace_invalid_utf8(tokenizer.decode(ids, skip)));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tokenizers, Reference,
                         testing::Values("smollm2", "qwen3", "llama3", "stories260k",
                                         "babyllama-tok105"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::erase(name, '-');
                           return name;
                         });

TEST(Tokenizer, FeaturesOutsideTheLargeModelsMatchTheReference) {
  const Json all = parse_json(fixture_text("features"), "features");
  for (const Json& feature : all["tokenizers"]) {
    SCOPED_TRACE(feature["name"].get<std::string>());
    const Tokenizer tokenizer = Tokenizer::from_json(feature["tokenizer"].dump(), "feature");
    for (size_t i = 0; i < all["texts"].size(); ++i) {
      EXPECT_EQ(tokenizer.encode(all["texts"][i].get<std::string>(), false, true),
                feature["ids"][i].get<Ids>())
          << all["texts"][i].dump();
    }
    for (const Json& entry : feature["decode"]) {
      EXPECT_EQ(replace_invalid_utf8(tokenizer.decode(entry[0].get<Ids>(), entry[1].get<bool>())),
                entry[2].get<std::string>());
    }
  }
}

// FNV-1a over numbers, as the fixture script computes it.
std::string hash_of(const std::vector<Ids>& lists) {
  uint64_t hash = 0xCBF29CE484222325u;
  const auto add = [&](uint64_t value) { hash = (hash ^ (value & 0xFFFFFFFFu)) * 0x100000001B3u; };
  for (const Ids& ids : lists) {
    add(ids.size());
    for (const int32_t id : ids) add(static_cast<uint32_t>(id));
  }
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

TEST(Tokenizer, FullSizeTokenizersMatchTheReference) {
  const char* data = std::getenv("TQ_SHARED_DATA");
  if (!data) GTEST_SKIP() << "TQ_SHARED_DATA does not name the folder with the full tokenizers";
  const Json all = corpus();
  size_t n_golden = 0;
  for (const auto& item : all["full"].items()) {
    SCOPED_TRACE(item.key());
    const std::string folder = std::string(data) + "/" + item.key();
    const Tokenizer tokenizer =
        Tokenizer::from_json(read_text_file(folder + "/tokenizer.json", 1 << 26), item.key());
    std::vector<Ids> lists;
    for (const Json& text : all["texts"]) {
      lists.push_back(tokenizer.encode(text.get<std::string>(), false, true));
    }
    EXPECT_EQ(hash_of(lists), item.value().get<std::string>());
    const Json golden = parse_json(read_text_file(folder + "/golden.json", 1 << 24), "golden");
    for (const char* key : {"encode", "chat"}) {
      for (const Json& entry : golden.value(key, Json::array())) {
        const auto text = entry["text"].get<std::string>();
        const auto ids = entry["ids"].get<Ids>();
        EXPECT_EQ(tokenizer.encode(text, false, true), ids);
        if (entry.value("round_trips", false)) {
          EXPECT_EQ(tokenizer.decode(ids, false), text);
        }
        ++n_golden;
      }
    }
    for (const Json& entry : golden.value("cases", Json::array())) {
      EXPECT_EQ(tokenizer.encode(entry["prompt"].get<std::string>(), true, true),
                entry["prompt_ids"].get<Ids>());
      ++n_golden;
    }
  }
  EXPECT_GE(n_golden, 68u);
}

// ---------------------------------------------------------------- behaviour

TEST(Tokenizer, Llama3PrependsOneBeginOfTextAndQwenNone) {
  const Tokenizer llama = load("llama3"), qwen = load("qwen3");
  const int32_t bos = *llama.id_of("<|begin_of_text|>");
  const Ids with = llama.encode("Hello", true, true), without = llama.encode("Hello", false, true);
  ASSERT_EQ(with.size(), without.size() + 1);
  EXPECT_EQ(with[0], bos);
  EXPECT_EQ(std::count(with.begin(), with.end(), bos), 1);
  EXPECT_EQ(qwen.encode("Hello", true, true), qwen.encode("Hello", false, true));
  EXPECT_EQ(llama.encode("", true, true), Ids{bos});
}

TEST(Tokenizer, SpecialTokensInTextAreTextUnlessAskedForAndOtherAddedTokensAlwaysMatch) {
  const Tokenizer qwen = load("qwen3");
  const int32_t end = *qwen.id_of("<|im_end|>"), think = *qwen.id_of("<think>");
  EXPECT_EQ(qwen.encode("<|im_end|><think>", false, true), (Ids{end, think}));
  const Ids ids = qwen.encode("<|im_end|><think>", false, false);
  EXPECT_EQ(std::count(ids.begin(), ids.end(), end), 0);
  EXPECT_EQ(ids.back(), think);
  const std::string text = "a <|im_end|> b";
  EXPECT_EQ(qwen.decode(qwen.encode(text, false, false), true), text);
  EXPECT_TRUE(qwen.is_special(end));
  EXPECT_FALSE(qwen.is_special(think));
  EXPECT_EQ(qwen.decode(Ids{end, think}, true), "<think>");
}

// Characters of the byte alphabet stand in "B\u00e1c"; the other word is one that BPE makes as
// well.
TEST(Tokenizer, AddedTokensDecodeToTheirContentUnlessBpeMakesThem) {
  Json json = Json::parse(fixture_text("llama3"));
  const auto n = static_cast<int32_t>(Tokenizer::from_json(json.dump(), "t").size());
  json["added_tokens"].push_back({{"id", n}, {"content", "B\u00e1c"}});
  const Tokenizer llama = Tokenizer::from_json(json.dump(), "t");
  EXPECT_EQ(llama.encode("B\u00e1c", false, false), Ids{n});
  EXPECT_EQ(llama.decode(Ids{n}, false), "B\u00e1c");
  json = Json::parse(fixture_text("stories260k"));
  json["added_tokens"].push_back({{"id", 512}, {"content", "deniz"}, {"normalized", true}});
  const Tokenizer stories = Tokenizer::from_json(json.dump(), "t");
  const std::string text = "arthur met deniz today.";
  const Ids ids = stories.encode(text, false, false);
  EXPECT_EQ(std::count(ids.begin(), ids.end(), 512), 1);
  EXPECT_EQ(stories.decode(ids, false), text);
}

// What transformers 4.57.6 and 5.24 do with the same files.
TEST(Tokenizer, TokensOfTokenizerConfigAreAddedBehindTheLastIdAndTakeItsFlags) {
  ModelTexts texts;
  texts.tokenizer = fixture_text("llama3");
  const auto n = static_cast<int32_t>(Tokenizer::from_json(texts.tokenizer, "t").size());
  for (const char* key : {"pad_token", "eos_token", "image_token"}) {
    texts.tokenizer_config = Json{{key, "<|new|>"}}.dump();
    const Tokenizer tokenizer = Tokenizer::from_texts(texts, "t");
    EXPECT_EQ(tokenizer.encode("<|new|>", false, true), Ids{n}) << key;
    EXPECT_TRUE(tokenizer.is_special(n));
  }
  for (const char* key : {"additional_special_tokens", "extra_special_tokens"}) {
    texts.tokenizer_config = Json{{key, {"<|new|>", "<|newer|>"}}}.dump();
    EXPECT_EQ(Tokenizer::from_texts(texts, "t").encode("<|newer|>", false, true), Ids{n + 1});
  }
  const auto decoder = [&](int32_t id, const char* content, bool strips) {
    const Json token = {{"content", content},
                        {"special", true},
                        {"normalized", false},
                        {"lstrip", strips},
                        {"rstrip", strips}};
    return Json{{"added_tokens_decoder", {{std::to_string(id), token}}}}.dump();
  };
  texts.tokenizer_config = decoder(n, "<|new|>", false);
  EXPECT_EQ(Tokenizer::from_texts(texts, "t").encode("<|new|>", false, true), Ids{n});
  texts.tokenizer_config = decoder(n + 1, "<|new|>", false);  // transformers would take n
  EXPECT_THROW(Tokenizer::from_texts(texts, "t"), Error);
  const int32_t end = *Tokenizer::from_json(texts.tokenizer, "t").id_of("<|end_of_text|>");
  texts.tokenizer_config = decoder(end, "<|end_of_text|>", true);
  EXPECT_EQ(Tokenizer::from_texts(texts, "t").encode("  <|end_of_text|>  ", false, true), Ids{end});
}

TEST(Tokenizer, PiecesAreTheVocabularyStrings) {
  const Tokenizer smol = load("smollm2"), stories = load("stories260k");
  const Ids ids = smol.encode(" the", false, true);
  ASSERT_EQ(ids.size(), 1u);
  EXPECT_EQ(smol.piece(ids[0]), "Ġthe");
  EXPECT_EQ(smol.id_of("Ġthe"), ids[0]);
  EXPECT_EQ(smol.id_of("no such piece"), std::nullopt);
  EXPECT_EQ(stories.piece(*stories.id_of("<0x0A>")), "<0x0A>");
  EXPECT_EQ(stories.size(), 512);
  EXPECT_EQ(stories.describe(), "BPE with byte fallback, 512 tokens, 165 merges");
  for (const int32_t id : {-1, 512}) {
    EXPECT_THROW(stories.piece(id), Error);
    EXPECT_THROW(stories.is_special(id), Error);
    EXPECT_THROW(stories.decode(Ids{id}, false), Error);
  }
}

TEST(Tokenizer, StripRemovesTheFirstSpaceOfTheTextOnly) {
  const Tokenizer stories = load("stories260k");
  const Ids ids = stories.encode("a b", false, true);
  EXPECT_EQ(stories.decode(ids, false), "a b");
  Ids twice = ids;
  twice.insert(twice.end(), ids.begin(), ids.end());
  EXPECT_EQ(stories.decode(twice, false), "a b a b");
  // A skipped special token in front does not use the strip up.
  twice.insert(twice.begin(), *stories.id_of("<s>"));
  EXPECT_EQ(stories.decode(twice, true), "a b a b");
}

TEST(Tokenizer, StreamHoldsBackAnIncompleteCharacter) {
  const Tokenizer smol = load("smollm2");
  const Ids ids = smol.encode("\U00010348", false, true);  // four bytes, one token each here
  ASSERT_GT(ids.size(), 1u);
  StreamDecoder stream(smol, true);
  for (size_t i = 0; i + 1 < ids.size(); ++i) EXPECT_EQ(stream.next(ids[i]), "");
  EXPECT_EQ(stream.next(ids.back()), "\U00010348");
  EXPECT_EQ(stream.finish(), "");
  StreamDecoder broken(smol, true);
  EXPECT_EQ(broken.next(ids[0]), "");
  EXPECT_EQ(broken.finish(), "\uFFFD");
}

TEST(Tokenizer, InvalidUtf8IsAnErrorAndNulIsText) {
  const Tokenizer smol = load("smollm2");
  for (const char* bad :
       {"\x80", "a\xC3", "\xC0\xAF", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xE2\x82", "\xFF"}) {
    EXPECT_FALSE(is_valid_utf8(bad));
    EXPECT_THROW(smol.encode(bad, false, true), Error) << bad;
  }
  const std::string nul("a\0b", 3);
  EXPECT_EQ(smol.decode(smol.encode(nul, false, true), false), nul);
}

TEST(Tokenizer, ReplacementFollowsMaximalSubparts) {
  EXPECT_EQ(replace_invalid_utf8("a\xE2\x82z"), "a\uFFFDz");
  EXPECT_EQ(replace_invalid_utf8("\xE2\x28"), "\uFFFD(");
  EXPECT_EQ(replace_invalid_utf8("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(replace_invalid_utf8("\xF0\x9F\x98"), "\uFFFD");
  EXPECT_EQ(replace_invalid_utf8("\xF0\x9F\x98\x80"), "\U0001F600");
}

TEST(Tokenizer, MergesAsPairsAndAsStringsAreTheSame) {
  Json json = tiny();
  const Tokenizer strings = Tokenizer::from_json(json.dump(), "strings");
  json["model"]["merges"] = parse_json(R"([["a", "b"], ["ab", "ab"]])", "pairs");
  const Tokenizer pairs = Tokenizer::from_json(json.dump(), "pairs");
  for (const char* text : {"ab", "abab", "aababb", "ababab"}) {
    EXPECT_EQ(strings.encode(text, false, true), pairs.encode(text, false, true));
  }
  EXPECT_EQ(pairs.encode("ababab", false, true), (Ids{3, 2}));
}

TEST(Nfc, ComposesReordersAndKeepsWhatIsStable) {
  EXPECT_EQ(to_nfc("plain"), "plain");
  EXPECT_EQ(to_nfc("e\u0301"), "\u00e9");
  EXPECT_EQ(to_nfc("\u1112\u1161\u11ab"), "\ud55c");
  EXPECT_EQ(to_nfc("q\u0307\u0323"), "q\u0323\u0307");
  EXPECT_EQ(to_nfc("\u212b\ufb01"), "\u00c5\ufb01");
  EXPECT_EQ(to_nfc("\u1100\u1161\u11a7\u11a8\u1161"), "\uac00\u11a7\u11a8\u1161");
  EXPECT_EQ(to_nfc("\u11a7"), "\u11a7");
}

// ---------------------------------------------------------------- size and time

double seconds_of(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// A quadratic step anywhere would take minutes; 20 s leaves room for sanitizers and slow machines.
TEST(Tokenizer, AMegabyteWithoutABreakIsNotQuadratic) {
  const Tokenizer smol = load("smollm2"), qwen = load("qwen3"), stories = load("stories260k");
  std::string marks;
  while (marks.size() < 1'000'000) marks += "\u0301\u0323";
  for (const std::string& text :
       {std::string(1'000'000, 'a'), std::string(1'000'000, ' '), std::string(1'000'000, '\n'),
        std::string(1'000'000, ' ') + "\n", std::string(1'000'000, '7'), marks}) {
    for (const Tokenizer* tokenizer : {&smol, &qwen, &stories}) {
      Ids ids;
      EXPECT_LT(seconds_of([&] { ids = tokenizer->encode(text, false, true); }), 20.0);
      EXPECT_GT(ids.size(), 10'000u);
      if (tokenizer != &qwen) {
        EXPECT_EQ(tokenizer->decode(ids, false), text);
      }
    }
  }
}

// ---------------------------------------------------------------- files that must be refused

TEST(TokenizerFile, TinyBaseIsValid) {
  EXPECT_EQ(error_of(tiny().dump()), "");
}

TEST(TokenizerFile, OtherModelsAndUnknownPartsAreNamed) {
  const auto has = [](const std::string& text, const char* part) {
    return text.find(part) != std::string::npos;
  };
  using Change = std::function<void(Json&)>;
  const std::pair<const char*, Change> cases[] = {
      {"Unigram", [](Json& j) { j["model"]["type"] = "Unigram"; }},
      {"WordPiece", [](Json& j) { j["model"]["type"] = "WordPiece"; }},
      {"type", [](Json& j) { j["model"].erase("type"); }},
      {"dropout", [](Json& j) { j["model"]["dropout"] = 0.1; }},
      {"continuing_subword_prefix",
       [](Json& j) { j["model"]["continuing_subword_prefix"] = "##"; }},
      {"end_of_word_suffix", [](Json& j) { j["model"]["end_of_word_suffix"] = "</w>"; }},
      {"new_option", [](Json& j) { j["model"]["new_option"] = 1; }},
      {"extra", [](Json& j) { j["extra"] = 1; }},
      {"version", [](Json& j) { j["version"] = "2.0"; }},
      {"Lowercase",
       [](Json& j) {
         j["normalizer"] = {{"type", "Lowercase"}};
       }},
      {"Precompiled",
       [](Json& j) {
         j["normalizer"] = {{"type", "Precompiled"}};
       }},
      {"BertPreTokenizer",
       [](Json& j) {
         j["pre_tokenizer"] = {{"type", "BertPreTokenizer"}};
       }},
      {"Punctuation",
       [](Json& j) {
         j["pre_tokenizer"] = {{"type", "Sequence"},
                               {"pretokenizers", Json::array({{{"type", "Punctuation"}}})}};
       }},
      {"ByteLevel",
       [](Json& j) {
         j["pre_tokenizer"] = {
             {"type", "Sequence"},
             {"pretokenizers", Json::array({{{"type", "ByteLevel"}}, {{"type", "Digits"}}})}};
       }},
      {"\\h",
       [](Json& j) {
         j["pre_tokenizer"] = {{"type", "Split"},
                               {"pattern", {{"Regex", "\\h+"}}},
                               {"behavior", "Isolated"},
                               {"invert", false}};
       }},
      {"Sideways",
       [](Json& j) {
         j["pre_tokenizer"] = {
             {"type", "Split"}, {"pattern", {{"String", "a"}}}, {"behavior", "Sideways"}};
       }},
      {"RobertaProcessing",
       [](Json& j) {
         j["post_processor"] = {{"type", "RobertaProcessing"}};
       }},
      {"WordPiece",
       [](Json& j) {
         j["decoder"] = {{"type", "WordPiece"}};
       }},
      {"Strip",
       [](Json& j) {
         j["decoder"] = {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}};
       }},
      {"surprise", [](Json& j) { j["added_tokens"][0]["surprise"] = true; }}};
  for (const auto& [name, change] : cases) {
    const std::string message = error_with(change);
    EXPECT_TRUE(has(message, name)) << name << ": " << message;
    EXPECT_EQ(message.find('\n'), std::string::npos);
  }
}

TEST(TokenizerFile, BrokenVocabularyAndMergesAreNamed) {
  const auto has = [](const std::string& text, const char* part) {
    return text.find(part) != std::string::npos;
  };
  using Change = std::function<void(Json&)>;
  const std::pair<const char*, Change> cases[] = {
      {"merge 1",
       [](Json& j) {
         j["model"]["merges"] = {"a b", "ab x"};
       }},
      {"merge 0", [](Json& j) { j["model"]["merges"] = {"b a"}; }},  // "ba" is not in vocab
      {"merge 0", [](Json& j) { j["model"]["merges"] = {"ab"}; }},
      {"merge 0", [](Json& j) { j["model"]["merges"] = {"a b c"}; }},
      {"merge 0", [](Json& j) { j["model"]["merges"] = {1}; }},
      {"merge 0",
       [](Json& j) {
         j["model"]["merges"] = Json::array({{"a", "b", "c"}});
       }},
      {"merges", [](Json& j) { j["model"]["merges"] = "a b"; }},
      {"merges", [](Json& j) { j["model"].erase("merges"); }},
      {"empty merges", [](Json& j) { j["model"]["merges"] = Json::array(); }},
      {"vocab", [](Json& j) { j["model"]["vocab"] = Json::object(); }},
      {"vocab", [](Json& j) { j["model"]["vocab"] = Json::array(); }},
      {"vocab", [](Json& j) { j["model"].erase("vocab"); }},
      {"'b'", [](Json& j) { j["model"]["vocab"]["b"] = 0; }},
      {"'b'", [](Json& j) { j["model"]["vocab"]["b"] = -1; }},
      {"'b'", [](Json& j) { j["model"]["vocab"]["b"] = 1.0; }},
      {"'b'", [](Json& j) { j["model"]["vocab"]["b"] = "1"; }},
      {"'b'", [](Json& j) { j["model"]["vocab"]["b"] = 18446744073709551615u; }},
      {"gap", [](Json& j) { j["added_tokens"][0]["id"] = 5; }},
      {"gap", [](Json& j) { j["added_tokens"][0]["id"] = 2147483646; }},
      {"'ab'", [](Json& j) { j["added_tokens"][0]["id"] = 2; }},
      {"in vocab it is 1", [](Json& j) { j["added_tokens"][0]["content"] = "b"; }},
      {"content", [](Json& j) { j["added_tokens"][0]["content"] = ""; }},
      {"twice", [](Json& j) { j["added_tokens"].push_back(j["added_tokens"][0]); }},
      {"unk_token", [](Json& j) { j["model"]["unk_token"] = "<unk>"; }}};
  for (const auto& [name, change] : cases) {
    const std::string message = error_with(change);
    EXPECT_TRUE(has(message, name)) << name << ": " << message;
  }
}

TEST(TokenizerFile, EmptyMergesAreRightForSingleCharacters) {
  Json json = tiny();
  json["model"]["vocab"] = {{"a", 0}, {"é", 1}, {"<0x41>", 2}, {"▁", 3}};
  json["model"]["merges"] = Json::array();
  EXPECT_EQ(error_of(json.dump()), "");
}

TEST(TokenizerFile, AnExplodingNormalizerIsStopped) {
  Json json = tiny();
  Json steps = Json::array();
  for (int i = 0; i < 6; ++i) {
    steps.push_back(
        {{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", std::string(1000, 'a')}});
  }
  json["normalizer"] = {{"type", "Sequence"}, {"normalizers", steps}};
  const Tokenizer tokenizer = Tokenizer::from_json(json.dump(), "bomb");
  EXPECT_THROW(tokenizer.encode("aaaaaaaa", false, true), Error);
}

TEST(TokenizerFile, DeepNestingIsRefused) {
  Json json = tiny(), part = {{"type", "Digits"}};
  for (int i = 0; i < 12; ++i) {
    part = {{"type", "Sequence"}, {"pretokenizers", Json::array({part})}};
  }
  json["pre_tokenizer"] = part;
  EXPECT_NE(error_of(json.dump()).find("nested"), std::string::npos);
}

// Truncations and byte flips give an error or another valid tokenizer, never a crash (the
// sanitizer build watches).
TEST(TokenizerFile, DamagedFilesNeverCrash) {
  const Json features = parse_json(fixture_text("features"), "features");
  std::vector<std::string> texts{tiny().dump(), fixture_text("stories260k")};
  for (const char* name :
       {"added_normalized", "replace_regex", "prefix_space", "metaspace_first_added"}) {
    for (const Json& feature : features["tokenizers"]) {
      if (feature["name"] == name) texts.push_back(feature["tokenizer"].dump());
    }
  }
  std::mt19937 random(7);
  size_t n_refused = 0, n_accepted = 0;
  const auto try_one = [&](const std::string& text) {
    try {
      const Tokenizer tokenizer = Tokenizer::from_json(text, "damaged");
      const Ids ids = tokenizer.encode("the lll <|x|> ab\u00e4\u65e5  hello", true, true);
      tokenizer.decode(ids, true);
      ++n_accepted;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kBadData) << error.what();
      ++n_refused;
    }
  };
  for (const std::string& text : texts) {
    for (int i = 0; i < 150; ++i) {
      try_one(text.substr(0, random() % text.size()));
      std::string flipped = text;
      flipped[random() % text.size()] = static_cast<char>(random());
      try_one(flipped);
      std::string digits = text;  // keeps the JSON valid more often: another digit or letter
      const size_t at = random() % text.size();
      if (std::isalnum(static_cast<unsigned char>(digits[at]))) {
        digits[at] = "0123456789abcdefl"[random() % 17];
      }
      try_one(digits);
    }
  }
  EXPECT_GT(n_refused, 500u);
  EXPECT_GT(n_accepted, 50u);
}

}  // namespace
}  // namespace tq
