// Hugging Face folders and load_model(): names, shapes, tied heads, alignment, everything refused.
#include <gtest/gtest.h>

#include <filesystem>
#include <limits>
#include <map>

#include "model/weights.h"
#include "tests/expect_error.h"
#include "tests/safetensors_writer.h"
#include "tests/temp_dir.h"

namespace tq {
namespace {

struct Weight {
  std::vector<int64_t> shape;
  std::vector<float> values;
  DType dtype = DType::kF32;
};

/// A model of one layer, in memory until save(): dim 4, hidden_dim 6, 2 heads of 4 (not dim /
/// heads), 1 key head, vocabulary of 5. Every weight has its own values.
class HfFolder : public ::testing::Test {
 protected:
  HfFolder() { reset("llama"); }

  void reset(const std::string& family) {
    config_ = {
        {"model_type", family},   {"hidden_size", 4},         {"intermediate_size", 6},
        {"num_hidden_layers", 1}, {"num_attention_heads", 2}, {"num_key_value_heads", 1},
        {"head_dim", 4},          {"vocab_size", 5},          {"max_position_embeddings", 8},
        {"rms_norm_eps", 1e-5},   {"rope_theta", 10000.0},    {"tie_word_embeddings", false}};
    weights_.clear();
    const std::string layer = "model.layers.0.";
    add("model.embed_tokens.weight", {5, 4});
    add("lm_head.weight", {5, 4});
    add("model.norm.weight", {4});
    add(layer + "input_layernorm.weight", {4});
    add(layer + "post_attention_layernorm.weight", {4});
    add(layer + "self_attn.q_proj.weight", {8, 4});
    add(layer + "self_attn.k_proj.weight", {4, 4});
    add(layer + "self_attn.v_proj.weight", {4, 4});
    add(layer + "self_attn.o_proj.weight", {4, 8});
    add(layer + "mlp.gate_proj.weight", {6, 4});
    add(layer + "mlp.up_proj.weight", {6, 4});
    add(layer + "mlp.down_proj.weight", {4, 6});
    if (family == "qwen3") {
      add(layer + "self_attn.q_norm.weight", {4});
      add(layer + "self_attn.k_norm.weight", {4});
    }
  }

  void add(const std::string& name, const std::vector<int64_t>& shape) {
    Weight weight{shape, {}, DType::kF32};
    int64_t count = 1;
    for (int64_t size : shape) count *= size;
    // Small multiples of 1/4 in an order of their own: exact in all three types.
    for (int64_t i = 0; i < count; ++i) {
      weight.values.push_back(static_cast<float>((i * 7 + static_cast<int64_t>(name.size())) % 64) /
                              4);
    }
    weights_[name] = weight;
  }

  void save(const std::string& header_padding = "") {
    SafetensorsWriter writer;
    for (const auto& [name, w] : weights_) writer.add(name, w.dtype, w.shape, w.values);
    write_bytes(dir_ / "model.safetensors", writer.bytes(header_padding));
    write_bytes(dir_ / "config.json", config_.dump());
    write_bytes(dir_ / "tokenizer.json", "{\"tokenizer\":1}");
  }
  Model load() {
    save();
    return load_hf_folder(dir_.path());
  }
  void expect_bad(std::initializer_list<std::string> words) {
    save();
    expect_error(ErrorKind::kBadData, words, [&] { load_hf_folder(dir_.path()); });
  }
  std::vector<float> values(const Matrix& m) {
    std::vector<float> out(static_cast<size_t>(m.rows * m.cols));
    for (int64_t row = 0; row < m.rows; ++row) matrix_row_f32(m, row, out.data() + row * m.cols);
    return out;
  }
  void expect_weight(const Matrix& m, const std::string& name) {
    EXPECT_EQ((std::vector<int64_t>{m.rows, m.cols}), weights_.at(name).shape) << name;
    EXPECT_EQ(values(m), weights_.at(name).values) << name;
  }

  TempDir dir_;
  Json config_;
  std::map<std::string, Weight> weights_;
};

TEST_F(HfFolder, EveryWeightGoesToItsPlace) {
  reset("qwen3");
  const Model model = load();
  expect_weight(model.tok_embed, "model.embed_tokens.weight");
  expect_weight(model.lm_head.weight, "lm_head.weight");
  EXPECT_EQ(model.final_norm, weights_.at("model.norm.weight").values);
  ASSERT_EQ(model.layers.size(), 1u);
  const Layer& layer = model.layers[0];
  const std::string prefix = "model.layers.0.";
  expect_weight(layer.wq.weight, prefix + "self_attn.q_proj.weight");
  expect_weight(layer.wk.weight, prefix + "self_attn.k_proj.weight");
  expect_weight(layer.wv.weight, prefix + "self_attn.v_proj.weight");
  expect_weight(layer.wo.weight, prefix + "self_attn.o_proj.weight");
  expect_weight(layer.w_gate.weight, prefix + "mlp.gate_proj.weight");
  expect_weight(layer.w_up.weight, prefix + "mlp.up_proj.weight");
  expect_weight(layer.w_down.weight, prefix + "mlp.down_proj.weight");
  EXPECT_EQ(layer.attn_norm, weights_.at(prefix + "input_layernorm.weight").values);
  EXPECT_EQ(layer.ffn_norm, weights_.at(prefix + "post_attention_layernorm.weight").values);
  EXPECT_EQ(layer.q_norm, weights_.at(prefix + "self_attn.q_norm.weight").values);
  EXPECT_EQ(layer.k_norm, weights_.at(prefix + "self_attn.k_norm.weight").values);
  for (const NamedLinear& named : kLayerLinears) {
    const Linear& linear = layer.*named.member;
    EXPECT_EQ(linear.act.bits, 16) << named.name;
    EXPECT_EQ(linear.rank(), 0) << named.name;
    EXPECT_FALSE(linear.input.active()) << named.name;
  }
  EXPECT_FALSE(model.residual_basis.active());
  EXPECT_EQ(model.quantization["method"], "none");
  EXPECT_EQ(model.source, dir_.path());
}

TEST_F(HfFolder, LlamaHasNoHeadNorms) {
  const Model model = load();
  EXPECT_TRUE(model.layers[0].q_norm.empty());
  EXPECT_TRUE(model.layers[0].k_norm.empty());
  weights_.clear();
  reset("llama");
  add("model.layers.0.self_attn.q_norm.weight", {4});
  expect_bad({"q_norm.weight", "not part of the Llama model"});
}

TEST_F(HfFolder, AllThreeTypesGiveTheSameValues) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (auto& item : weights_) item.second.dtype = dtype;
    const Model model = load();
    expect_weight(model.layers[0].wq.weight, "model.layers.0.self_attn.q_proj.weight");
    EXPECT_EQ(model.final_norm, weights_.at("model.norm.weight").values);
    EXPECT_EQ(model.tok_embed.storage, dtype == DType::kF32   ? Storage::kF32
                                       : dtype == DType::kF16 ? Storage::kF16
                                                              : Storage::kBF16);
  }
}

TEST_F(HfFolder, MatricesAreAlignedWhateverTheHeaderLength) {
  for (const char* padding : {"", " ", "  ", "   "}) {
    save(padding);
    const Model model = load_hf_folder(dir_.path());
    const Matrix& wq = model.layers[0].wq.weight;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(wq.data) % 4, 0u);
    expect_weight(wq, "model.layers.0.self_attn.q_proj.weight");
    model.release(wq);
    expect_weight(wq, "model.layers.0.self_attn.q_proj.weight");
  }
}

TEST_F(HfFolder, TheViewsOutliveEverythingButTheModel) {
  Model copy;
  {
    const Model model = load();
    copy = model;
  }
  std::filesystem::remove(dir_ / "model.safetensors");
  expect_weight(copy.tok_embed, "model.embed_tokens.weight");
}

TEST_F(HfFolder, TextsTravelByteForByte) {
  save();
  write_bytes(dir_ / "generation_config.json", "{ \"top_k\": 20 }\n");
  write_bytes(dir_ / "chat_template.jinja", "{{ x }}\n");
  const Model model = load_hf_folder(dir_.path());
  EXPECT_EQ(model.texts.config, config_.dump());
  EXPECT_EQ(model.texts.tokenizer, "{\"tokenizer\":1}");
  EXPECT_EQ(model.texts.generation_config, "{ \"top_k\": 20 }\n");
  EXPECT_EQ(model.texts.chat_template, "{{ x }}\n");
  EXPECT_EQ(model.texts.tokenizer_config, "");
}

// --- tied embeddings: flag and tensor, four cases ------------------------------------------------

TEST_F(HfFolder, UntiedWithoutHeadIsAnErrorThatSaysHowToTie) {
  weights_.erase("lm_head.weight");
  expect_bad({"lm_head.weight", "\"tie_word_embeddings\": true"});
  config_.erase("tie_word_embeddings");  // absent means false
  expect_bad({"lm_head.weight"});
}

TEST_F(HfFolder, TiedWithoutHeadSharesTheEmbedding) {
  weights_.erase("lm_head.weight");
  config_["tie_word_embeddings"] = true;
  const Model model = load();
  EXPECT_TRUE(model.config.tied);
  EXPECT_EQ(model.lm_head.weight.data, model.tok_embed.data);
}

TEST_F(HfFolder, TiedWithAnEqualHeadSharesTheEmbedding) {
  config_["tie_word_embeddings"] = true;
  weights_["lm_head.weight"] = weights_["model.embed_tokens.weight"];
  const Model same = load();
  EXPECT_EQ(same.lm_head.weight.data, same.tok_embed.data);
  weights_["lm_head.weight"].dtype = DType::kBF16;  // the same values, stored narrower
  const Model narrow = load();
  EXPECT_EQ(narrow.lm_head.weight.data, narrow.tok_embed.data);
}

TEST_F(HfFolder, TiedWithAnotherHeadIsAnError) {
  config_["tie_word_embeddings"] = true;
  weights_["lm_head.weight"] = weights_["model.embed_tokens.weight"];
  weights_["lm_head.weight"].values.back() += 0.25f;
  expect_bad({"tie_word_embeddings is true", "lm_head.weight differs"});
  weights_["lm_head.weight"].dtype = DType::kBF16;
  expect_bad({"lm_head.weight differs"});
}

// --- what is refused ---------------------------------------------------------------------------

TEST_F(HfFolder, EveryMissingWeightIsNamed) {
  reset("qwen3");
  const std::map<std::string, Weight> all = weights_;
  for (const auto& item : all) {
    weights_ = all;
    weights_.erase(item.first);
    expect_bad({"missing", item.first});
  }
}

TEST_F(HfFolder, EveryWrongShapeIsNamedWithBothShapes) {
  reset("qwen3");
  const std::map<std::string, Weight> all = weights_;
  for (const auto& item : all) {
    weights_ = all;
    auto& shape = weights_[item.first].shape;
    shape.insert(shape.begin(), 1);  // same elements, another rank
    expect_bad({item.first + " is [1, ", "config.json asks for"});
  }
  weights_ = all;
  weights_["model.layers.0.mlp.down_proj.weight"].shape = {6, 4};
  expect_bad({"down_proj.weight is [6, 4]", "[4, 6]"});
}

TEST_F(HfFolder, EmptyWeightsAreWrongShapes) {
  weights_["model.norm.weight"] = {{0}, {}, DType::kF32};
  expect_bad({"model.norm.weight is [0]"});
}

TEST_F(HfFolder, TensorsThatWouldBeLeftOutAreErrors) {
  const std::map<std::string, Weight> all = weights_;
  for (const char* name :
       {"model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.self_attn.rotary_emb.scale", "extra"}) {
    weights_ = all;
    add(name, {2});
    expect_bad({"not supported", name});
  }
  add("extra2", {2});
  expect_bad({"extra and 1 more"});
  weights_ = all;
  add("model.layers.0.self_attn.rotary_emb.inv_freq", {2});
  EXPECT_NO_THROW(load());  // recomputable
}

TEST_F(HfFolder, WeightsOfOtherTypesAreNamed) {
  SafetensorsWriter writer;
  for (const auto& [name, w] : weights_) {
    if (name == "model.norm.weight") {
      writer.add(name, "I64", {4}, std::string(32, '\0'));
    } else {
      writer.add(name, w.dtype, w.shape, w.values);
    }
  }
  save();
  write_bytes(dir_ / "model.safetensors", writer.bytes());
  expect_error(ErrorKind::kBadData, {"model.norm.weight is I64", "F32, F16 or BF16"},
               [&] { load_hf_folder(dir_.path()); });
}

TEST_F(HfFolder, MissingAndEmptyFilesAreNamed) {
  for (const char* name : {"config.json", "tokenizer.json", "model.safetensors"}) {
    save();
    std::filesystem::remove(dir_ / name);
    expect_error(ErrorKind::kBadData, {dir_.path(), name}, [&] { load_hf_folder(dir_.path()); });
    write_bytes(dir_ / name, "");
    expect_error(ErrorKind::kBadData, {name}, [&] { load_hf_folder(dir_.path()); });
  }
}

TEST_F(HfFolder, ConfigErrorsNameTheFile) {
  config_["attention_bias"] = true;
  expect_bad({"config.json", "attention_bias = true"});
}

// --- load_model --------------------------------------------------------------------------------

TEST_F(HfFolder, LoadModelOpensFolders) {
  save();
  EXPECT_EQ(load_model(dir_.path()).config.dim, 4);
}

TEST_F(HfFolder, LoadModelSaysWhatAPathLooksLike) {
  save();
  write_bytes(dir_ / "a.gguf", "GGUF\x03");
  write_bytes(dir_ / "a.txt", "hello");
  write_bytes(dir_ / "empty.tq", "");
  const auto expect = [&](ErrorKind kind, const char* name,
                          std::initializer_list<std::string> words) {
    expect_error(kind, words, [&] { load_model(dir_ / name); });
  };
  expect(ErrorKind::kIo, "none", {dir_ / "none", "model does not exist", "expected a .tq file"});
  expect(ErrorKind::kBadData, "a.gguf", {"a GGUF file"});
  expect(ErrorKind::kBadData, "model.safetensors", {"single safetensors file", "the folder"});
  expect(ErrorKind::kBadData, "a.txt", {"neither a .tq file nor a model folder"});
  expect(ErrorKind::kBadData, "empty.tq", {"neither"});
  expect_error(ErrorKind::kIo, {"neither a file nor a folder"}, [] { load_model("/dev/null"); });
}

TEST_F(HfFolder, LoadHfFolderTellsQuantizedFilesFromOtherFiles) {
  write_bytes(dir_ / "a.gguf", "GGUF\x03");
  write_bytes(dir_ / "a.tq", std::string("\x89TQ\r\n\x1a\n\0", 8));
  write_bytes(dir_ / "a.txt", "hello");
  expect_error(ErrorKind::kBadData, {"already quantized", "GGUF"},
               [&] { load_hf_folder(dir_ / "a.gguf"); });
  expect_error(ErrorKind::kBadData, {"already quantized", ".tq"},
               [&] { load_hf_folder(dir_ / "a.tq"); });
  expect_error(ErrorKind::kIo, {"it is a file"}, [&] { load_hf_folder(dir_ / "a.txt"); });
  expect_error(ErrorKind::kIo, {"does not exist"}, [&] { load_hf_folder(dir_ / "none"); });
}

// --- matrices ----------------------------------------------------------------------------------

TEST(Matrix, PackedCodesAndRows) {
  const uint8_t nibbles[] = {0x70, 0xF8, 0x0E, 0x98, 0x21, 0x05};
  const uint16_t scales[] = {f32_to_f16(1.0f),  f32_to_f16(0.5f), f32_to_f16(2.0f),
                             f32_to_f16(-1.0f), f32_to_f16(0.0f), f32_to_f16(4.0f)};
  Matrix m;
  m.storage = Storage::kQ4;
  m.rows = 2;
  m.cols = 5;
  m.group = 2;
  m.data = reinterpret_cast<const std::byte*>(nibbles);
  m.scales = scales;
  EXPECT_EQ(m.row_bytes(), 3);
  EXPECT_EQ(m.n_groups(), 3);
  EXPECT_EQ(m.scale_bytes(), 12u);
  // The low nibble is the even column; a code is the nibble minus 8.
  const int codes[2][5] = {{-8, -1, 0, 7, 6}, {0, 1, -7, -6, -3}};
  const float scale_of[2][5] = {{1, 1, 0.5f, 0.5f, 2}, {-1, -1, 0, 0, 4}};
  float row[5];
  for (int r = 0; r < 2; ++r) {
    matrix_row_f32(m, r, row);
    for (int c = 0; c < 5; ++c) {
      EXPECT_EQ(packed_code(m, r, c), codes[r][c]) << r << "," << c;
      EXPECT_EQ(row[c], scale_of[r][c] * static_cast<float>(codes[r][c])) << r << "," << c;
    }
  }
  const int8_t bytes[] = {-127, 0, 5, 127};
  const uint16_t one[] = {f32_to_f16(0.5f), f32_to_f16(1.0f)};
  m = {Storage::kQ8, 1, 4, 3, reinterpret_cast<const std::byte*>(bytes), one};
  matrix_row_f32(m, 0, row);
  EXPECT_EQ((std::vector<float>(row, row + 4)), (std::vector<float>{-63.5f, 0.0f, 2.5f, 127.0f}));
}

TEST(Matrix, LayerLinearsAreInFileOrder) {
  std::string names;
  for (const NamedLinear& named : kLayerLinears) names += std::string(named.name) + " ";
  EXPECT_EQ(names, "wq wk wv wo w_gate w_up w_down ");
}

TEST(CheckFinite, CountsAndLocatesNanAndInfinity) {
  std::vector<float> values(12, 1.0f);
  const Matrix m{Storage::kF32, 3, 4, 0, reinterpret_cast<const std::byte*>(values.data()),
                 nullptr};
  EXPECT_NO_THROW(check_finite(m, "w", "folder"));
  values[6] = std::numeric_limits<float>::quiet_NaN();
  values[11] = -std::numeric_limits<float>::infinity();
  expect_error(ErrorKind::kBadData, {"(folder)", "w has 2 NaN or infinite", "[1, 2]"},
               [&] { check_finite(m, "w", "folder"); });
  std::vector<uint16_t> halves(12, 0x3C00);
  halves[0] = 0x7C00;
  const Matrix half{Storage::kF16, 3, 4, 0, reinterpret_cast<const std::byte*>(halves.data()),
                    nullptr};
  expect_error(ErrorKind::kBadData, {"w has 1 ", "[0, 0]"}, [&] { check_finite(half, "w", "f"); });
  halves[0] = 0x7BFF;
  EXPECT_NO_THROW(check_finite(half, "w", "f"));
}

}  // namespace
}  // namespace tq
