// A number that is not finite is never ranked, averaged, sampled or written: every command ends
// with one line that names the layer, and exit 3.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/cpu_backend.h"
#include "model/forward.h"
#include "tests/cli.h"
#include "tests/expect_error.h"
#include "tests/tiny_model.h"

namespace tq {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

// values(i) of TinyModel, untied: embedding, head, then the seven linears of each layer.
size_t linear_of(int64_t layer, size_t linear) {
  return 2 + 7 * static_cast<size_t>(layer) + linear;
}

class NotFinite : public testing::Test {
 protected:
  static SessionOptions options(int64_t ctx) {
    SessionOptions options;
    options.ctx = ctx;
    options.kv_bits = 32;
    options.chunk = 4;
    return options;
  }
  // Runs 10 tokens in chunks of 4 in each of the three ways; all must name `place`.
  static void expect_refused(const Model& model, const std::string& place,
                             LayerResidence residence = LayerResidence::kAll) {
    CpuBackend backend(2);
    const PreparedModel prepared(model, backend, residence);
    const std::vector<int32_t> ids = random_ids(10, 96, 5);
    const auto refused = [&](const std::function<void(Session&)>& run) {
      Session session(prepared, options(16));
      expect_error(ErrorKind::kBadData, {"not finite", "behind " + place}, [&] { run(session); });
    };
    refused([&](Session& session) { session.feed(ids); });
    refused([&](Session& session) { session.feed_top(ids, 1); });
    refused([&](Session& session) { session.feed_top(ids, 0); });
    refused([&](Session& session) {
      session.feed_all(ids, [](int64_t, int64_t, std::span<const float>) {});
    });
  }
};

TEST_F(NotFinite, TheFirstLayerIsNamedWhateverIsWrongInIt) {
  for (float broken : {kNan, kInf, -kInf}) {
    for (size_t linear = 0; linear < 7; ++linear) {
      TinyModel tiny(false);
      tiny.values(linear_of(1, linear))[40] = broken;
      expect_refused(tiny.model(), "layer 1");
    }
  }
}

TEST_F(NotFinite, LayersThatAreMadeOneAtATimeAreNamedToo) {
  TinyModel tiny(false);
  tiny.values(linear_of(2, 6))[0] = kNan;
  expect_refused(tiny.model(), "layer 2", LayerResidence::kOneAtATime);
}

TEST_F(NotFinite, EmbeddingAndHeadAreNamed) {
  TinyModel embedding(false);
  for (float& value : embedding.values(0)) value = kNan;
  expect_refused(embedding.model(), "the embedding");
  TinyModel head(false);
  for (size_t i = 0; i < 128; ++i) head.values(1)[i] = -kInf;  // a logit of -inf or inf
  expect_refused(head.model(), "the head");
}

// Only the second chunk of a later call meets the broken number: what ran before counts.
TEST_F(NotFinite, ATokenMetLaterIsEnough) {
  TinyModel tiny(false);
  for (int64_t i = 0; i < 128; ++i) tiny.values(0)[static_cast<size_t>(77 * 128 + i)] = kInf;
  CpuBackend backend(1);
  const PreparedModel prepared(tiny.model(), backend);
  Session session(prepared, options(32));
  const std::vector<int32_t> good = {1, 2, 3, 4, 5, 6}, bad = {7, 8, 9, 10, 77, 11};
  EXPECT_NO_THROW(session.feed(good));
  expect_error(ErrorKind::kBadData, {"behind the embedding"}, [&] { session.feed(bad); });
}

// Rows that pad the vocabulary may hold anything.
TEST_F(NotFinite, PaddingRowsOfTheHeadDoNotCount) {
  TinyModel tiny(false);
  for (size_t i = 0; i < 128; ++i) tiny.values(1)[95 * 128 + i] = kNan;
  CpuBackend backend(1);
  const PreparedModel prepared(tiny.model(), backend);
  SessionOptions valid = options(16);
  valid.valid_vocab = 95;
  Session session(prepared, valid);
  const std::span<const float> logits = session.feed(random_ids(5, 95, 1));
  EXPECT_TRUE(std::isfinite(logits[94]));
  EXPECT_EQ(logits[95], -kInf);
}

TEST_F(NotFinite, OneLayerAtATimeGivesTheSameLogits) {
  const TinyModel tiny(false);
  CpuBackend backend(2);
  const std::vector<int32_t> ids = random_ids(10, 96, 5);
  std::vector<float> logits[2];
  for (LayerResidence residence : {LayerResidence::kAll, LayerResidence::kOneAtATime}) {
    const PreparedModel prepared(tiny.model(), backend, residence);
    Session session(prepared, options(16));
    const std::span<const float> row = session.feed(ids);
    logits[residence == LayerResidence::kAll].assign(row.begin(), row.end());
  }
  EXPECT_EQ(logits[0], logits[1]);
}

// A folder whose second layer holds a NaN, and the texts that the commands read.
class NotFiniteCli : public testing::Test {
 protected:
  NotFiniteCli() : model_(copy_model(dir_)) {
    Safetensors weights = Safetensors::read(model_ + "/model.safetensors");
    set_f32(weights, "model.layers.1.mlp.up_proj.weight", 50, kNan);
    weights.write(model_ + "/model.safetensors");
    std::string text;
    for (int i = 0; i < 40; ++i) text += "Once upon a time there was a little dog. ";
    write_bytes(dir_ / "text.txt", text);
    std::string task;
    for (int i = 0; i < 4; ++i) {
      task += R"({"query": "Who barks?", "choices": ["the dog", "the cat"], "gold": 0})"
              "\n";
    }
    write_bytes(dir_ / "task.jsonl", task);
  }
  void expect_refused(const Args& args) {
    const CliResult result = run_tq(dir_, args);
    EXPECT_EQ(result.exit_code, 3) << args[0] << ": " << result.out << result.err;
    EXPECT_EQ(result.out, "");
    EXPECT_TRUE(result.err.starts_with("tq: error: the model's numbers are not finite"))
        << result.err;
    EXPECT_NE(result.err.find("layer 1 (of 0..4)"), std::string::npos) << result.err;
    EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
  }
  TempDir dir_;
  std::string model_;
};

TEST_F(NotFiniteCli, NoCommandMakesAResultOfIt) {
  expect_refused({"run", model_, "Once upon", "-n", "3", "-q"});
  expect_refused({"run", model_, "Once upon", "-n", "3", "-q", "--temp", "1", "--json"});
  expect_refused({"eval", model_, "--text", dir_ / "text.txt", "--ctx", "32", "-q"});
  expect_refused({"eval", model_, "--text", dir_ / "text.txt", "--ctx", "32", "-q", "--json"});
  expect_refused({"eval", std::string(TQ_FIXTURES) + "/stories260k", "--kl", model_, "--text",
                  dir_ / "text.txt", "--ctx", "32", "-q"});
  expect_refused({"eval", model_, "--task", dir_ / "task.jsonl", "-q"});
  expect_refused(logits_of(dir_, model_));
  EXPECT_FALSE(std::filesystem::exists(dir_ / "out.npy"));
}

// All weights are finite, and the product of two of them is not.
TEST_F(NotFiniteCli, AFinishedFileThatDoesNotRunDoesNotAppear) {
  const std::string model = copy_model(dir_, "loud");
  Safetensors weights = Safetensors::read(model + "/model.safetensors");
  for (const char* name :
       {"model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.gate_proj.weight"}) {
    const Json& offsets = weights.header[name]["data_offsets"];
    const size_t count = (offsets[1].get<size_t>() - offsets[0].get<size_t>()) / 4;
    for (size_t i = 0; i < count; ++i) set_f32(weights, name, i, 1e30f);
  }
  weights.write(model + "/model.safetensors");
  const CliResult result =
      run_tq(dir_, {"quantize", model, "-o", dir_ / "m.tq", "--method", "none", "-q"});
  EXPECT_EQ(result.exit_code, 3) << result.err;
  EXPECT_NE(result.err.find("m.tq): NaN or infinity, first behind layer 2"), std::string::npos)
      << result.err;
  for (const auto& entry : std::filesystem::directory_iterator(dir_.path())) {
    EXPECT_FALSE(entry.path().filename().string().starts_with("m.tq")) << entry.path();
  }
}

// A stream so small that the norm's epsilon rules: keys and values are below what f16 holds.
TEST_F(NotFiniteCli, AFileWhoseKeysAndValuesVanishIn16BitsDoesNotAppear) {
  const std::string model = copy_model(dir_, "quiet");
  Safetensors weights = Safetensors::read(model + "/model.safetensors");
  const char* name = "model.embed_tokens.weight";
  const Json offsets = weights.header[name]["data_offsets"];
  for (size_t at = offsets[0]; at < offsets[1].get<size_t>(); at += 4) {
    float value = 0;
    std::memcpy(&value, weights.data.data() + at, 4);
    value = std::ldexp(value, -34);
    std::memcpy(weights.data.data() + at, &value, 4);
  }
  weights.write(model + "/model.safetensors");
  const CliResult result =
      run_tq(dir_, {"quantize", model, "-o", dir_ / "q.tq", "--method", "rtn", "-q"});
  EXPECT_EQ(result.exit_code, 3) << result.err;
  EXPECT_NE(result.err.find("KV cache cannot hold"), std::string::npos) << result.err;
  EXPECT_FALSE(std::filesystem::exists(dir_ / "q.tq"));
}

}  // namespace
}  // namespace tq
