// Models whose numbers leave the range of f16, though their function is an ordinary one: they
// quantize like the ordinary model, and layers that hardly matter do not stop the work.
#include <gtest/gtest.h>

#include <cmath>

#include "model/error.h"
#include "model/kv_range.h"
#include "model/tq_file.h"
#include "quant/magnitude.h"
#include "quant/pipeline.h"
#include "tests/logits.h"
#include "tests/temp_dir.h"
#include "tests/tiny_model.h"

namespace tq {
namespace {

constexpr size_t kTables = 2;  // matrices of an untied TinyModel before those of its layers

std::vector<float>& weights(TinyModel& tiny, size_t layer, LinearIndex linear) {
  return tiny.values(kTables + layer * kNLinears + static_cast<size_t>(linear));
}
void multiply(std::vector<float>& values, double factor) {
  for (float& value : values) value = static_cast<float>(double{value} * factor);
}
// The same function: values that are 2^exponent as large, and wo that undoes it.
void scale_values(TinyModel& tiny, int exponent) {
  multiply(weights(tiny, 0, kWv), std::ldexp(1.0, exponent));
  multiply(weights(tiny, 0, kWo), std::ldexp(1.0, -exponent));
}
// The same function: keys that are 2^exponent as large, and queries that undo it.
void scale_keys(TinyModel& tiny, int exponent) {
  multiply(weights(tiny, 1, kWk), std::ldexp(1.0, exponent));
  multiply(weights(tiny, 1, kWq), std::ldexp(1.0, -exponent));
}

std::vector<int32_t> some_ids() {
  return random_ids(70, 96, 8);
}

std::vector<float> logits_of(const Model& model, int kv_bits) {
  CpuBackend backend(2);
  const PreparedModel prepared(model, backend);
  SessionOptions options;
  options.ctx = 80;
  options.kv_bits = kv_bits;
  Session session(prepared, options);
  std::vector<float> logits;
  session.feed_all(some_ids(), [&](int64_t, int64_t, std::span<const float> rows) {
    logits.insert(logits.end(), rows.begin(), rows.end());
  });
  return logits;
}

struct Quantized {
  std::vector<float> logits;
  uint32_t version = 0;
  std::vector<std::string> notes;
  QuantizeResult result;
};

Quantized quantize(const Model& model, const QuantizeOptions& options) {
  TempDir folder;
  CpuBackend backend(2);
  const Calibration calibration = cut_samples(random_ids(200, 96, 4), 4, 48, 96, "test");
  Quantized made;
  QuantizeHooks hooks;
  hooks.note = [&](const std::string& note) { made.notes.push_back(note); };
  const std::string path = folder / "m.tq";
  made.result = quantize_model(model, options, &calibration, 1, backend, path, false, hooks);
  made.version = static_cast<uint8_t>(read_bytes(path)[8]);
  verify_tq_file(path);
  made.logits = logits_of(load_tq_file(path), 16);
  return made;
}

QuantizeOptions options_of(const std::string& method) {
  QuantizeOptions options = method_preset(method);
  options.threads = 2;
  options.rank = std::min<int64_t>(options.rank, 16);
  options.basis_rank = 8;
  if (options.steps > 0) options.steps = 3;
  if (options.refine_steps > 0) options.refine_steps = 2;
  return options;
}

std::vector<QuantizeOptions> all_methods() {
  std::vector<QuantizeOptions> all;
  for (const char* method :
       {"rtn", "gptq", "quarot", "svdquant", "spinquant", "respinquant", "twinquant"}) {
    all.push_back(options_of(method));
  }
  all.push_back(options_of("rtn"));
  all.back().two_level = true;
  all.push_back(options_of("rtn"));
  all.back().bits_w = 8;
  all.push_back(options_of("twinquant"));
  all.back().split = Split::kSvd;
  for (LearningLoss loss : {LearningLoss::kBlock, LearningLoss::kKl, LearningLoss::kCrossEntropy}) {
    all.push_back(options_of("spinquant"));
    all.back().loss = loss;
  }
  return all;
}

TEST(Magnitude, EveryMethodMakesTheSameLogitsOfAModelWhoseScalesLeaveF16) {
  const TinyModel ordinary(false, 3);
  TinyModel quiet(false, 3), loud(false, 3), extreme(false, 3);
  scale_values(quiet, -24);
  scale_values(loud, 24);
  scale_values(extreme, -80);  // squares leave f32 too
  for (const QuantizeOptions& options : all_methods()) {
    SCOPED_TRACE(testing::Message() << describe_options(options));
    const Quantized expected = quantize(ordinary.model(), options);
    EXPECT_LT(expected.version, 5u);
    for (const TinyModel* tiny : {&quiet, &loud, &extreme}) {
      const Quantized got = quantize(tiny->model(), options);
      EXPECT_EQ(got.version, 5u);
      // Powers of two change no rounding of f32 on the way to the same codes.
      EXPECT_LT(relative_error(got.logits, expected.logits), 1e-6);
    }
  }
}

TEST(Magnitude, AHeadMayBeAsQuietAsItLikes) {
  // Heads of 64 and groups of 64: the groups of wo that read a quiet head are loud.
  TinyModel ordinary(false, 3, Storage::kF32, TinyFamily::kLlama, 64);
  TinyModel quiet(false, 3, Storage::kF32, TinyFamily::kLlama, 64);
  const Config& c = quiet.model().config;
  const int64_t n_shared = c.n_heads / c.n_kv_heads;
  for (int64_t i = 0; i < c.head_dim * c.dim; ++i) {
    weights(quiet, 0, kWv)[static_cast<size_t>(i)] *= 0x1p-24f;
  }
  for (int64_t row = 0; row < c.dim; ++row) {
    for (int64_t col = 0; col < n_shared * c.head_dim; ++col) {
      weights(quiet, 0, kWo)[static_cast<size_t>(row * c.q_dim() + col)] *= 0x1p24f;
    }
  }
  const QuantizeOptions options = options_of("rtn");
  const std::vector<float> folder = logits_of(ordinary.model(), 32);
  ASSERT_LT(relative_error(logits_of(quiet.model(), 32), folder), 1e-6);
  const double expected = relative_error(quantize(ordinary.model(), options).logits, folder);
  EXPECT_LT(relative_error(quantize(quiet.model(), options).logits, folder), 1.2 * expected);
}

TEST(Magnitude, LayersThatHardlyMatterQuantizeWithEveryMethod) {
  const std::vector<std::vector<LinearIndex>> parts = {
      {kWo, kWDown}, {kWq, kWk, kWv, kWo, kWGate, kWUp, kWDown}, {kWk}, {kWGate}};
  for (const auto& [factor, part] :
       {std::pair{1e-30, 0}, {1e-7, 1}, {1e-30, 1}, {1e-40, 1}, {1e-30, 2}, {1e-25, 3}}) {
    TinyModel tiny(false, 3);
    for (LinearIndex linear : parts[static_cast<size_t>(part)]) {
      multiply(weights(tiny, 0, linear), factor);
    }
    const std::vector<float> folder = logits_of(tiny.model(), 32);
    for (const QuantizeOptions& options : all_methods()) {
      SCOPED_TRACE(testing::Message()
                   << factor << ", part " << part << ", " << describe_options(options));
      const Quantized made = quantize(tiny.model(), options);
      for (double loss : made.result.basis_losses) EXPECT_TRUE(std::isfinite(loss));
      EXPECT_LT(relative_error(made.logits, folder), 5.0);  // uncorrelated logits: 6 or 7
    }
  }
}

TEST(Magnitude, ExponentsSurviveAnInterruption) {
  TinyModel tiny(false, 3);
  scale_values(tiny, -24);
  const QuantizeOptions options = options_of("gptq");
  const Calibration calibration = cut_samples(random_ids(200, 96, 4), 4, 48, 96, "test");
  TempDir folder;
  CpuBackend backend(2);
  const auto run = [&](const std::string& name, bool resume, int64_t layers) {
    int64_t done = 0;
    QuantizeHooks hooks;
    hooks.progress = [&](int64_t layer, int64_t, const char*) { done = layer; };
    hooks.interrupted = [&] { return done >= layers; };
    return quantize_model(tiny.model(), options, &calibration, 1, backend, folder / name, resume,
                          hooks);
  };
  run("whole.tq", false, 99);
  EXPECT_THROW(run("m.tq", false, 2), Error);
  EXPECT_GT(run("m.tq", true, 99).n_resumed, 0);
  EXPECT_EQ(read_bytes(folder / "m.tq"), read_bytes(folder / "whole.tq"));
}

TEST(Magnitude, KeysAndValuesOfAnyMagnitudeFitEveryCache) {
  for (TinyFamily family : {TinyFamily::kLlama, TinyFamily::kQwen3}) {
    for (int kv_bits : {32, 16, 8, 4}) {
      const TinyModel ordinary(false, 3, Storage::kF32, family);
      const std::vector<float> expected = logits_of(ordinary.model(), kv_bits);
      for (int exponent : {20, -24}) {
        SCOPED_TRACE(testing::Message()
                     << static_cast<int>(family) << ", " << kv_bits << " bits, 2^" << exponent);
        TinyModel tiny(false, 3, Storage::kF32, family);
        scale_values(tiny, exponent);
        if (family == TinyFamily::kLlama) scale_keys(tiny, exponent);
        EXPECT_LT(relative_error(logits_of(tiny.model(), kv_bits), expected), 1e-6);
        Model model = tiny.model();  // norms of heads: their gains decide
        if (family != TinyFamily::kQwen3) continue;
        multiply(model.layers[2].k_norm, std::ldexp(1.0, exponent));
        multiply(model.layers[2].q_norm, std::ldexp(1.0, -exponent));
        EXPECT_LT(relative_error(logits_of(model, kv_bits), expected), 1e-6);
      }
    }
  }
}

TEST(Magnitude, KeysAndValuesOfOrdinaryModelsAreStoredAsTheyAre) {
  for (TinyFamily family : {TinyFamily::kLlama, TinyFamily::kQwen3}) {
    const TinyModel tiny(false, 3, Storage::kF32, family);
    for (const Layer& layer : tiny.model().layers) {
      const KvExponents exponents = kv_exponents(tiny.model().config, layer);
      EXPECT_TRUE(exponents.q.empty() && exponents.k.empty());
      EXPECT_TRUE(exponents.v.empty() && exponents.out.empty());
    }
  }
}

// Keys of ordinary size, but queries beyond the f16 of a GPU's attention. How much is shared
// depends on how roughly each was bounded.
TEST(Magnitude, HugeQueriesShareTheirPowersWithKeys) {
  TinyModel tiny(false, 3);
  multiply(weights(tiny, 1, kWq), 0x1p12);
  multiply(weights(tiny, 1, kWk), 0x1p-6);
  const Config& c = tiny.model().config;
  const KvExponents exponents = kv_exponents(c, tiny.model().layers[1]);
  ASSERT_EQ(std::ssize(exponents.q), c.q_dim());
  ASSERT_EQ(std::ssize(exponents.k), c.kv_dim());
  for (int64_t i = 0; i < c.q_dim(); ++i) {
    const int64_t key = i / c.head_dim / (c.n_heads / c.n_kv_heads) * c.head_dim;
    EXPECT_EQ(exponents.q[static_cast<size_t>(i)], -exponents.k[static_cast<size_t>(key)]);
    EXPECT_NEAR(exponents.q[static_cast<size_t>(i)], -8, 2);
  }
}

TEST(Magnitude, TablesThatNeedPowersOfTwoStayInSixteenBitsAndOneDeadRowChangesNothing) {
  QuantizeOptions options = options_of("rtn");
  options.embed_bits = options.head_bits = 4;
  TinyModel tiny(false, 3);
  multiply(tiny.values(0), 0x1p-20);
  multiply(tiny.values(1), 0x1p-30);
  const Quantized made = quantize(tiny.model(), options);
  ASSERT_EQ(made.notes.size(), 2u);
  EXPECT_NE(made.notes[0].find("tok_embed stays in 16 bits"), std::string::npos);
  EXPECT_NE(made.notes[1].find("lm_head stays in 16 bits"), std::string::npos);
  // As far from the folder as with tables that nobody wanted to round.
  options.embed_bits = options.head_bits = 32;
  const std::vector<float> folder = logits_of(tiny.model(), 32);
  EXPECT_LT(relative_error(made.logits, folder),
            1.1 * relative_error(quantize(tiny.model(), options).logits, folder));

  options.embed_bits = options.head_bits = 4;
  TinyModel dead(false, 3);
  for (size_t i = 0; i < 128; ++i) dead.values(0)[i] *= 1e-12f;
  EXPECT_TRUE(quantize(dead.model(), options).notes.empty());
}

TEST(Magnitude, RowsKeepTheirProportionsWhereTheyCan) {
  const RoundingSpec spec{4, 32};
  FloatMatrix w{3, 64, std::vector<float>(192, 0.0f)};
  w.row(0)[3] = 3.0f;
  w.row(1)[40] = 0.001f;
  EXPECT_TRUE(row_exponents(w, spec, {}, 1).empty());
  w.row(2)[5] = 0x1p-20f;
  EXPECT_EQ(row_exponents(w, spec, {}, 1), (std::vector<int8_t>{2, 2, -19}));
  // Two groups of one row, 2^25 apart: more room below.
  w.row(2)[5] = 0x1p-25f;
  w.row(2)[40] = 1.0f;
  const std::vector<int8_t> exponents = row_exponents(w, spec, {}, 1);
  scale_rows(w, exponents, -1, 1);
  const FloatMatrix rounded = to_float_matrix(round_matrix(w, spec, nullptr, 1).matrix.view());
  // A lone weight has code 7 and a scale that is off by 2^-11 of itself; f16 is less exact at
  // 2^-16.
  for (int64_t col : {5, 40}) EXPECT_NEAR(rounded.row(2)[col] / w.row(2)[col], 1.0f, 0x1p-7f);
}

TEST(Magnitude, SixteenBitsAreThoseThatHoldTheValues) {
  const auto chosen = [](float largest) {
    std::vector<float> values(200, 0.0f);
    values[150] = largest;
    values[3] = 1.0f;
    return choose_16_bit(values);
  };
  EXPECT_EQ(chosen(0.0f), Storage::kF16);
  EXPECT_EQ(chosen(65519.0f), Storage::kF16);
  EXPECT_EQ(chosen(65520.0f), Storage::kBF16);
  EXPECT_EQ(chosen(0x1p-16f), Storage::kF16);
  EXPECT_EQ(chosen(0x1p-17f), Storage::kBF16);
  EXPECT_EQ(chosen(0x1.FFp127f), Storage::kF32);  // rounds to infinity in bf16
  EXPECT_EQ(chosen(0x1p-130f), Storage::kF32);
}

TEST(Magnitude, AnUnquantizedCopyHoldsTinyWeights) {
  TinyModel tiny(false, 3);
  scale_values(tiny, -26);
  const std::vector<float> folder = logits_of(tiny.model(), 16);
  // bf16 is off by 2^-9 / sqrt(3) of each weight of wv and wo; this is the worst of 6,720 logits.
  EXPECT_LT(relative_error(quantize(tiny.model(), options_of("none")).logits, folder), 0.05);
  QuantizeOptions kept = options_of("rtn");
  kept.keep = {"."};
  EXPECT_LT(relative_error(quantize(tiny.model(), kept).logits, folder), 0.05);
}

}  // namespace
}  // namespace tq
