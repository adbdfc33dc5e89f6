// What the tq command does with the texts of a model folder: generation_config.json, config.json,
// tokenizer files. Refusals come before the work, and a good model is not refused.
#include <gtest/gtest.h>

#include <cmath>

#include "model/config.h"
#include "tests/cli.h"

namespace tq {
namespace {

Args quantize_to(const TempDir& dir, const std::string& model) {
  return {"quantize", model, "-o", dir / "m.tq", "--method", "rtn", "--force"};
}

TEST(ModelTexts, AFileThatQuantizeWritesRunsGreedily) {
  TempDir dir;
  const std::string model = copy_model(dir);
  for (const char* text :
       {R"({"no_repeat_ngram_size": 3})", R"({"do_sample": true, "top_k": -1})",
        R"({"repetition_penalty": 1.05})", R"({"do_sample": true, "stop_strings": ["x"]})"}) {
    write_bytes(model + "/generation_config.json", text);
    const CliResult made = run_tq(dir, quantize_to(dir, model));
    ASSERT_EQ(made.exit_code, 0) << text << made.err;
    const CliResult greedy =
        run_tq(dir, {"run", dir / "m.tq", "Once", "-n", "2", "--temp", "0", "-q"});
    EXPECT_EQ(greedy.exit_code, 0) << text << greedy.err;
    const CliResult plain = run_tq(dir, {"run", dir / "m.tq", "Once", "-n", "2", "-q"});
    const bool penalty = std::string(text).find("repetition") != std::string::npos;
    EXPECT_EQ(plain.exit_code, penalty ? 0 : 3) << text << plain.err;
    EXPECT_EQ(made.err.find("tq run will need options") == std::string::npos, penalty) << made.err;
  }
}

TEST(ModelTexts, AnEndThatIsNoTokenIsRefusedBeforeTheWork) {
  TempDir dir;
  const std::string model = copy_model(dir);
  write_bytes(model + "/generation_config.json", R"({"eos_token_id": [128009]})");
  const CliResult result = run_tq(dir, quantize_to(dir, model));
  EXPECT_EQ(result.exit_code, 3);
  EXPECT_NE(result.err.find("128009"), std::string::npos) << result.err;
  EXPECT_FALSE(std::filesystem::exists(dir / "m.tq"));
}

TEST(ModelTexts, KeysThatChangeNothingAreNotRefused) {
  TempDir dir;
  const std::string model = copy_model(dir);
  edit_json(model + "/config.json", [](Json& config) {
    config["use_mrope"] = false;
    config["model_max_length"] = 512;
    config["use_flash_attn"] = true;
  });
  EXPECT_EQ(run_tq(dir, logits_of(dir, model)).exit_code, 0);
  edit_json(model + "/config.json", [](Json& config) { config["use_mrope"] = true; });
  EXPECT_EQ(run_tq(dir, logits_of(dir, model)).exit_code, 3);
}

// The config of DeepSeek-R1-0528-Qwen3-8B: transformers reads attention_factor only.
TEST(ModelTexts, AttnFactorOfYarnIsNotedAndNotFollowed) {
  const std::string text = R"({"architectures": ["LlamaForCausalLM"], "hidden_size": 64,
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "rope_scaling": {"attn_factor": 0.8782488562869419, "factor": 4.0,
    "original_max_position_embeddings": 32768, "rope_type": "yarn"}})";
  const Config config = parse_config(text, "c");
  EXPECT_DOUBLE_EQ(config.rope.attention_factor, 0.1 * std::log(4.0) + 1);
  ASSERT_EQ(config.notes.size(), 1u);
  EXPECT_NE(config.notes[0].find("1.1386"), std::string::npos);
}

TEST(ModelTexts, ATiedModelMayKeepItsTableUnderTheNameOfTheHead) {
  TempDir dir;
  const std::string model = copy_model(dir), path = model + "/model.safetensors";
  edit_json(model + "/config.json", [](Json& config) { config["tie_word_embeddings"] = true; });
  Safetensors weights = Safetensors::read(path);
  weights.header.erase("lm_head.weight");
  weights.write(path);
  const CliResult before = run_tq(dir, logits_of(dir, model));
  const std::string expected = read_bytes(dir / "out.npy");
  weights.header["lm_head.weight"] = weights.header["model.embed_tokens.weight"];
  weights.header.erase("model.embed_tokens.weight");
  weights.write(path);
  const CliResult after = run_tq(dir, logits_of(dir, model));
  ASSERT_EQ(before.exit_code, after.exit_code) << before.err << after.err;
  EXPECT_EQ(after.exit_code, 0) << after.err;
  EXPECT_EQ(read_bytes(dir / "out.npy"), expected);
}

TEST(ModelTexts, ALargeTokenizerTakesAtMostTenTimesItsSize) {
  TempDir dir;
  const std::string model = copy_model(dir);
  Json json = Json::parse(read_bytes(model + "/tokenizer.json"));
  std::string merges;
  for (int i = 0; i < 1'000'000; ++i) merges += R"(["a","b"],)";
  json["model"]["vocab"]["ab"] = json["model"]["vocab"].size();
  json["model"]["merges"] = {"MARK"};
  std::string text = json.dump();
  text.replace(text.find("\"MARK\""), 6, merges.substr(0, merges.size() - 1));
  write_bytes(model + "/tokenizer.json", text);
  const CliResult result = run_tq(dir, {"tokenize", model, "--text", "ab"});
  EXPECT_LT(result.max_rss_mb, 100 + 10e-6 * static_cast<double>(text.size())) << result.err;
}

}  // namespace
}  // namespace tq
