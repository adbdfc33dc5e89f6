// The .tq container: round trip, and that damage of any kind is found.
#include <gtest/gtest.h>
#include <unistd.h>
#include <xxhash.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "model/error.h"
#include "model/tq_file.h"
#include "model/tq_layout.h"
#include "tests/orthogonal.h"
#include "tests/temp_dir.h"

namespace tq {
namespace {

const char* kConfig = R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama",
  "vocab_size": 8, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
  "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "silu",
  "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
  "tie_word_embeddings": true})";

// Memory behind the matrices of a hand-made model.
struct Bytes {
  std::vector<std::vector<std::byte>> blocks;
  std::mt19937 random{1};
  std::byte* take(size_t n) {
    auto& block = blocks.emplace_back(n);
    for (std::byte& b : block) b = static_cast<std::byte>(random() & 0xFF);
    return block.data();
  }
  Matrix matrix(Storage storage, int64_t rows, int64_t cols, int64_t group) {
    Matrix m;
    m.storage = storage;
    m.rows = rows;
    m.cols = cols;
    m.group = group;
    m.data = take(m.data_bytes());
    if (m.packed()) {
      auto* scales = reinterpret_cast<uint16_t*>(take(m.scale_bytes()));
      for (int64_t i = 0; i < rows * m.n_groups(); ++i) scales[i] = 0x2E66;  // 0.1
      m.scales = scales;
    }
    return m;
  }
};

struct TestModel {
  Bytes bytes;
  std::vector<int8_t> signs = std::vector<int8_t>(64, 1);
  Model model;
  TestModel() {
    model.texts.config = kConfig;
    model.texts.tokenizer = "{}";
    model.quantization = {{"method", "test"}};
    model.tok_embed = bytes.matrix(Storage::kBF16, 8, 64, 0);
    model.lm_head.weight = model.tok_embed;
    signs[3] = -1;
    model.residual_basis = {Transform::Kind::kHadamard, 64, 64, signs.data()};
    model.final_norm.assign(64, 1.0f);
    Layer& layer = model.layers.emplace_back();
    layer.attn_norm.assign(64, 1.0f);
    layer.ffn_norm.assign(64, 2.0f);
    const auto linear = [&](int64_t out, int64_t in) {
      Linear l;
      l.weight = bytes.matrix(Storage::kQ4, out, in, 64);
      l.act = {4, 64, 0.95f};
      return l;
    };
    layer.wq = linear(64, 64);
    layer.wk = linear(32, 64);
    layer.wv = linear(32, 64);
    layer.wo = linear(64, 64);
    layer.wo.branch_a = bytes.matrix(Storage::kF16, 4, 64, 0);
    layer.wo.branch_b = bytes.matrix(Storage::kF16, 64, 4, 0);
    layer.w_gate = linear(96, 64);
    layer.w_gate.act = {3, 32, 1.0f, ActCodes::kAll};
    layer.w_up = linear(96, 64);
    layer.w_down = linear(64, 96);
    layer.w_down.input = {Transform::Kind::kHadamard, 96, 96, nullptr};
    layer.ffn_skip = {bytes.matrix(Storage::kF16, 3, 64, 0), bytes.matrix(Storage::kQ8, 64, 3, 32)};
  }
  void write(const std::string& path) const {
    TqWriter writer(path);
    writer.add_table(model.tok_embed);
    writer.add_linear("lm_head", model.lm_head, true);
    writer.add_residual_basis(model.residual_basis);
    writer.add_f32("final_norm", model.final_norm);
    writer.add_f32("layers.0.attn_norm", model.layers[0].attn_norm);
    writer.add_f32("layers.0.ffn_norm", model.layers[0].ffn_norm);
    for (const NamedLinear& named : kLayerLinears) {
      writer.add_linear(std::string("layers.0.") + named.name, model.layers[0].*named.member);
    }
    for (const NamedSkip& named : kLayerSkips) {
      const auto& skip = model.layers[0].*named.member;
      if (skip) writer.add_skip(std::string("layers.0.") + named.name, *skip);
    }
    writer.finish(model.texts, model.quantization);
  }
};

bool same_matrix(const Matrix& a, const Matrix& b) {
  return a.storage == b.storage && a.rows == b.rows && a.cols == b.cols && a.group == b.group &&
         std::memcmp(a.data, b.data, a.data_bytes()) == 0 &&
         (!a.packed() || std::memcmp(a.scales, b.scales, a.scale_bytes()) == 0);
}

std::string failure(const std::string& path, bool verify = false) {
  try {
    if (verify) {
      verify_tq_file(path);
    } else {
      load_tq_file(path);
    }
    return "";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kBadData);
    return error.what();
  }
}

// Rewrites the header text and repairs all checksums: what a hostile author would do.
void edit_header(const std::string& path, const std::string& from, const std::string& to) {
  std::string bytes = read_bytes(path);
  TqPrologue prologue;
  std::memcpy(&prologue, bytes.data(), sizeof prologue);
  std::string header = bytes.substr(prologue.header_offset);
  const size_t at = header.find(from);
  ASSERT_NE(at, std::string::npos) << from;
  header.replace(at, from.size(), to);
  prologue.header_bytes = header.size();
  prologue.header_hash = XXH3_64bits(header.data(), header.size());
  prologue.file_bytes = prologue.header_offset + header.size();
  prologue.prologue_hash = XXH3_64bits(&prologue, offsetof(TqPrologue, prologue_hash));
  bytes.resize(prologue.header_offset);
  bytes += header;
  std::memcpy(bytes.data(), &prologue, sizeof prologue);
  write_bytes(path, bytes);
}

void set_version(const std::string& path, uint32_t version) {
  std::string bytes = read_bytes(path);
  TqPrologue prologue;
  std::memcpy(&prologue, bytes.data(), sizeof prologue);
  prologue.version = version;
  prologue.prologue_hash = XXH3_64bits(&prologue, offsetof(TqPrologue, prologue_hash));
  std::memcpy(bytes.data(), &prologue, sizeof prologue);
  write_bytes(path, bytes);
}

class TqFile : public ::testing::Test {
 protected:
  void SetUp() override { test_model.write(path); }
  TempDir dir;
  TestModel test_model;
  const std::string path = dir / "model.tq";
};

TEST_F(TqFile, RoundTripKeepsEveryValue) {
  const Model model = load_tq_file(path);
  const Model& expected = test_model.model;
  EXPECT_EQ(model.texts.config, kConfig);
  EXPECT_TRUE(same_matrix(model.tok_embed, expected.tok_embed));
  EXPECT_EQ(model.lm_head.weight.data, model.tok_embed.data);
  EXPECT_EQ(model.final_norm, expected.final_norm);
  EXPECT_EQ(std::memcmp(model.residual_basis.signs, test_model.signs.data(), 64), 0);
  for (const NamedLinear& named : kLayerLinears) {
    const Linear& a = model.layers[0].*named.member;
    const Linear& b = expected.layers[0].*named.member;
    EXPECT_TRUE(same_matrix(a.weight, b.weight)) << named.name;
    EXPECT_EQ(a.rank(), b.rank());
    EXPECT_EQ(a.input.block, b.input.block);
    EXPECT_TRUE(a.act == b.act) << named.name;
  }
  EXPECT_TRUE(same_matrix(*model.layers[0].wo.branch_b, *expected.layers[0].wo.branch_b));
  EXPECT_FALSE(model.layers[0].attn_skip.has_value());
  EXPECT_TRUE(same_matrix(model.layers[0].ffn_skip->a, expected.layers[0].ffn_skip->a));
  EXPECT_TRUE(same_matrix(model.layers[0].ffn_skip->b, expected.layers[0].ffn_skip->b));
  EXPECT_EQ(transform_bytes(model.residual_basis), 64u);
  EXPECT_EQ(skip_bytes(model.layers[0]), 2u * 3 * 64 + 64 * 3 + 2 * 64);
}

TEST_F(TqFile, TensorsAreAlignedForVectorLoads) {
  const Model model = load_tq_file(path);
  for (const NamedLinear& named : kLayerLinears) {
    const Matrix& m = (model.layers[0].*named.member).weight;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(m.data) % 64, 0u);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(m.scales) % 64, 0u);
  }
}

TEST_F(TqFile, SameModelSameBytes) {
  test_model.write(dir / "again.tq");
  EXPECT_EQ(read_bytes(path), read_bytes(dir / "again.tq"));
}

TEST_F(TqFile, VerifyAndLoadFindEveryFlippedByte) {
  const std::string original = read_bytes(path);
  EXPECT_EQ(failure(path, true), "");
  std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
  const auto put = [&](size_t i, char byte) {
    file.seekp(static_cast<std::streamoff>(i)).put(byte).flush();
  };
  for (size_t i = 0; i < original.size(); ++i) {
    put(i, static_cast<char>(original[i] ^ (1 << (i % 8))));
    ASSERT_NE(failure(path, true), "") << "byte " << i;
    ASSERT_NE(failure(path), "") << "byte " << i;
    put(i, original[i]);
  }
}

TEST_F(TqFile, EveryTruncationIsRefusedAtLoad) {
  const std::string original = read_bytes(path);
  for (size_t size = 0; size < original.size(); size += size < 4096 ? 13 : 509) {
    write_bytes(dir / "short.tq", original.substr(0, size));
    ASSERT_NE(failure(dir / "short.tq"), "") << size;
  }
  write_bytes(dir / "long.tq", original + "x");
  EXPECT_NE(failure(dir / "long.tq").find("incomplete copy?"), std::string::npos);
}

TEST_F(TqFile, NewerVersionsSayWhichTqReads) {
  std::string bytes = read_bytes(path);
  bytes[8] = 9;
  write_bytes(path, bytes);
  EXPECT_NE(failure(path).find("format version 9, this tq reads versions 1 to 5"),
            std::string::npos);
}

// Rows of a rotation in the planes (0, 1), (2, 3), ...
std::vector<float> plane_rotations(int64_t n) {
  std::vector<float> m(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; i += 2) {
    m[static_cast<size_t>(i * n + i)] = m[static_cast<size_t>((i + 1) * n + i + 1)] = 0.6f;
    m[static_cast<size_t>(i * n + i + 1)] = 0.8f;
    m[static_cast<size_t>((i + 1) * n + i)] = -0.8f;
  }
  return m;
}
Transform dense_basis(const std::vector<float>& m) {
  Transform basis;
  basis.kind = Transform::Kind::kDense;
  basis.size = 64;
  basis.matrix.rows = basis.matrix.cols = 64;
  basis.matrix.data = reinterpret_cast<const std::byte*>(m.data());
  return basis;
}

TEST_F(TqFile, KvBitsTravelAndAreSixteenWhenAbsent) {
  EXPECT_EQ(load_tq_file(path).kv_bits, 16);
  const std::string plain = read_bytes(path);
  for (int bits : {4, 8, 16}) {
    write_bytes(path, plain);
    edit_header(path, R"("linears":)",
                R"("kv":{"bits":)" + std::to_string(bits) + R"(},"linears":)");
    EXPECT_EQ(load_tq_file(path).kv_bits, bits);
  }
  for (const char* kv : {R"({"bits":32})", R"({"bits":5})", R"({"bits":0})", R"({"bits":"8"})",
                         "{}", "8", R"({"bits":8,"group":32})"}) {
    write_bytes(path, plain);
    edit_header(path, R"("linears":)", R"("kv":)" + std::string(kv) + R"(,"linears":)");
    EXPECT_NE(failure(path), "") << kv;
  }
}

TEST_F(TqFile, DenseResidualBasisTravels) {
  const std::vector<float> m = plane_rotations(64);
  test_model.model.residual_basis = dense_basis(m);
  test_model.write(path);
  EXPECT_EQ(failure(path, true), "");
  EXPECT_EQ(transform_bytes(load_tq_file(path).residual_basis), 64u * 64 * 4);
  const Model model = load_tq_file(path);
  EXPECT_EQ(model.residual_basis.kind, Transform::Kind::kDense);
  EXPECT_EQ(model.residual_basis.size, 64);
  EXPECT_TRUE(same_matrix(model.residual_basis.matrix, test_model.model.residual_basis.matrix));
  const std::string good = read_bytes(path);
  const auto refused = [&](const std::string& from, const std::string& to) {
    write_bytes(path, good);
    edit_header(path, from, to);
    return failure(path);
  };
  EXPECT_NE(refused(R"("size":64)", R"("size":32)").find("size"), std::string::npos);
  EXPECT_NE(refused(R"("size":64)", R"("size":64,"block":64)").find("unknown field"),
            std::string::npos);
  EXPECT_NE(refused(R"("storage":"F32")", R"("storage":"BF16")").find("BF16"), std::string::npos);
  EXPECT_NE(refused(R"("kind":"hadamard","size":96,"block":96,"signs":false)", R"("kind":"dense")")
                .find("only the residual basis may be dense"),
            std::string::npos);
}

TEST_F(TqFile, ABasisThatIsNotOrthogonalIsRefused) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> good = plane_rotations(64);
  const auto outcome = [&](size_t index, float value) {
    std::vector<float> m = good;
    m[index] = value;
    test_model.model.residual_basis = dense_basis(m);
    test_model.write(path);
    return failure(path);
  };
  EXPECT_EQ(outcome(0, 0.6f), "");
  EXPECT_EQ(outcome(0, 0.6001f), "");
  for (float value : {0.0f, 0.7f, 6.0f, nan, INFINITY}) {
    EXPECT_NE(outcome(0, value).find("not orthogonal"), std::string::npos) << value;
  }
}

TEST(Orthogonality, IsMeasuredInUnitsOfTheRoundingOfTheStorage) {
  // A dense rotation in f64 rounded to each storage: below 2 u + u^2, and not zero.
  constexpr int64_t n = 64;
  const std::vector<double> m = random_orthogonal(n, 3);
  const struct {
    Storage storage;
    double u;
  } cases[] = {{Storage::kF32, 0x1p-24}, {Storage::kF16, 0x1p-11}, {Storage::kBF16, 0x1p-8}};
  for (const auto& c : cases) {
    std::vector<std::byte> data(n * n * (c.storage == Storage::kF32 ? 4 : 2));
    for (size_t i = 0; i < m.size(); ++i) {
      const float value = static_cast<float>(m[i]);
      const uint16_t half = c.storage == Storage::kF16 ? f32_to_f16(value) : f32_to_bf16(value);
      if (c.storage == Storage::kF32) {
        std::memcpy(data.data() + 4 * i, &value, 4);
      } else {
        std::memcpy(data.data() + 2 * i, &half, 2);
      }
    }
    const Matrix matrix = {c.storage, n, n, 0, data.data(), nullptr};
    EXPECT_LE(orthogonality_error(matrix), 2 * c.u + c.u * c.u);
    EXPECT_GE(orthogonality_error(matrix), 0.1 * c.u);
  }
}

TEST_F(TqFile, VersionOneIsStillRead) {
  // As the tq before version 2 wrote it: the same file without the fields that came later.
  test_model.model.layers[0].ffn_skip.reset();
  test_model.write(path);
  edit_header(path, R"(,"full_range":true)", "");
  edit_header(path, R"("bits":3)", R"("bits":4)");
  edit_header(path, R"("tq_format":2)", R"("tq_format":1)");
  set_version(path, 1);
  EXPECT_EQ(failure(path, true), "");
  EXPECT_TRUE(load_tq_file(path).layers[0].w_gate.act ==
              (ActQuant{4, 32, 1.0f, ActCodes::kSymmetric}));
  set_version(path, 0);
  EXPECT_NE(failure(path).find("format version 0"), std::string::npos);
}

TEST_F(TqFile, AsymmetricCodesMakeAVersionThreeFileAndNothingElseDoes) {
  EXPECT_EQ(read_bytes(path)[8], 2);
  test_model.model.layers[0].w_gate.act.codes = ActCodes::kAsymmetric;
  test_model.write(path);
  EXPECT_EQ(read_bytes(path)[8], 3);
  EXPECT_EQ(failure(path, true), "");
  EXPECT_TRUE(load_tq_file(path).layers[0].w_gate.act ==
              (ActQuant{3, 32, 1.0f, ActCodes::kAsymmetric}));
}

TEST_F(TqFile, TwoLevelScalesMakeAVersionFourFile) {
  test_model.model.layers[0].w_gate.act.two_level = true;
  test_model.write(path);
  EXPECT_EQ(read_bytes(path)[8], 4);
  EXPECT_EQ(failure(path, true), "");
  EXPECT_TRUE(load_tq_file(path).layers[0].w_gate.act ==
              (ActQuant{3, 32, 1.0f, ActCodes::kAll, true}));
}

TEST_F(TqFile, ExponentsTravelAndMakeAVersionFiveFile) {
  std::vector<int8_t> exponents(96);
  for (size_t i = 0; i < exponents.size(); ++i) exponents[i] = static_cast<int8_t>(i % 2 ? -20 : 7);
  test_model.model.layers[0].w_up.exponents = exponents.data();
  test_model.write(path);
  EXPECT_EQ(read_bytes(path)[8], 5);
  const Model model = load_tq_file(path);
  ASSERT_NE(model.layers[0].w_up.exponents, nullptr);
  EXPECT_TRUE(std::equal(exponents.begin(), exponents.end(), model.layers[0].w_up.exponents));
  EXPECT_EQ(model.layers[0].w_gate.exponents, nullptr);
  EXPECT_EQ(model.layers[0].w_up.n_bytes(), model.layers[0].w_up.weight.n_bytes() + 96);

  exponents[5] = -127;  // its power of two is not a normal number
  test_model.write(path);
  EXPECT_NE(failure(path).find("layers.0.w_up.exponents: element 5 is -127"), std::string::npos);
  test_model.model.layers[0].w_up.exponents = nullptr;
  exponents[5] = 0;
  exponents.resize(8);
  test_model.model.lm_head.exponents = exponents.data();
  test_model.write(path);
  EXPECT_NE(failure(path).find("exponents are for the linears of layers"), std::string::npos);
}

TEST_F(TqFile, GroupsOfInputsAreMultiplesOf32OrWholeRows) {
  Layer& layer = test_model.model.layers[0];
  for (int64_t group : {96, 64}) {  // w_down reads 96 columns
    layer.w_down.act.group = group;
    test_model.write(path);
    EXPECT_EQ(read_bytes(path)[8], group == 64 ? 2 : 3);
    EXPECT_EQ(failure(path, true), "");
    EXPECT_EQ(load_tq_file(path).layers[0].w_down.act.group, group);
  }
  for (int64_t group : {48, 100, 160, 192}) {
    layer.w_down.act.group = group;
    test_model.write(path);
    EXPECT_NE(failure(path).find("group " + std::to_string(group)), std::string::npos);
  }
}

TEST_F(TqFile, DamagedTensorIsNamed) {
  std::string bytes = read_bytes(path);
  const Model model = load_tq_file(path);
  const size_t offset =
      bytes.find(std::string(reinterpret_cast<const char*>(model.layers[0].w_up.weight.data), 64));
  bytes[offset + 5] ^= 1;
  write_bytes(path, bytes);
  EXPECT_NE(failure(path).find("layers.0.w_up"), std::string::npos);
  EXPECT_NE(failure(path, true).find("layers.0.w_up"), std::string::npos);
  load_tq_file(path, Verify::kTexts);  // who runs nothing, or counts milliseconds
}

TEST_F(TqFile, TextsAreCheckedByEveryLoad) {
  std::string bytes = read_bytes(path);
  bytes[bytes.find("\"rms_norm_eps\"") + 3] ^= 1;
  write_bytes(path, bytes);
  EXPECT_NE(failure(path).find("text.config"), std::string::npos);
  try {
    load_tq_file(path, Verify::kTexts);
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("text.config"), std::string::npos) << error.what();
  }
}

// A header whose checksums are right but whose content lies must still be refused, by name.
struct Lie {
  const char* from;
  const char* to;
  const char* message;
};
class TqHeaderLie : public ::testing::TestWithParam<Lie> {};
TEST_P(TqHeaderLie, IsRefused) {
  TempDir dir;
  TestModel().write(dir / "m.tq");
  edit_header(dir / "m.tq", GetParam().from, GetParam().to);
  EXPECT_NE(failure(dir / "m.tq").find(GetParam().message), std::string::npos)
      << failure(dir / "m.tq");
}
INSTANTIATE_TEST_SUITE_P(
    All, TqHeaderLie,
    ::testing::Values(
        Lie{R"("group":64)", R"("group":0)", "group size 0"},
        Lie{R"("group":64)", R"("group":48)", "group size 48"},
        Lie{R"("group":64)", R"("group":32)", "scales"},
        Lie{R"("storage":"Q4")", R"("storage":"Q3")", "unknown storage Q3"},
        Lie{R"("storage":"Q4")", R"("storage":"Q8")", "expected Q8"},
        Lie{R"("rows":32)", R"("rows":33)", "the config asks for"},
        Lie{R"("bits":4)", R"("bits":5)", "activations of 5 bits"},
        Lie{R"("bits":3)", R"("bits":2)", "bits"},
        Lie{R"("full_range":true)", R"("full_range":1)", "full_range"},
        Lie{R"("full_range":true)", R"("full_range":true,"asymmetric":true)", "contradict"},
        Lie{R"("bits":4,)", R"("asymmetric":true,"bits":8,)", "8 bits"},
        Lie{R"("full_range":true)", R"("two_level":true,"asymmetric":true)", "two-level"},
        Lie{R"("bits":3,)", R"("two_level":true,"bits":8,)", "one group a token"},
        Lie{R"("clip":)", R"("clap":)", "unknown field"},
        Lie{R"("block":96)", R"("block":7)", "Hadamard block 7"},
        Lie{R"("kind":"hadamard")", R"("kind":"magic")", "unknown transform magic"},
        Lie{R"("branch_b":)", R"("branch_c":)", "unknown field"},
        Lie{R"("linears":)", R"("future":1,"linears":)", "unknown field"},
        Lie{R"("linears":{)", R"("linears":{"layers.7.wq":{},)", "unknown field"},
        Lie{R"("linears":{)", R"("linears":{"nothing":{},)", "unknown field"},
        Lie{R"("name":"final_norm")", R"("future":1,"name":"final_norm")", "unknown field"},
        Lie{R"("layers.0.ffn_skip":)", R"("layers.1.ffn_skip":)", "unknown field"},
        Lie{R"("skips":{)", R"("skips":[],"skipped":{)", "unknown field"},
        Lie{R"("rows":3,"cols":64)", R"("rows":65,"cols":64)", "rows"},
        Lie{R"("rows":3,"cols":64)", R"("rows":2,"cols":64)", "layers.0.ffn_skip"},
        Lie{R"("rows":3,"cols":64)", R"("rows":0,"cols":64)", "rows"},
        Lie{R"("offset":64)", R"("offset":9223372036854775807)", "do not follow"},
        Lie{R"("offset":64)", R"("offset":-64)", "offset"},
        Lie{R"("shape":[8,64])", R"("shape":[8,4294967296])", "do not fit its shape"},
        Lie{R"("shape":[8,64])", R"("shape":[4294967296,4294967296,4294967296])", "overflows"},
        Lie{R"("name":"final_norm")", R"("name":"tok_embed")", "appears twice"},
        Lie{R"("name":"final_norm")", R"("name":"final_nomr")", "final_norm is missing"},
        Lie{R"("tensor":"tok_embed")", R"("tensor":"final_norm")", "expected BF16"}));

TEST_F(TqFile, UnfinishedWriteLeavesNothingBehind) {
  {
    TqWriter writer(dir / "half.tq");
    writer.add_f32("final_norm", test_model.model.final_norm);
  }
  size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(dir.path())) {
    files += entry.is_regular_file();
  }
  EXPECT_EQ(files, 1u);  // model.tq
}

TEST_F(TqFile, OldFileSurvivesAFailedRewrite) {
  const std::string before = read_bytes(path);
  {
    TqWriter writer(path);
    writer.add_f32("final_norm", test_model.model.final_norm);
  }
  EXPECT_EQ(read_bytes(path), before);
}

TEST(TqWriter, MissingFolderIsAnIoError) {
  try {
    TqWriter writer("/nonexistent-folder/x.tq");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kIo);
    EXPECT_NE(std::string(error.what()).find("No such file"), std::string::npos);
  }
}

}  // namespace
}  // namespace tq
