// test_reference_models - whole models against answers that other programs computed.
//
// Random tiny models against Hugging Face transformers (float32), stories260k against a float64
// reference; with TQ_SHARED_DATA and TQ_SMOLLM2 set (docs/contributing.md) also babyllama-tok105
// and SmolLM2-135M-Instruct. No quantization here. Read next: tools/make_model_fixtures.py.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "cpu/cpu_backend.h"
#include "model/forward.h"
#include "model/json.h"
#include "model/weights.h"
#include "tokenizer/tokenizer.h"

namespace tq {
namespace {

// Largest error of a logit, in units of the logits' standard deviation. Where it comes from: a dot
// product of n <= 1536 terms in f32 is off by about sqrt(n) 2^-24 = 2.4e-6 of its size; 30 layers
// with four such products in a row add up as sqrt(120), to 3e-5. The mistakes that the generator of
// the random models tries out (wrong theta, forgotten scaling or gain) move logits by 2e-2 or more.
constexpr double kMaxError = 1e-4;

const std::string kFixtures = TQ_FIXTURES;

/// A model folder, ready to run on the CPU.
struct Runner {
  explicit Runner(const std::string& folder)
      : model(load_model(folder)), backend(2), prepared(model, backend) {}

  Session session(int64_t ctx, int64_t chunk = 512, int kv_bits = 32) const {
    SessionOptions options;
    options.ctx = ctx;
    options.kv_bits = kv_bits;
    options.chunk = chunk;
    return Session(prepared, options);
  }

  Model model;
  CpuBackend backend;
  PreparedModel prepared;
};

std::vector<float> copy(std::span<const float> values) {
  return {values.begin(), values.end()};
}

std::vector<float> feed_one(Session& session, int32_t token) {
  return copy(session.feed(std::span(&token, 1)));
}

int32_t best_token(std::span<const float> logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

double standard_deviation(const std::vector<double>& values) {
  const double n = static_cast<double>(values.size());
  const double mean = std::accumulate(values.begin(), values.end(), 0.0) / n;
  double sum = 0;
  for (double value : values) sum += (value - mean) * (value - mean);
  return std::sqrt(sum / n);
}

double max_error(std::span<const float> got, const std::vector<double>& expected) {
  EXPECT_EQ(got.size(), expected.size());
  double worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::fabs(got[i] - expected[i]);
    if (!(error <= worst)) worst = error;  // a NaN must not pass
  }
  return worst;
}

Json read_json(const std::string& path) {
  return parse_json(read_text_file(path, 100 << 20), path);
}

std::string folder_from_environment(const char* variable) {
  const char* folder = std::getenv(variable);
  return folder ? folder : "";
}

// --- random models
// --------------------------------------------------------------------------------

class RandomModel : public testing::TestWithParam<const char*> {
 protected:
  std::string folder() const { return kFixtures + "/random-models/" + GetParam(); }
  std::vector<int32_t> first_ids(size_t count) const {
    auto ids = read_json(folder() + "/expected.json")["ids"].get<std::vector<int32_t>>();
    ids.resize(std::min(ids.size(), count));
    return ids;
  }
};

TEST_P(RandomModel, LogitsAreThoseOfTransformers) {
  const Json expected = read_json(folder() + "/expected.json");
  const auto ids = expected["ids"].get<std::vector<int32_t>>();
  const auto rows = expected["rows"].get<std::vector<int64_t>>();
  const auto logits = expected["logits"].get<std::vector<std::vector<double>>>();
  const double std = expected["logits_std"].get<double>();
  const Runner runner(folder());
  Session session = runner.session(static_cast<int64_t>(ids.size()));

  size_t next = 0;  // rows are in ascending order
  session.feed_all(ids, [&](int64_t first, int64_t n_rows, std::span<const float> block) {
    const int64_t vocab = runner.model.config.vocab_size;
    for (; next < rows.size() && rows[next] < first + n_rows; ++next) {
      const auto row = block.subspan(static_cast<size_t>((rows[next] - first) * vocab),
                                     static_cast<size_t>(vocab));
      EXPECT_LE(max_error(row, logits[next]), kMaxError * std) << "position " << rows[next];
    }
  });
  EXPECT_EQ(next, rows.size());
}

TEST_P(RandomModel, ChunkedPrefillEqualsTokenByTokenExactly) {
  const Runner runner(folder());
  const std::vector<int32_t> ids = first_ids(40);
  for (int kv_bits : {32, 4}) {
    Session one_by_one = runner.session(64, 512, kv_bits);
    std::vector<float> expected;
    for (int32_t id : ids) expected = feed_one(one_by_one, id);
    for (int64_t chunk : {1, 3, 8, 39, 40, 64}) {
      Session session = runner.session(64, chunk, kv_bits);
      EXPECT_EQ(copy(session.feed(ids)), expected) << "chunk " << chunk;
    }
  }
}

TEST_P(RandomModel, TruncatedTimelineContinuesAsIfTheRestWasNeverFed) {
  const Runner runner(folder());
  const std::vector<int32_t> ids = first_ids(40);
  for (int kv_bits : {32, 8, 4}) {
    Session fresh = runner.session(64, 512, kv_bits);
    const std::vector<float> expected = copy(fresh.feed(ids));

    Session session = runner.session(64, 512, kv_bits);
    session.feed(std::span(ids).first(30));
    session.feed(std::vector<int32_t>(10, 5));
    session.truncate(30);
    EXPECT_EQ(copy(session.feed(std::span(ids).subspan(30))), expected);
  }
}

TEST_P(RandomModel, CodedCachesComeCloserWithEveryBit) {
  // A head of Gaussian coordinates spans some 5 of their standard deviations, so in 8 bits a value
  // is off by 5 / 255 / sqrt(12) = 0.6 % of one, at random, and so are scores and outputs; three
  // layers and the largest of some hundred logits make that about 4 % of the logits' standard
  // deviation. A rotation of q alone would move them by more than one. With 4 bits errors are 17
  // times as large, on average.
  const Runner runner(folder());
  const std::vector<int32_t> ids = first_ids(40);
  const auto logits = [&](int kv_bits) {
    Session session = runner.session(64, 512, kv_bits);
    return copy(session.feed(ids));
  };
  const std::vector<float> exact = logits(32);
  const std::vector<double> expected(exact.begin(), exact.end());
  const double std = standard_deviation(expected);
  const double error8 = max_error(logits(8), expected), error4 = max_error(logits(4), expected);
  EXPECT_GT(error8, 0);
  EXPECT_LT(error8, 0.1 * std);
  EXPECT_LT(4 * error8, error4);
}

INSTANTIATE_TEST_SUITE_P(Fixtures, RandomModel,
                         testing::Values("llama-gqa-f32", "llama-tied-bf16-sharded",
                                         "llama3-rope-f16", "qwen3-tied-bf16", "qwen3-yarn-f32"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

// --- trained models
// -------------------------------------------------------------------------------

/// Feeds the prompt's ids and then, greedily, what the model says; expects the reference's ids.
void expect_greedy(Session& session, std::vector<float> logits,
                   const std::vector<int32_t>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const int32_t token = best_token(logits);
    ASSERT_EQ(token, expected[i]) << "greedy token " << i;
    if (i + 1 < expected.size()) logits = feed_one(session, token);
  }
}

/// Cases of a golden.json with all logits after the prompt (stories260k, babyllama-tok105).
void expect_float64_reference(const std::string& folder, const std::string& golden_path) {
  const Json golden = read_json(golden_path);
  const Runner runner(folder);
  const Tokenizer tokenizer = Tokenizer::from_json(runner.model.texts.tokenizer, folder);
  for (const Json& item : golden["cases"]) {
    SCOPED_TRACE(item["prompt"].get<std::string>());
    const auto ids = item["prompt_ids"].get<std::vector<int32_t>>();
    const auto greedy = item["greedy_ids"].get<std::vector<int32_t>>();
    const auto expected = item["logits_after_prompt"].get<std::vector<double>>();
    EXPECT_EQ(tokenizer.encode(item["prompt"].get<std::string>(), true, true), ids);

    Session session = runner.session(static_cast<int64_t>(ids.size() + greedy.size()));
    const std::vector<float> logits = copy(session.feed(ids));
    EXPECT_LE(max_error(logits, expected), kMaxError * standard_deviation(expected));
    expect_greedy(session, logits, greedy);

    std::vector<int32_t> all = ids;
    all.insert(all.end(), greedy.begin(), greedy.end());
    EXPECT_EQ(tokenizer.decode(all, true), item["text"].get<std::string>());
  }
}

TEST(Stories260k, LogitsGreedyTokensAndTextAreThoseOfTheFloat64Reference) {
  const std::string folder = kFixtures + "/stories260k";
  expect_float64_reference(folder, folder + "/golden.json");
}

TEST(Babyllama, LogitsGreedyTokensAndTextAreThoseOfTheFloat64Reference) {
  const std::string folder = folder_from_environment("TQ_SHARED_DATA") + "/babyllama-tok105";
  if (!std::filesystem::exists(folder)) GTEST_SKIP() << "needs TQ_SHARED_DATA";
  expect_float64_reference(folder, kFixtures + "/babyllama-tok105/golden.json");
}

/// Mean negative log-likelihood, nats, of ids[1..] given what stands before each.
double mean_nll(const Runner& runner, const std::vector<int32_t>& ids) {
  Session session = runner.session(static_cast<int64_t>(ids.size()));
  const size_t vocab = static_cast<size_t>(runner.model.config.vocab_size);
  double sum = 0;
  session.feed_all(ids, [&](int64_t first, int64_t n_rows, std::span<const float> block) {
    for (int64_t row = 0; row < n_rows; ++row) {
      const size_t target = static_cast<size_t>(first + row) + 1;
      if (target == ids.size()) return;
      const auto logits = block.subspan(static_cast<size_t>(row) * vocab, vocab);
      const double top = *std::max_element(logits.begin(), logits.end());
      double total = 0;
      for (float logit : logits) total += std::exp(logit - top);
      sum += std::log(total) + top - logits[static_cast<size_t>(ids[target])];
    }
  });
  return sum / static_cast<double>(ids.size() - 1);
}

/// WikiText-2 test as papers evaluate it: rows joined by two newlines. In the file an empty row is
/// a line with one space.
std::string wikitext2_test(const std::string& path) {
  const std::string file = read_text_file(path, 10 << 20);
  std::string text;
  for (size_t at = 0; at < file.size();) {
    const size_t end = std::min(file.find('\n', at), file.size() - 1) + 1;
    if (at > 0) text += "\n\n";
    if (file.compare(at, end - at, " \n") != 0) text.append(file, at, end - at);
    at = end;
  }
  return text;
}

/// Cases of a golden.json made with transformers on a model too large for the repository.
void expect_transformers_reference(const std::string& folder, const std::string& golden_path,
                                   const std::string& wikitext_path) {
  const Json golden = read_json(golden_path);
  const Runner runner(folder);
  const Tokenizer tokenizer = Tokenizer::from_json(runner.model.texts.tokenizer, folder);
  for (const Json& item : golden["prompts"]) {
    SCOPED_TRACE(item["text"].get<std::string>());
    const auto ids = item["ids"].get<std::vector<int32_t>>();
    const auto greedy = item["greedy_ids"].get<std::vector<int32_t>>();
    EXPECT_EQ(tokenizer.encode(item["text"].get<std::string>(), false, true), ids);

    Session session = runner.session(static_cast<int64_t>(ids.size() + greedy.size()));
    const std::vector<float> logits = copy(session.feed(ids));
    const double std = item["last_logits_std"].get<double>();
    for (const Json& top : item["last_logits_top5"]) {
      EXPECT_NEAR(logits[top[0].get<size_t>()], top[1].get<double>(), kMaxError * std);
    }
    expect_greedy(session, logits, greedy);
    EXPECT_EQ(tokenizer.decode(greedy, false), item["greedy_text"].get<std::string>());
  }

  const Json& wikitext = golden["wikitext2_test"];
  std::vector<int32_t> ids = tokenizer.encode(wikitext2_test(wikitext_path), false, false);
  if (wikitext.contains("tokens")) {
    EXPECT_EQ(static_cast<int64_t>(ids.size()), wikitext["tokens"].get<int64_t>());
  }
  ids.resize(wikitext["window"].get<size_t>());
  EXPECT_NEAR(mean_nll(runner, ids), wikitext["window_nll"][0].get<double>(), kMaxError);
}

TEST(SmolLM2, LogitsGreedyTextAndPerplexityAreThoseOfTransformers) {
  const std::string folder = folder_from_environment("TQ_SMOLLM2");
  const std::string data = folder_from_environment("TQ_SHARED_DATA");
  if (folder.empty() || data.empty()) GTEST_SKIP() << "needs TQ_SMOLLM2 and TQ_SHARED_DATA";
  expect_transformers_reference(folder, data + "/smollm2/golden.json",
                                data + "/wikitext-2/wiki.test.raw");
}

TEST(Qwen3Smol, LogitsGreedyTextAndPerplexityAreThoseOfTransformers) {
  const std::string folder = folder_from_environment("TQ_QWEN3_SMOL");
  const std::string data = folder_from_environment("TQ_SHARED_DATA");
  if (folder.empty() || data.empty()) GTEST_SKIP() << "needs TQ_QWEN3_SMOL and TQ_SHARED_DATA";
  expect_transformers_reference(folder, data + "/qwen3-smol-delta/golden.json",
                                data + "/wikitext-2/wiki.test.raw");
}

}  // namespace
}  // namespace tq
