// config.json: real models in both spellings, every refused field, rotary frequencies.
#include <gtest/gtest.h>

#include <cmath>
#include <utility>
#include <vector>

#include "model/config.h"
#include "model/json.h"
#include "tests/expect_error.h"

namespace tq {
namespace {

// Llama-3.2-1B as transformers v4 writes it.
Json llama_v4() {
  return parse_json(R"({
    "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256})",
                    "llama");
}

// Qwen3-4B as transformers v5 writes it, with two layers.
Json qwen_v5() {
  return parse_json(R"({
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 151643, "dtype": "bfloat16", "eos_token_id": 151645, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02,
    "intermediate_size": 9728, "layer_types": ["full_attention", "full_attention"],
    "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 2, "num_key_value_heads": 8,
    "pad_token_id": null, "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "sliding_window": null, "tie_word_embeddings": true, "transformers_version": "5.23.0",
    "use_cache": true, "use_sliding_window": false, "vocab_size": 151936})",
                    "qwen");
}

Config parse(const Json& json) {
  return parse_config(json.dump(), "config.json");
}

Json with(Json json, const char* key, const Json& value) {
  json[key] = value;
  return json;
}

Json without(Json json, const char* key) {
  json.erase(key);
  return json;
}

void expect_bad(const Json& json, std::initializer_list<std::string> words) {
  expect_error(ErrorKind::kBadData, words, [&] { parse(json); });
}

Json yarn(double factor = 4.0) {
  return {{"rope_type", "yarn"}, {"factor", factor}, {"original_max_position_embeddings", 32768}};
}

Json qwen_with_yarn(const Json& rope) {
  Json json = with(qwen_v5(), "max_position_embeddings", 131072);
  json["rope_parameters"] = rope;
  json["rope_parameters"]["rope_theta"] = 1000000;
  return json;
}

TEST(Config, ReadsLlamaAsTransformers4WritesIt) {
  const Config c = parse(llama_v4());
  EXPECT_EQ(c.arch, Arch::kLlama);
  EXPECT_FALSE(c.has_qk_norm());
  EXPECT_EQ(c.dim, 2048);
  EXPECT_EQ(c.hidden_dim, 8192);
  EXPECT_EQ(c.n_layers, 16);
  EXPECT_EQ(c.n_heads, 32);
  EXPECT_EQ(c.n_kv_heads, 8);
  EXPECT_EQ(c.head_dim, 64);
  EXPECT_EQ(c.vocab_size, 128256);
  EXPECT_EQ(c.max_seq_len, 131072);
  EXPECT_EQ(c.norm_eps, 1e-5f);
  EXPECT_TRUE(c.tied);
  EXPECT_EQ(c.eos_ids, (std::vector<int32_t>{128001, 128008, 128009}));
  EXPECT_EQ(c.rope.kind, RopeKind::kLlama3);
  EXPECT_EQ(c.rope.theta, 500000.0);
  EXPECT_EQ(c.rope.factor, 32.0);
  EXPECT_EQ(c.rope.low_freq_factor, 1.0);
  EXPECT_EQ(c.rope.high_freq_factor, 4.0);
  EXPECT_EQ(c.rope.original_max_seq_len, 8192.0);
  EXPECT_EQ(c.rope.attention_factor, 1.0);
}

TEST(Config, ReadsQwen3AsTransformers5WritesIt) {
  const Config c = parse(qwen_v5());
  EXPECT_EQ(c.arch, Arch::kQwen3);
  EXPECT_TRUE(c.has_qk_norm());
  EXPECT_EQ(c.head_dim, 128);  // not 2560 / 32
  EXPECT_EQ(c.q_dim(), 4096);
  EXPECT_EQ(c.kv_dim(), 1024);
  EXPECT_EQ(c.norm_eps, 1e-6f);
  EXPECT_EQ(c.rope.kind, RopeKind::kDefault);
  EXPECT_EQ(c.rope.theta, 1000000.0);
  EXPECT_EQ(c.eos_ids, std::vector<int32_t>{151645});
}

TEST(Config, BothSpellingsOfRopeMeanTheSame) {
  Json v5 = without(without(llama_v4(), "rope_scaling"), "rope_theta");
  v5["rope_parameters"] = llama_v4()["rope_scaling"];
  v5["rope_parameters"]["rope_theta"] = 500000.0;
  const Config a = parse(llama_v4()), b = parse(v5);
  EXPECT_EQ(b.rope.kind, RopeKind::kLlama3);
  EXPECT_EQ(rope_inv_freq(a.rope, 64), rope_inv_freq(b.rope, 64));
  // Both at once, if they agree; "type" is the old name of "rope_type"; 32 and 32.0 are one number.
  Json both = with(v5, "rope_scaling", llama_v4()["rope_scaling"]);
  both["rope_scaling"].erase("rope_type");
  both["rope_scaling"]["type"] = "llama3";
  both["rope_scaling"]["factor"] = 32;
  both["rope_theta"] = 500000;
  EXPECT_EQ(rope_inv_freq(parse(both).rope, 64), rope_inv_freq(a.rope, 64));
}

TEST(Config, ContradictingRopeFieldsAreErrors) {
  Json both = with(llama_v4(), "rope_parameters", llama_v4()["rope_scaling"]);
  EXPECT_EQ(parse(both).rope.factor, 32.0);
  both["rope_parameters"]["factor"] = 8.0;
  expect_bad(both, {"rope_scaling and rope_parameters contradict"});
  Json theta = qwen_v5();
  theta["rope_theta"] = 10000.0;
  expect_bad(theta, {"two values of rope_theta"});
  Json old_theta = llama_v4();
  old_theta["rope_scaling"]["rope_theta"] = 10000.0;
  expect_bad(old_theta, {"two values of rope_theta"});
  Json type = llama_v4();
  type["rope_scaling"]["type"] = "yarn";
  expect_bad(type, {"rope_type and type contradict"});
}

TEST(Config, AbsentAndNullFieldsTakeTheDefaultsOfTransformers) {
  for (const char* key : {"head_dim", "rope_scaling", "rope_theta", "num_key_value_heads",
                          "tie_word_embeddings", "eos_token_id", "hidden_act"}) {
    for (const Json& json : {without(llama_v4(), key), with(llama_v4(), key, nullptr)}) {
      const Config c = parse(json);
      const std::string name = key;
      EXPECT_EQ(c.head_dim, 64);  // hidden_size / num_attention_heads
      EXPECT_EQ(c.rope.kind, name == "rope_scaling" ? RopeKind::kDefault : RopeKind::kLlama3);
      EXPECT_EQ(c.rope.theta, name == "rope_theta" ? 10000.0 : 500000.0);
      EXPECT_EQ(c.n_kv_heads, name == "num_key_value_heads" ? 32 : 8);
      EXPECT_EQ(c.tied, name != "tie_word_embeddings");
      EXPECT_EQ(c.eos_ids.empty(), name == "eos_token_id");
    }
  }
}

TEST(Config, SizesMustBePositiveWholeNumbersInRange) {
  for (const char* key :
       {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"}) {
    for (const Json& value :
         {Json(0), Json(-1), Json(64.0), Json("64"), Json(true), Json(int64_t{1} << 40),
          Json(UINT64_MAX), Json(1e30), Json::array({64})}) {
      SCOPED_TRACE(std::string(key) + " = " + value.dump());
      expect_bad(with(llama_v4(), key, value), {"(config.json)", key, "a whole number from 1 to"});
    }
  }
  for (const char* key :
       {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "vocab_size", "max_position_embeddings", "rms_norm_eps"}) {
    expect_bad(without(llama_v4(), key), {"missing field", key});
  }
}

TEST(Config, HeadsMustDivideAndHeadDimMustBeEven) {
  expect_bad(with(llama_v4(), "num_key_value_heads", 5),
             {"num_attention_heads 32", "num_key_value_heads 5"});
  expect_bad(with(llama_v4(), "head_dim", 63), {"head_dim 63", "odd"});
  expect_bad(with(without(llama_v4(), "head_dim"), "hidden_size", 2050),
             {"hidden_size 2050", "num_attention_heads 32"});
}

TEST(Config, NormEpsMustBePositiveAlsoInSinglePrecision) {
  for (const Json& value : {Json(0), Json(-1e-5), Json(1e-60), Json(2.0), Json("1e-5")}) {
    expect_bad(with(llama_v4(), "rms_norm_eps", value), {"rms_norm_eps"});
  }
}

TEST(Config, OtherArchitecturesAreRefusedWithTheListOfSupportedOnes) {
  for (const char* name : {"Qwen3MoeForCausalLM", "Gemma3ForCausalLM", "LlamaModel"}) {
    expect_bad(with(llama_v4(), "architectures", Json::array({name})),
               {name, "supported: LlamaForCausalLM, Qwen3ForCausalLM"});
  }
  expect_bad(with(without(llama_v4(), "architectures"), "model_type", "gemma3"),
             {"gemma3", "supported"});
  expect_bad(without(without(llama_v4(), "architectures"), "model_type"), {"neither"});
  expect_bad(with(llama_v4(), "model_type", "qwen3"), {"LlamaForCausalLM", "qwen3"});
  expect_bad(with(llama_v4(), "architectures", "LlamaForCausalLM"), {"architectures"});
  EXPECT_EQ(parse(without(llama_v4(), "architectures")).arch, Arch::kLlama);
  EXPECT_EQ(parse(without(qwen_v5(), "model_type")).arch, Arch::kQwen3);
}

TEST(Config, FieldsThatChangeTheNumbersAreRefusedByName) {
  const std::vector<std::pair<const char*, Json>> fields = {
      {"attention_bias", true},
      {"mlp_bias", true},
      {"rope_interleaved", true},
      {"use_sliding_window", true},
      {"is_encoder_decoder", true},
      {"add_cross_attention", true},
      {"attention_bias", "yes"},
      {"hidden_act", "gelu"},
      {"pretraining_tp", 2},
      {"partial_rotary_factor", 0.5},
      {"pruned_heads", {{"0", Json::array({1})}}},
      {"sliding_window", 4096},  // Llama has no switch beside it
      {"layer_types", Json::array({"full_attention"})},
      {"layer_types", Json(std::vector<std::string>(16, "sliding_attention"))},
  };
  for (const auto& [key, value] : fields) {
    SCOPED_TRACE(std::string(key) + " = " + value.dump());
    expect_bad(with(llama_v4(), key, value), {key});
  }
  EXPECT_EQ(parse(with(qwen_v5(), "sliding_window", 4096)).arch, Arch::kQwen3);  // switched off
}

TEST(Config, QuantizedModelsAreRefused) {
  expect_bad(with(llama_v4(), "quantization_config", {{"quant_method", "gptq"}}),
             {"already quantized", "quantization_config"});
  EXPECT_NO_THROW(parse(with(llama_v4(), "quantization_config", nullptr)));
}

TEST(Config, UnknownFieldsAreErrorsUnlessNull) {
  expect_bad(with(llama_v4(), "logit_scale", 0.5), {"unknown config field", "logit_scale = 0.5"});
  expect_bad(with(llama_v4(), "use_rope", false), {"use_rope = false"});
  expect_bad(with(llama_v4(), "x", {{"y", 1}}), {"x = {...}"});
  EXPECT_NO_THROW(parse(with(llama_v4(), "logit_scale", nullptr)));
}

TEST(Config, BrokenJsonIsReportedWithItsPosition) {
  expect_error(ErrorKind::kBadData, {"config.json", "line 2, column 1"},
               [] { parse_config("{\n", "config.json"); });
  expect_error(ErrorKind::kBadData, {"not a JSON object"},
               [] { parse_config("[]", "config.json"); });
  expect_error(ErrorKind::kBadData, {"\"vocab_size\"", "twice"},
               [] { parse_config(R"({"vocab_size":1,"vocab_size":2})", "config.json"); });
}

TEST(Config, StopTokensAreAnIdOrAListOfIds) {
  EXPECT_EQ(parse(with(llama_v4(), "eos_token_id", 2)).eos_ids, std::vector<int32_t>{2});
  for (const Json& value :
       {Json("2"), Json(-1), Json(1.5), Json::array({1, nullptr}), Json(int64_t{1} << 33)}) {
    expect_bad(with(llama_v4(), "eos_token_id", value), {"eos_token_id"});
  }
}

TEST(RopeConfig, UnknownTypesAndFieldsAreErrors) {
  for (const char* type : {"longrope", "dynamic", "linear", "su"}) {
    Json json = llama_v4();
    json["rope_scaling"]["rope_type"] = type;
    expect_bad(json, {std::string("rope_type = \"") + type, "default, llama3, yarn"});
  }
  Json extra = llama_v4();
  extra["rope_scaling"]["attention_factor"] = 1.2;
  expect_bad(extra, {"attention_factor = 1.2", "llama3"});
  expect_bad(with(llama_v4(), "rope_scaling", {{"factor", 2.0}}), {"factor = 2.0", "default"});
  expect_bad(with(llama_v4(), "rope_scaling", "llama3"), {"rope_scaling", "object"});
  Json unknown = yarn();
  unknown["mscale_some_dim"] = 0.707;
  expect_bad(qwen_with_yarn(unknown), {"mscale_some_dim = 0.707", "yarn"});
  for (const Json& theta : {Json(0), Json(-1), Json(1), Json(1e300), Json("1e4")}) {
    expect_bad(with(llama_v4(), "rope_theta", theta), {"rope_theta"});
  }
}

TEST(RopeConfig, Llama3NeedsAllItsFields) {
  for (const char* key :
       {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}) {
    Json json = llama_v4();
    json["rope_scaling"].erase(key);
    expect_bad(json, {"missing field", key});
    json["rope_scaling"][key] = -1;
    expect_bad(json, {key});
  }
  for (double high : {1.0, 0.5}) {  // a zero or negative width of the blend
    Json json = llama_v4();
    json["rope_scaling"]["high_freq_factor"] = high;
    expect_bad(json, {"high_freq_factor", "low_freq_factor 1"});
  }
}

TEST(RopeConfig, YarnDefaultsAreThoseOfTransformers) {
  const RopeConfig rope = parse(qwen_with_yarn(yarn())).rope;
  EXPECT_EQ(rope.kind, RopeKind::kYarn);
  EXPECT_EQ(rope.factor, 4.0);
  EXPECT_EQ(rope.original_max_seq_len, 32768.0);
  EXPECT_EQ(rope.beta_fast, 32.0);
  EXPECT_EQ(rope.beta_slow, 1.0);
  EXPECT_TRUE(rope.truncate);
  EXPECT_DOUBLE_EQ(rope.attention_factor, 1.138629436111989);
  Json given = yarn();
  given["attention_factor"] = 1.5;
  given["beta_fast"] = 16;
  given["truncate"] = false;
  const RopeConfig other = parse(qwen_with_yarn(given)).rope;
  EXPECT_EQ(other.attention_factor, 1.5);
  EXPECT_EQ(other.beta_fast, 16.0);
  EXPECT_FALSE(other.truncate);
  Json no_original = yarn();
  no_original.erase("original_max_position_embeddings");
  EXPECT_EQ(parse(qwen_with_yarn(no_original)).rope.original_max_seq_len, 131072.0);
}

TEST(RopeConfig, YarnFactorMustAgreeWithTheLengths) {
  // As an old model card of Qwen3 advises: factor 4, original 32768, maximum left at 40960.
  Json json = qwen_with_yarn(yarn());
  json["max_position_embeddings"] = 40960;
  expect_bad(json, {"yarn factor 4", "= 1.25", "set max_position_embeddings"});
  expect_bad(qwen_with_yarn(yarn(0.5)), {"factor = 0.5"});
  Json betas = yarn();
  betas["beta_fast"] = 0.5;
  expect_bad(qwen_with_yarn(betas), {"beta_fast 0.5", "beta_slow 1"});
}

// --- frequencies -----------------------------------------------------------------------------

using Expected = std::vector<std::pair<int, double>>;

// torch's float32 pow is off by one unit in the last place now and then, ours (double pow, rounded)
// hardly ever; a blend of two such values adds one more: 2 units, 2^-22 relative.
void expect_frequencies(const RopeConfig& rope, int64_t head_dim, const Expected& expected) {
  const std::vector<float> got = rope_inv_freq(rope, head_dim);
  ASSERT_EQ(static_cast<int64_t>(got.size()), head_dim / 2);
  for (const auto& [pair, value] : expected) {
    EXPECT_NEAR(got[static_cast<size_t>(pair)], value, 0x1p-22 * value) << "pair " << pair;
  }
}

RopeConfig default_rope(double theta) {
  RopeConfig rope;
  rope.theta = theta;
  return rope;
}

RopeConfig llama3_rope(double factor) {
  RopeConfig rope = default_rope(500000.0);
  rope.kind = RopeKind::kLlama3;
  rope.factor = factor;
  rope.original_max_seq_len = 8192;
  return rope;
}

RopeConfig yarn_rope(bool truncate) {
  RopeConfig rope = default_rope(1000000.0);
  rope.kind = RopeKind::kYarn;
  rope.factor = 4.0;
  rope.original_max_seq_len = 32768;
  rope.truncate = truncate;
  return rope;
}

// The numbers below were computed by transformers 5.23.0 with torch 2.15.0 (CPU, float32).
TEST(RopeFrequencies, DefaultIsAPowerOfTheta) {
  expect_frequencies(default_rope(1e6), 128,
                     {{0, 1.0},
                      {1, 0x1.9c975ap-1},
                      {2, 0x1.4c7bc0p-1},
                      {31, 0x1.454deep-10},
                      {32, 0x1.0624dep-10},
                      {62, 0x1.9d5ef2p-20},
                      {63, 0x1.4d1c98p-20}});
  expect_frequencies(default_rope(1e6), 24,
                     {{0, 1.0}, {1, 0x1.43d136p-2}, {5, 0x1.9e7c72p-9}, {11, 0x1.a86f02p-19}});
}

TEST(RopeFrequencies, Llama3MatchesTransformers) {
  expect_frequencies(llama3_rope(32), 64,
                     {{0, 1.0},
                      {14, 0x1.a4ee40p-9},
                      {15, 0x1.524f36p-10},
                      {16, 0x1.c26c40p-12},
                      {17, 0x1.9731eep-14},
                      {18, 0x1.46831ap-16},
                      {31, 0x1.948360p-24}});
  expect_frequencies(llama3_rope(32), 128,
                     {{28, 0x1.a4ee40p-9},
                      {29, 0x1.15a9f0p-9},
                      {30, 0x1.524f36p-10},
                      {33, 0x1.d32b32p-13},
                      {34, 0x1.9731eep-14},
                      {35, 0x1.90d10cp-16},
                      {63, 0x1.4985fep-24}});
  expect_frequencies(llama3_rope(8), 128,
                     {{28, 0x1.a4ee40p-9},
                      {29, 0x1.1bfa0cp-9},
                      {30, 0x1.67a23ap-10},
                      {33, 0x1.47e210p-12},
                      {34, 0x1.765ba4p-13},
                      {35, 0x1.90d10cp-14},
                      {63, 0x1.4985fep-22}});
  expect_frequencies(llama3_rope(3), 128,
                     {{28, 0x1.a4ee40p-9},
                      {29, 0x1.2a0166p-9},
                      {33, 0x1.0cb7c6p-11},
                      {35, 0x1.0b3608p-12},
                      {63, 0x1.b75d52p-21}});
}

TEST(RopeFrequencies, YarnMatchesTransformers) {
  expect_frequencies(yarn_rope(true), 128,
                     {{0, 1.0},
                      {22, 0x1.1bc25ap-7},
                      {23, 0x1.c9548cp-8},
                      {24, 0x1.6046eep-8},
                      {32, 0x1.3c1d64p-11},
                      {39, 0x1.103a14p-14},
                      {40, 0x1.74eea6p-15},
                      {41, 0x1.2c8648p-15},
                      {63, 0x1.4d1c98p-22}});
  expect_frequencies(
      yarn_rope(false), 128,
      {{24, 0x1.699470p-8}, {32, 0x1.3e74ecp-11}, {39, 0x1.038914p-14}, {63, 0x1.4d1c98p-22}});
}

// Which pairs keep their frequency, are blended, or are divided by the factor.
TEST(RopeFrequencies, Llama3SplitsThePairsWhereTheRuleSays) {
  struct Case {
    int64_t head_dim;
    double factor;
    int first_blended, first_divided;
  };
  for (const Case& c : {Case{64, 32, 15, 18}, Case{128, 32, 29, 35}, Case{128, 8, 29, 35}}) {
    const std::vector<float> plain = rope_inv_freq(default_rope(500000.0), c.head_dim);
    const std::vector<float> scaled = rope_inv_freq(llama3_rope(c.factor), c.head_dim);
    for (int i = 0; i < c.head_dim / 2; ++i) {
      const float f = plain[static_cast<size_t>(i)], g = scaled[static_cast<size_t>(i)];
      const float divided = f / static_cast<float>(c.factor);
      if (i < c.first_blended) {
        EXPECT_EQ(g, f) << i;
      } else if (i < c.first_divided) {
        EXPECT_TRUE(divided < g && g < f) << i;
      } else {
        EXPECT_EQ(g, divided) << i;
      }
    }
  }
}

TEST(RopeFrequencies, YarnBlendsBetweenPairs23And40ForQwen3) {
  const std::vector<float> plain = rope_inv_freq(default_rope(1e6), 128);
  const std::vector<float> scaled = rope_inv_freq(yarn_rope(true), 128);
  for (size_t i = 0; i < 64; ++i) {
    const float f = plain[i], g = scaled[i];
    if (i <= 23) {
      EXPECT_EQ(g, f) << i;
    } else if (i < 40) {
      EXPECT_TRUE(f / 4 < g && g < f) << i;
    } else {
      EXPECT_EQ(g, f / 4) << i;
    }
  }
}

TEST(RopeFrequencies, StayFiniteForEveryAcceptedExtreme) {
  for (double theta : {1.0 + 1e-9, 1e12}) {
    for (double factor : {1.0, 1e6}) {
      for (double length : {1.0, 1073741824.0}) {
        for (RopeConfig rope : {default_rope(theta), llama3_rope(1), yarn_rope(false)}) {
          rope.theta = theta;
          rope.factor = factor;
          rope.original_max_seq_len = length;
          for (float f : rope_inv_freq(rope, 2)) EXPECT_TRUE(std::isfinite(f) && f >= 0);
          for (float f : rope_inv_freq(rope, 256)) EXPECT_TRUE(std::isfinite(f) && f >= 0);
        }
      }
    }
  }
}

}  // namespace
}  // namespace tq
