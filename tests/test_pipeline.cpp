// The quantizer as a whole: reproducible, resumable, exact about sizes, and refusing early.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "cpu/cpu_backend.h"
#include "model/error.h"
#include "model/tq_file.h"
#include "quant/eigen.h"
#include "quant/pipeline.h"
#include "quant/preflight.h"
#include "quant/quantize_layer.h"
#include "quant/resume.h"
#include "quant/rounding.h"
#include "tests/temp_dir.h"
#include "tests/tiny_model.h"
#include "tokenizer/tokenizer.h"

namespace tq {
namespace {

Calibration tiny_calibration() {
  return cut_samples(random_ids(200, 96, 4), 4, 48, 96, "test");
}

QuantizeOptions tiny_options(const std::string& method, int threads = 2) {
  QuantizeOptions options = method_preset(method);
  options.threads = threads;
  return options;
}

// Every way to a learned basis, in few steps.
std::vector<QuantizeOptions> learned_methods(int threads = 2) {
  std::vector<QuantizeOptions> methods;
  for (const char* method : {"spinquant", "respinquant", "twinquant", "twinquant"}) {
    QuantizeOptions options = tiny_options(method, threads);
    options.bits_a = 4;
    options.steps = 4;
    options.basis_rank = 8;
    if (options.refine_steps > 0) options.refine_steps = 2;
    if (methods.size() == 3) options.split = Split::kSvd;
    methods.push_back(options);
  }
  return methods;
}

struct Outcome {
  std::string bytes;
  QuantizeResult result;
};

Outcome run(const Model& model, const QuantizeOptions& options, const QuantizeHooks& hooks = {}) {
  TempDir folder;
  CpuBackend backend(options.threads);
  const Calibration calibration = tiny_calibration();
  Outcome outcome;
  outcome.result =
      quantize_model(model, options, &calibration, 1, backend, folder / "m.tq", false, hooks);
  outcome.bytes = read_bytes(folder / "m.tq");
  EXPECT_EQ(outcome.bytes.size(), outcome.result.file_bytes);
  EXPECT_GT(verify_tq_file(folder / "m.tq"), 0);
  // Neither a temporary file nor resume data stays behind.
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);
  return outcome;
}

template <typename Action>
std::string error_of(ErrorKind kind, Action action) {
  try {
    action();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

TEST(Pipeline, BytesDoNotDependOnThreadsOrCaches) {
  const TinyModel tiny(true);
  auto one = learned_methods(1), two = learned_methods(2);
  for (const char* method : {"none", "rtn", "gptq", "quarot", "svdquant"}) {
    one.push_back(tiny_options(method, 1));
    two.push_back(tiny_options(method, 2));
  }
  for (size_t i = 0; i < one.size(); ++i) {
    Eigen::setCpuCacheSizes(16 << 10, 64 << 10, 128 << 10);  // another CPU
    EXPECT_EQ(run(tiny.model(), one[i]).bytes, run(tiny.model(), two[i]).bytes)
        << describe_options(one[i]);
    EXPECT_EQ(Eigen::l1CacheSize(), 32 << 10);  // blocks of products are those of every CPU
  }
}

TEST(Pipeline, OptionsAndSeedChangeTheBytes) {
  const TinyModel tiny(true);
  const std::string bytes = run(tiny.model(), tiny_options("quarot")).bytes;
  QuantizeOptions other = tiny_options("quarot");
  other.seed = 1;
  EXPECT_NE(run(tiny.model(), other).bytes, bytes);
  other = tiny_options("quarot");
  other.rounding = RoundingKind::kNearest;
  EXPECT_NE(run(tiny.model(), other).bytes, bytes);
  const QuantizeOptions learned = learned_methods()[0];
  const std::string learned_bytes = run(tiny.model(), learned).bytes;
  other = learned;
  other.seed = 1;
  EXPECT_NE(run(tiny.model(), other).bytes, learned_bytes);
  other = learned;
  other.steps = 5;
  EXPECT_NE(run(tiny.model(), other).bytes, learned_bytes);
}

TEST(Pipeline, BitsPerWeightAreExact) {
  const TinyModel tiny(true);
  QuantizeOptions options = tiny_options("rtn");
  // head_dim 48 * 4 heads = 192 columns of wo: three groups of 64, but one and a half of 128.
  const Outcome g64 = run(tiny.model(), options);
  for (const LinearReport& linear : g64.result.linears) EXPECT_EQ(linear.bits_per_weight, 4.25);
  EXPECT_EQ(g64.result.bits_per_weight, 4.25);
  options.group = 128;
  for (const LinearReport& linear : run(tiny.model(), options).result.linears) {
    if (linear.in % 128 == 0) {
      EXPECT_EQ(linear.bits_per_weight, 4.125);
    }
  }
}

TEST(Pipeline, PlanPredictsTheSizes) {
  const TinyModel tiny(false);
  QuantizeOptions options = tiny_options("svdquant");
  options.rank = 16;
  options.keep = {"layers\\.0\\."};
  options.head_bits = 8;
  std::vector<QuantizeOptions> cases = learned_methods();
  cases.push_back(options);
  for (const QuantizeOptions& planned : cases) {
    const QuantizePlan plan = make_plan(tiny.model(), planned, 0);
    const Outcome outcome = run(tiny.model(), planned);
    EXPECT_DOUBLE_EQ(plan.bits_per_weight(), outcome.result.bits_per_weight)
        << describe_options(planned);
    EXPECT_NEAR(static_cast<double>(plan.output_bytes), static_cast<double>(outcome.bytes.size()),
                0.05 * outcome.bytes.size());
  }
}

TEST(Pipeline, GptqLowersTheOutputError) {
  const TinyModel tiny(true);
  // Compare on the same inputs and weights: the first layer of the same basis.
  QuantizeOptions options = tiny_options("gptq");
  const Calibration calibration = tiny_calibration();
  CpuBackend backend(2);
  const ModelBasis basis(options, tiny.model().config);
  const FloatLayer layer = fold_layer(tiny.model(), 0, options, basis);
  CalibrationStream stream(tiny.model(), calibration, basis.input(), backend, 2);
  LayerStats stats(tiny.model().config, options);
  stream.run_layer(
      layer.view(),
      [&](Site site, const float* x, int64_t rows, int64_t) { stats.at(site).add(x, rows, 2); },
      [] {});
  const auto reports = [&](RoundingKind rounding) {
    options.rounding = rounding;
    return quantize_layer(layer, 0, options, tiny.model().config, basis, &stats, [] {}).reports;
  };
  const auto gptq = reports(RoundingKind::kGptq), nearest = reports(RoundingKind::kNearest);
  for (size_t i = 0; i < kNLinears; ++i) {
    EXPECT_GT(*gptq[i].output_snr_db, *nearest[i].output_snr_db) << gptq[i].name;
    EXPECT_LT(gptq[i].weight_snr_db, nearest[i].weight_snr_db) << gptq[i].name;
  }
}

TEST(Pipeline, TwoLevelScalesStayMultiplesThroughAllSteps) {
  const TinyModel tiny(true, 1, Storage::kF32, TinyFamily::kLlama, 96);
  for (QuantizeOptions options : learned_methods()) {
    for (int bits_a : {4, 8}) {
      options.two_level = true;
      options.bits_a = bits_a;
      options.group = options.group_a = 32;
      check_options(options, tiny.model().config);
      TempDir folder;
      write_bytes(folder / "m.tq", run(tiny.model(), options).bytes);
      const Model stored = load_tq_file(folder / "m.tq");
      CpuBackend backend(2);
      for (const NamedLinear& named : kLayerLinears) {
        const Linear& linear = stored.layers[1].*named.member;
        SCOPED_TRACE(std::string(options.method) + " " + named.name);
        EXPECT_TRUE(linear.act.two_level);
        EXPECT_EQ(linear.act.group, bits_a == 8 ? linear.in_dim() : 32);
        for (const Matrix* m : {&linear.weight, linear.branch_a ? &*linear.branch_a : nullptr,
                                linear.branch_b ? &*linear.branch_b : nullptr}) {
          for (int64_t row = 0; m && row < m->rows; ++row) {
            std::vector<float> scales;
            for (int64_t i = 0; i < m->n_groups(); ++i) {
              scales.push_back(f16_to_f32(m->scales[row * m->n_groups() + i]));
              ASSERT_GT(scales.back(), 0);
            }
            ASSERT_LE(*std::max_element(scales.begin(), scales.end()) / common_unit(scales),
                      kMostMultiple);
          }
        }
        EXPECT_NO_THROW(backend.prepare(linear));
      }
    }
  }
}

TEST(Pipeline, ScalesOfATokenAreOnesOfAHeadBeforeWo) {
  const TinyModel tiny(true, 1, Storage::kF32, TinyFamily::kLlama, 96);  // weights: groups of 64
  for (QuantizeOptions options : learned_methods()) {
    options.group_a = kTokenGroups;
    options.act_codes = ActCodes::kAsymmetric;
    check_options(options, tiny.model().config);
    TempDir folder;
    write_bytes(folder / "m.tq", run(tiny.model(), options).bytes);
    const Model stored = load_tq_file(folder / "m.tq");
    const Layer& layer = stored.layers[1];
    EXPECT_TRUE(layer.wq.act == (ActQuant{4, 128, 1.0f, ActCodes::kAsymmetric}));
    EXPECT_TRUE(layer.wo.act == (ActQuant{4, 96, 1.0f, ActCodes::kAsymmetric}));
    EXPECT_TRUE(layer.w_up.act == (ActQuant{4, 128, 1.0f, ActCodes::kAsymmetric}));
    EXPECT_TRUE(layer.w_down.act == (ActQuant{4, 256, 1.0f, ActCodes::kAsymmetric}));
    // It runs.
    CpuBackend backend(2);
    for (const NamedLinear& linear : kLayerLinears) {
      EXPECT_NO_THROW(backend.prepare(layer.*linear.member)) << linear.name;
    }
  }
}

TEST(Pipeline, NoneKeepsSixteenBitSourcesByteForByte) {
  for (Storage storage : {Storage::kBF16, Storage::kF16}) {
    const TinyModel tiny(true, 1, storage);
    TempDir folder;
    CpuBackend backend(1);
    quantize_model(tiny.model(), tiny_options("none"), nullptr, 1, backend, folder / "m.tq", false,
                   {});
    const Model stored = load_tq_file(folder / "m.tq");
    for (size_t layer = 0; layer < 3; ++layer) {
      for (const NamedLinear& linear : kLayerLinears) {
        const Matrix& a = (stored.layers[layer].*linear.member).weight;
        const Matrix& b = (tiny.model().layers[layer].*linear.member).weight;
        ASSERT_EQ(a.storage, storage);
        ASSERT_EQ(std::memcmp(a.data, b.data, b.data_bytes()), 0) << linear.name;
      }
    }
    EXPECT_EQ(stored.layers[0].attn_norm, tiny.model().layers[0].attn_norm);
  }
}

TEST(Pipeline, NoneStoresF32AsF16UnlessItOverflows) {
  TinyModel tiny(true);
  tiny.values(1)[3] = 1e6f;  // layers.0.wq
  TempDir folder;
  CpuBackend backend(1);
  quantize_model(tiny.model(), tiny_options("none"), nullptr, 1, backend, folder / "m.tq", false,
                 {});
  const Model stored = load_tq_file(folder / "m.tq");
  EXPECT_EQ(stored.layers[0].wq.weight.storage, Storage::kBF16);
  EXPECT_EQ(stored.layers[0].wk.weight.storage, Storage::kF16);
}

TEST(Pipeline, RatiosFromBeforeRefinementAreCalledThat) {
  LinearReport report;
  report.name = "layers.0.wq";
  report.weight_snr_db = 20;
  report.output_snr_db = 25;
  EXPECT_EQ(to_json(report)["output_snr_db"], 25);
  report.refined = true;
  const Json json = to_json(report);
  EXPECT_FALSE(json.contains("output_snr_db") || json.contains("weight_snr_db"));
  EXPECT_EQ(json["before_refinement"]["output_snr_db"], 25);
  // A run that keeps refined scales says so of every linear.
  const TinyModel tiny(true);
  QuantizeOptions options = learned_methods()[2];
  options.refine_steps = 12;
  const QuantizeResult result = run(tiny.model(), options).result;
  for (const LinearReport& linear : result.linears) {
    EXPECT_EQ(linear.refined, result.refined.kept());
  }
}

TEST(Pipeline, TiedTablesAreStoredOnceAndMayBePacked) {
  const TinyModel tiny(true);
  for (int bits : {16, 8, 4}) {
    QuantizeOptions options = tiny_options("rtn");
    options.embed_bits = options.head_bits = bits;
    TempDir folder;
    CpuBackend backend(1);
    quantize_model(tiny.model(), options, nullptr, 1, backend, folder / "m.tq", false, {});
    const Model stored = load_tq_file(folder / "m.tq");
    EXPECT_EQ(stored.lm_head.weight.data, stored.tok_embed.data);
    EXPECT_EQ(stored.tok_embed.storage, bits == 16  ? Storage::kF16
                                        : bits == 8 ? Storage::kQ8
                                                    : Storage::kQ4);
    EXPECT_EQ(stored.lm_head.act.bits, bits == 16 ? 16 : 8);
  }
}

TEST(Pipeline, KeepSpreadsOverLinearsThatShareAnInput) {
  const TinyModel tiny(true);
  QuantizeOptions options = tiny_options("quarot");
  options.keep = {"layers.1.wk$"};
  const auto plan = plan_layer(options, tiny.model().config, 1);
  for (LinearIndex index : {kWq, kWk, kWv}) EXPECT_TRUE(plan[index].keep);
  for (LinearIndex index : {kWo, kWGate, kWUp, kWDown}) EXPECT_FALSE(plan[index].keep);
  EXPECT_FALSE(plan_layer(options, tiny.model().config, 0)[kWk].keep);
  const Outcome outcome = run(tiny.model(), options);
  EXPECT_EQ(outcome.result.linears[7 + kWv].bits_per_weight, 16);
  EXPECT_GT(outcome.result.linears[7 + kWv].weight_snr_db, 60);
  options.keep = {"("};
  error_of(ErrorKind::kUsage, [&] { plan_layer(options, tiny.model().config, 0); });
}

// Stops the run when work on layer `layer` has begun.
QuantizeHooks stop_at(int64_t layer, bool& stopped) {
  QuantizeHooks hooks;
  hooks.progress = [&stopped, layer](int64_t at, int64_t, const char* step) {
    if (at == layer && std::string(step) == "rounding") stopped = true;
  };
  hooks.interrupted = [&stopped] { return stopped; };
  return hooks;
}

TEST(Resume, AnInterruptedRunContinuesToTheSameBytes) {
  const TinyModel tiny(true);
  std::vector<QuantizeOptions> cases = learned_methods();
  for (const char* method : {"quarot", "gptq"}) {
    cases.push_back(tiny_options(method));
    cases.back().rank = 8;  // branches are stored too
  }
  for (const QuantizeOptions& options : cases) {
    const Calibration calibration = tiny_calibration();
    const std::string expected = run(tiny.model(), options).bytes;
    TempDir folder;
    const std::string output = folder / "m.tq";
    CpuBackend backend(2);
    for (int64_t layer : {1, 2}) {
      bool stopped = false;
      const std::string message = error_of(ErrorKind::kInterrupted, [&] {
        quantize_model(tiny.model(), options, &calibration, 1, backend, output, layer > 1,
                       stop_at(layer, stopped));
      });
      EXPECT_NE(message.find("--resume"), std::string::npos);
      EXPECT_FALSE(std::filesystem::exists(output));
      // Only the resume folder: no temporary file.
      EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);
    }
    const QuantizeResult result =
        quantize_model(tiny.model(), options, &calibration, 1, backend, output, true, {});
    EXPECT_EQ(result.n_resumed, 2);
    EXPECT_EQ(result.linears.size(), 21u);
    EXPECT_EQ(read_bytes(output), expected);
    EXPECT_FALSE(std::filesystem::exists(output + ".resume"));
  }
}

TEST(Resume, ADescentBeginsAgainAndWhatCameBeforeIsKept) {
  const TinyModel tiny(true);
  const QuantizeOptions options = learned_methods()[2];
  const Calibration calibration = tiny_calibration();
  const Outcome expected = run(tiny.model(), options);
  TempDir folder;
  const std::string output = folder / "m.tq";
  CpuBackend backend(2);
  bool stopped = false;
  const auto stop_in = [&](const std::string& wanted) {
    QuantizeHooks hooks;
    hooks.descent = [&stopped, wanted](const char* stage, int64_t, int64_t, double) {
      stopped = stage == wanted;
    };
    hooks.interrupted = [&stopped] { return stopped; };
    return hooks;
  };
  for (const char* stage : {"learning", "refining"}) {
    stopped = false;
    error_of(ErrorKind::kInterrupted, [&] {
      quantize_model(tiny.model(), options, &calibration, 1, backend, output,
                     std::string(stage) == "refining", stop_in(stage));
    });
    EXPECT_EQ(names_in(folder.path()), std::vector<std::string>{"m.tq.resume"});
  }
  const QuantizeResult result =
      quantize_model(tiny.model(), options, &calibration, 1, backend, output, true, {});
  EXPECT_EQ(result.n_resumed, 3);
  EXPECT_EQ(result.basis_losses, expected.result.basis_losses);
  EXPECT_EQ(result.refined.losses, expected.result.refined.losses);
  EXPECT_EQ(read_bytes(output), expected.bytes);
}

TEST(Resume, RefusesAnotherModelOtherOptionsOrAnotherText) {
  const TinyModel tiny(true);
  const QuantizeOptions options = tiny_options("quarot");
  const Calibration calibration = tiny_calibration();
  TempDir folder;
  const std::string output = folder / "m.tq";
  CpuBackend backend(2);
  bool stopped = false;
  error_of(ErrorKind::kInterrupted, [&] {
    quantize_model(tiny.model(), options, &calibration, 1, backend, output, false,
                   stop_at(1, stopped));
  });
  const auto resume = [&](const QuantizeOptions& o, const Calibration& c, uint64_t weights) {
    return error_of(ErrorKind::kBadData, [&] {
      quantize_model(tiny.model(), o, &c, weights, backend, output, true, {});
    });
  };
  QuantizeOptions other = options;
  other.seed = 9;
  EXPECT_NE(resume(other, calibration, 1).find("does not match: seed"), std::string::npos);
  other = options;
  other.group = 32;
  EXPECT_NE(resume(other, calibration, 1).find("does not match: group"), std::string::npos);
  EXPECT_NE(resume(options, calibration, 2).find("does not match: weights"), std::string::npos);
  const Calibration text = cut_samples(random_ids(200, 96, 5), 4, 48, 96, "test");
  EXPECT_NE(resume(options, text, 1).find("does not match: calibration"), std::string::npos);
}

TEST(Resume, ADamagedLayerIsReported) {
  const TinyModel tiny(true);
  const QuantizeOptions options = tiny_options("quarot");
  const Calibration calibration = tiny_calibration();
  TempDir folder;
  CpuBackend backend(2);
  bool stopped = false;
  error_of(ErrorKind::kInterrupted, [&] {
    quantize_model(tiny.model(), options, &calibration, 1, backend, folder / "m.tq", false,
                   stop_at(1, stopped));
  });
  const std::string path = folder / "m.tq.resume/layer-00000.bin";
  const std::string bytes = read_bytes(path);
  for (size_t keep : {size_t{0}, size_t{10}, bytes.size() / 2, bytes.size() - 1}) {
    write_bytes(path, bytes.substr(0, keep));
    error_of(ErrorKind::kBadData, [&] { ResumeStore(folder / "m.tq").load(0, {}); });
  }
  std::string flipped = bytes;
  flipped[bytes.size() / 3] ^= 4;
  write_bytes(path, flipped);
  error_of(ErrorKind::kBadData, [&] { ResumeStore(folder / "m.tq").load(0, {}); });
}

TEST(Resume, SkipsAndRoundingOfInputsSurvive) {
  TempDir folder;
  ResumeStore store(folder / "m.tq");
  store.create({{"seed", 1}});
  QuantizedLayer layer;
  layer.reports.resize(kNLinears);
  const std::vector<float> values = {1, -2, 3, 4, 5, 6};
  layer.layer.linears[kWo].act = {3, 32, 0.5f, ActCodes::kAll, true};
  layer.layer.ffn_skip = {store_dense(values, 2, 3, Storage::kF32),
                          store_dense(values, 3, 2, Storage::kF16)};
  store.save(0, layer);
  const QuantizedLayer loaded = *store.load(0, {});
  EXPECT_TRUE(loaded.layer.linears[kWo].act == layer.layer.linears[kWo].act);
  EXPECT_FALSE(loaded.layer.attn_skip.has_value());
  ASSERT_TRUE(loaded.layer.ffn_skip.has_value());
  EXPECT_EQ(to_float_matrix(loaded.layer.ffn_skip->a.view()).data, values);
  EXPECT_EQ(to_float_matrix(loaded.layer.ffn_skip->b.view()).data, values);
  EXPECT_EQ(loaded.layer.ffn_skip->b.rows, 3);
}

TEST(Resume, StartingAgainForgetsOldLayers) {
  TempDir folder;
  ResumeStore store(folder / "m.tq");
  std::filesystem::create_directory(store.folder());
  write_bytes(store.folder() + "/layer-00000.bin", "stale");  // and no fingerprint
  store.create({{"seed", 1}});
  EXPECT_FALSE(store.load(0, {}).has_value());
}

TEST(Calibration, SamplesAreSpreadEvenlyAndDoNotOverlap) {
  std::vector<int32_t> ids(105);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
  const Calibration calibration = cut_samples(ids, 5, 10, 200, "test");
  ASSERT_EQ(calibration.samples.size(), 5u);
  for (int32_t i = 0; i < 5; ++i) EXPECT_EQ(calibration.samples[static_cast<size_t>(i)][0], 20 * i);
  EXPECT_EQ(cut_samples(ids, 99, 10, 200, "test").samples.size(), 10u);
  EXPECT_NE(cut_samples(ids, 4, 10, 200, "test").hash(), calibration.hash());
}

TEST(Calibration, RefusesShortTextsAndForeignIds) {
  error_of(ErrorKind::kBadData, [] { cut_samples({1, 2, 3}, 1, 4, 10, "test"); });
  error_of(ErrorKind::kBadData, [] { cut_samples({1, 2, 30}, 1, 2, 10, "test"); });
  error_of(ErrorKind::kBadData, [] { cut_samples({1, -2, 3}, 1, 2, 10, "test"); });
}

TEST(Calibration, TheBuiltInTextIsUtf8WithoutControlCharacters) {
  const std::string_view text = builtin_calibration_text();
  EXPECT_GT(text.size(), 300000u);
  EXPECT_TRUE(is_valid_utf8(text));
  for (unsigned char c : text) ASSERT_TRUE(c == '\n' || (c >= 32 && c != 127));
}

TEST(Preflight, WeightsThatAreNotFiniteAreNamed) {
  TinyModel tiny(true);
  const uint64_t hash = scan_weights(tiny.model(), [](const Matrix&) {});
  tiny.values(2)[130] = NAN;  // layers.0.wk, row 1
  tiny.values(2)[131] = INFINITY;
  const std::string message =
      error_of(ErrorKind::kBadData, [&] { scan_weights(tiny.model(), [](const Matrix&) {}); });
  EXPECT_NE(message.find("layers.0.wk: 2 values, the first at index 130"), std::string::npos)
      << message;
  tiny.values(2)[130] = tiny.values(2)[131] = 0;
  EXPECT_NE(scan_weights(tiny.model(), [](const Matrix&) {}), hash);
}

// Peaks that `tq quantize` reported (docs/results.md, "Time and memory of quantizing").
TEST(Preflight, EstimatesOfLearnedMethodsAreNearMeasuredPeaks) {
  const auto planned = [](const std::string& sizes, const std::string& method,
                          const std::function<void(QuantizeOptions&)>& change = {}) {
    Model model;
    model.texts.config = R"({"architectures":["LlamaForCausalLM"],"model_type":"llama",)"
                         R"("hidden_act":"silu","max_position_embeddings":8192,)"
                         R"("rms_norm_eps":1e-5,"rope_theta":1e5,"tie_word_embeddings":true,)" +
                         sizes + "}";
    model.config = parse_config(model.texts.config, "test");
    QuantizeOptions options = method_preset(method);
    options.bits_a = 4;
    if (change) change(options);
    return static_cast<double>(make_plan(model, options, 64 * 512).memory_bytes) / 1e6;
  };
  const std::string small = R"("hidden_size":576,"intermediate_size":1536,"num_hidden_layers":30,)"
                            R"("num_attention_heads":9,"num_key_value_heads":3,"vocab_size":49152)";
  const std::string block = R"("hidden_size":4096,"intermediate_size":14336,"vocab_size":512,)"
                            R"("num_attention_heads":32,"num_key_value_heads":8,)"
                            R"("num_hidden_layers":1)";
  const struct {
    double peak, estimate;
  } cases[] = {{1184, planned(small, "spinquant")},
               {2131, planned(small, "respinquant")},
               {1183, planned(small, "twinquant")},
               {1423, planned(small, "twinquant", [](auto& o) { o.split = Split::kSvd; })},
               {12260, planned(block, "twinquant")}};
  for (const auto& c : cases) EXPECT_NEAR(c.estimate, c.peak, 0.3 * c.peak);
}

TEST(Preflight, OutputPathsAreRefusedBeforeWork) {
  TempDir folder;
  write_bytes(folder / "old.tq", "x");
  std::filesystem::create_hard_link(folder / "old.tq", folder / "link");
  std::filesystem::create_symlink(folder / "old.tq", folder / "symlink");
  const auto refused = [&](const std::string& output, bool force) {
    return error_of(ErrorKind::kIo, [&] { check_output_path(output, {folder / "old.tq"}, force); });
  };
  EXPECT_NE(refused(folder / "none/m.tq", true).find("No such file"), std::string::npos);
  EXPECT_NE(refused(folder.path(), true).find("folder"), std::string::npos);
  for (const char* name : {"old.tq", "link", "symlink"}) {
    EXPECT_NE(refused(folder / name, true).find("is the input"), std::string::npos) << name;
  }
  write_bytes(folder / "other.tq", "x");
  EXPECT_NE(refused(folder / "other.tq", false).find("--force"), std::string::npos);
  EXPECT_NO_THROW(check_output_path(folder / "other.tq", {folder / "old.tq"}, true));
  EXPECT_NO_THROW(check_output_path(folder / "new.tq", {folder / "old.tq"}, false));
  error_of(ErrorKind::kIo, [&] { check_disk_space(folder / "m.tq", uint64_t{1} << 62); });
  error_of(ErrorKind::kResource, [&] { check_memory(uint64_t{1} << 62); });
}

QuantizeOptions with_two_level(QuantizeOptions options) {
  options.two_level = true;
  return options;
}

TEST(Options, ContradictionsAreUsageErrors) {
  const TinyModel tied(true);
  const Config& config = tied.model().config;
  const auto refused = [&](const std::function<void(QuantizeOptions&)>& change,
                           const std::string& method = "quarot") {
    QuantizeOptions options = method_preset(method);
    change(options);
    error_of(ErrorKind::kUsage, [&] { check_options(options, config); });
  };
  EXPECT_NO_THROW(check_options(method_preset("quarot"), config));
  refused([](QuantizeOptions& o) { o.rank = 97; });  // kv_dim is 96
  refused([](QuantizeOptions& o) { o.embed_bits = 8; });
  refused([](QuantizeOptions& o) { o.bits_w = 16; });
  refused([](QuantizeOptions& o) { o.calib_length = 513; });
  refused([](QuantizeOptions& o) { o.act_codes = ActCodes::kAsymmetric; });  // inputs of 8 bits
  refused([](QuantizeOptions& o) { o.group_a = kTokenGroups; });             // heads of 48
  refused([](QuantizeOptions& o) { o.loss = LearningLoss::kCrossEntropy, o.calib_length = 1; },
          "spinquant");
  EXPECT_NO_THROW(check_options(with_two_level(method_preset("twinquant")), config));
  refused([](QuantizeOptions& o) { o = with_two_level(o), o.bits_w = 8; });
  refused([](QuantizeOptions& o) { o = with_two_level(o), o.group_a = kTokenGroups; });
  refused([](QuantizeOptions& o) { o = with_two_level(o), o.branch_bits = 8; }, "twinquant");
  refused([](QuantizeOptions& o) {
    o = with_two_level(o), o.bits_a = 4, o.act_codes = ActCodes::kAsymmetric;
  });
  refused([](QuantizeOptions& o) { o.bits_a = 8; }, "none");
  EXPECT_NO_THROW(check_options(method_preset("twinquant"), config));
  EXPECT_NO_THROW(check_options(method_preset("respinquant"), config));
  refused([](QuantizeOptions& o) { o.basis_rank = 129; }, "respinquant");
  refused([](QuantizeOptions& o) { o.branch_bits = 16; }, "twinquant");
  refused([](QuantizeOptions& o) { o.rounding = RoundingKind::kNearest; }, "twinquant");
  error_of(ErrorKind::kUsage, [] { method_preset("magic"); });
}

}  // namespace
}  // namespace tq
