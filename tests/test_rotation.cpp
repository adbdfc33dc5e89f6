// Rotations: orthogonal, the same on host and backend, and invisible in a model's logits.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "cpu/cpu_backend.h"
#include "model/tq_file.h"
#include "quant/pipeline.h"
#include "quant/quantize_layer.h"
#include "quant/rng.h"
#include "quant/rotation.h"
#include "tests/cli.h"
#include "tests/logits.h"
#include "tests/orthogonal.h"
#include "tests/temp_dir.h"
#include "tests/tiny_model.h"

namespace tq {
namespace {

// Every kind of order: a power of two, each kind of base matrix (Paley I, Paley II), and one that
// needs blocks (22 = 11 * 2).
constexpr int64_t kSizes[] = {1, 2, 64, 12, 20, 36, 40, 72, 96, 576, 22};

std::vector<double> random_vector(int64_t n, uint64_t seed) {
  SplitMix64 rng(seed);
  std::vector<double> v(static_cast<size_t>(n));
  for (double& x : v) x = rng.normal();
  return v;
}

TEST(Rotation, KeepsNormsAndIsUndoneByItsInverse) {
  for (int64_t size : kSizes) {
    const Rotation rotation = Rotation::random_hadamard(size, 7, 0);
    const std::vector<double> original = random_vector(size, 3);
    std::vector<double> v = original;
    apply_transform(rotation.transform, v.data(), false);
    double before = 0, after = 0;
    for (int64_t i = 0; i < size; ++i) {
      before += original[i] * original[i];
      after += v[i] * v[i];
    }
    EXPECT_NEAR(after, before, 1e-12 * before) << size;
    apply_transform(rotation.transform, v.data(), true);
    // f64, about log2(size) + base order additions an element: far below 1e-12.
    for (int64_t i = 0; i < size; ++i) EXPECT_NEAR(v[i], original[i], 1e-12) << size;
  }
}

TEST(Rotation, SpreadsAnOutlierEvenly) {
  const Rotation rotation = Rotation::random_hadamard(576, 1, 0);
  ASSERT_EQ(rotation.transform.block, 576);
  std::vector<double> v(576, 0.0);
  v[100] = 24;  // sqrt(576)
  apply_transform(rotation.transform, v.data(), false);
  for (double x : v) EXPECT_NEAR(std::fabs(x), 1.0, 1e-12);
}

TEST(Rotation, HostAndBackendTransformAgree) {
  CpuBackend backend(2);
  for (int64_t size : kSizes) {
    const Rotation rotation = Rotation::random_hadamard(size, 11, 2);
    const std::vector<double> original = random_vector(size, 5);
    const auto prepared = backend.prepare_transform(rotation.transform);
    for (bool inverse : {false, true}) {
      std::vector<double> expected = original;
      apply_transform(rotation.transform, expected.data(), inverse);
      std::vector<float> values(original.begin(), original.end());
      const BufferPtr buffer = backend.alloc(size);
      backend.upload(*buffer, values);
      backend.transform(*buffer, 1, *prepared, inverse);
      backend.download(*buffer, 0, values);
      for (int64_t i = 0; i < size; ++i) {
        // f32 sums of `size` terms of size ~1 / sqrt(size): at most size * 2^-24 * max|v|.
        EXPECT_NEAR(values[i], expected[i], 1e-6 * std::sqrt(static_cast<double>(size)))
            << size << " inverse " << inverse;
      }
    }
  }
}

TEST(Rotation, DifferentSeedsAndStreamsGiveDifferentSigns) {
  const auto signs = [](uint64_t seed, uint64_t stream) {
    return Rotation::random_hadamard(256, seed, stream).signs;
  };
  EXPECT_EQ(signs(1, 0), signs(1, 0));
  EXPECT_NE(signs(1, 0), signs(2, 0));
  EXPECT_NE(signs(1, 0), signs(1, 1));
  int64_t sum = 0;
  for (int8_t sign : signs(5, 0)) sum += sign;
  EXPECT_LT(std::abs(sum), 64);  // four standard deviations of a fair coin
}

TEST(Rotation, ColumnsAndRowsAreTransformedAlike) {
  const Rotation rotation = Rotation::random_hadamard(40, 3, 0);
  FloatMatrix w{21, 80, std::vector<float>(21 * 80)};  // rows: two blocks of 40
  FloatMatrix t{80, 21, std::vector<float>(21 * 80)};  // its transpose
  SplitMix64 rng(9);
  for (int64_t i = 0; i < 21; ++i) {
    for (int64_t j = 0; j < 80; ++j) t.row(j)[i] = w.row(i)[j] = static_cast<float>(rng.normal());
  }
  transform_rows(w, rotation.transform, 2, 2);
  transform_columns(t, rotation.transform, 2, 2);
  for (int64_t i = 0; i < 21; ++i) {
    for (int64_t j = 0; j < 80; ++j) ASSERT_EQ(w.row(i)[j], t.row(j)[i]);
  }
}

QuantizeOptions rotated_unrounded(uint64_t seed, const std::string& method = "quarot") {
  QuantizeOptions options = method_preset(method);
  options.rank = options.refine_steps = 0;
  options.rounding = RoundingKind::kStore;
  options.bits_w = 32;
  options.bits_a = 16;
  options.embed_bits = options.head_bits = 32;
  options.seed = seed;
  options.threads = 2;
  return options;
}

double rotation_error(const Model& model, const QuantizeOptions& options) {
  TempDir folder;
  CpuBackend backend(2);
  const Calibration calibration =
      cut_samples(random_ids(128, static_cast<int32_t>(model.config.vocab_size), 4), 4, 32,
                  model.config.vocab_size, "test");
  quantize_model(model, options, &calibration, 0, backend, folder / "m.tq", false, {});
  const Model rotated = load_tq_file(folder / "m.tq");
  EXPECT_TRUE(rotated.residual_basis.active());
  EXPECT_EQ(rotated.residual_basis.kind == Transform::Kind::kDense, options.learns_basis());
  const bool layerwise = options.basis == Basis::kLayerwise;
  EXPECT_EQ(rotated.output_basis.active(), layerwise);
  EXPECT_EQ(rotated.layers[0].attn_skip.has_value(), layerwise && options.basis_rank > 0);
  EXPECT_TRUE(rotated.layers[0].w_down.input.active());
  const auto ids = random_ids(24, static_cast<int32_t>(model.config.vocab_size), 17);
  return relative_error(all_logits(rotated, ids), all_logits(model, ids));
}

// A dozen f32 products in a row, each off by a few 2^-24 relative to its terms, and one rounding of
// every folded weight: some 1e-6 of the logits' size. A wrong fold changes logits by about 1.
constexpr double kMaxRotationError = 1e-4;

TEST(RotatedModel, KeepsItsLogits) {
  for (bool tied : {false, true}) {
    const TinyModel tiny(tied);
    EXPECT_LT(rotation_error(tiny.model(), rotated_unrounded(3)), kMaxRotationError) << tied;
  }
}

TEST(RotatedModel, KeepsItsLogitsForEveryArchitecture) {
  const std::string root = std::string(TQ_FIXTURES) + "/random-models";
  int n_models = 0;
  for (const auto& entry : std::filesystem::directory_iterator(root)) {
    if (!entry.is_directory()) continue;
    ++n_models;
    const Model model = load_hf_folder(entry.path().string());
    EXPECT_LT(rotation_error(model, rotated_unrounded(5)), kMaxRotationError) << entry.path();
  }
  EXPECT_GE(n_models, 4);
}

TEST(RotatedModel, KeepsItsLogitsInLearnedBases) {
  for (TinyFamily family : {TinyFamily::kLlama, TinyFamily::kQwen3}) {
    for (bool tied : {false, true}) {
      const TinyModel tiny(tied, 1, Storage::kF32, family);
      const int64_t dim = tiny.model().config.dim;
      const auto error = [&](const char* method, int64_t basis_rank) {
        QuantizeOptions options = rotated_unrounded(3, method);
        options.steps = 6;
        options.basis_rank = basis_rank;
        return rotation_error(tiny.model(), options);
      };
      EXPECT_LT(error("spinquant", 0), kMaxRotationError);
      EXPECT_LT(error("twinquant", 0), kMaxRotationError);
      for (int64_t rank : {int64_t{0}, int64_t{2}, int64_t{8}, dim}) {
        EXPECT_LT(error("respinquant", rank), kMaxRotationError) << rank;
      }
    }
  }
}

TEST(RotatedModel, KeepsItsLogitsInLearnedBasesForEveryArchitecture) {
  for (const char* name : {"llama3-rope-f16", "qwen3-tied-bf16"}) {
    const Model model = load_hf_folder(std::string(TQ_FIXTURES) + "/random-models/" + name);
    QuantizeOptions options = rotated_unrounded(3, "respinquant");
    options.steps = 4;
    options.basis_rank = 8;
    EXPECT_LT(rotation_error(model, options), kMaxRotationError) << name;
  }
}

// A model whose residual basis is dense, and whose every layer works in two bases: T for what
// attention reads and the FFN writes, T H for the rest, H = I - 2 U^T U a product of reflections.
// The skips lead to T H and back: I + A^T B^T = H.
struct SkippingModel {
  SkippingModel(const Model& source, Storage storage) : model(source) {
    const int64_t dim = source.config.dim, rank = 5;
    const std::vector<double> orthogonal = random_orthogonal(dim, 1);
    const std::vector<float> basis(orthogonal.begin(), orthogonal.end());
    t = store_dense(basis, dim, dim, storage);
    model.residual_basis = dense(t);
    for (int64_t i = 0; i < source.config.n_layers; ++i) {
      const std::vector<double> rows = random_orthogonal(dim, 10 + static_cast<uint64_t>(i));
      FloatMatrix u{rank, dim, {rows.begin(), rows.begin() + rank * dim}};
      FloatMatrix minus_two_u{dim, rank, std::vector<float>(u.data.size())};
      FloatMatrix th = to_float_matrix(t.view());  // T (I - 2 U^T U)
      for (int64_t r = 0; r < rank; ++r) {
        for (int64_t k = 0; k < dim; ++k) minus_two_u.row(k)[r] = -2 * u.row(r)[k];
        for (int64_t row = 0; row < dim; ++row) {
          double dot = 0;
          for (int64_t k = 0; k < dim; ++k) dot += double{th.row(row)[k]} * u.row(r)[k];
          for (int64_t k = 0; k < dim; ++k) {
            th.row(row)[k] = static_cast<float>(th.row(row)[k] - 2 * dot * u.row(r)[k]);
          }
        }
      }
      const OwnedMatrix other = store_dense(th.data, dim, dim, Storage::kF32);
      FloatLayer& layer = layers.emplace_back(load_float_layer(source, i, 1));
      fold_norm_gains(layer, 1);
      for (LinearIndex j : {kWq, kWk, kWv}) transform_rows(layer.linears[j], dense(t), 1, 2);
      transform_columns(layer.linears[kWo], dense(other), 1, 2);
      for (LinearIndex j : {kWGate, kWUp}) transform_rows(layer.linears[j], dense(other), 1, 2);
      transform_columns(layer.linears[kWDown], dense(t), 1, 2);
      skips.push_back({store_dense(u.data, rank, dim, Storage::kF32),
                       store_dense(minus_two_u.data, dim, rank, Storage::kF32)});
    }
    for (size_t i = 0; i < layers.size(); ++i) {
      model.layers[i] = layers[i].view();
      model.layers[i].attn_skip = model.layers[i].ffn_skip = skips[i].view();
    }
  }
  static Transform dense(const OwnedMatrix& m) {
    Transform transform;
    transform.kind = Transform::Kind::kDense;
    transform.size = m.rows;
    transform.matrix = m.view();
    return transform;
  }
  void write(const std::string& path) const {
    TqWriter writer(path);
    writer.add_residual_basis(model.residual_basis);
    writer.add_table(model.tok_embed);
    writer.add_linear("lm_head", model.lm_head, model.config.tied);
    writer.add_f32("final_norm", model.final_norm);
    for (size_t i = 0; i < model.layers.size(); ++i) {
      const std::string prefix = "layers." + std::to_string(i) + ".";
      writer.add_f32(prefix + "attn_norm", model.layers[i].attn_norm);
      writer.add_f32(prefix + "ffn_norm", model.layers[i].ffn_norm);
      for (const NamedLinear& named : kLayerLinears) {
        writer.add_linear(prefix + named.name, model.layers[i].*named.member);
      }
      for (const NamedSkip& named : kLayerSkips) {
        writer.add_skip(prefix + named.name, *(model.layers[i].*named.member));
      }
    }
    writer.finish(model.texts, {{"method", "test"}});
  }

  OwnedMatrix t;
  std::vector<FloatLayer> layers;
  std::vector<OwnedLowRankStep> skips;
  Model model;
};

TEST(RotatedModel, KeepsItsLogitsInADenseBasisWithSkips) {
  for (bool tied : {false, true}) {
    const TinyModel tiny(tied);
    const auto ids = random_ids(24, 96, 17);
    const std::vector<float> expected = all_logits(tiny.model(), ids);
    const SkippingModel rotated(tiny.model(), Storage::kF32);
    EXPECT_LT(relative_error(all_logits(rotated.model, ids), expected), kMaxRotationError);
    TempDir folder;
    rotated.write(folder / "m.tq");
    EXPECT_EQ(all_logits(load_tq_file(folder / "m.tq"), ids), all_logits(rotated.model, ids));
    // In f16 the basis is orthogonal to 2^-10: logits of size 1 move by some 1e-3 on the way into
    // and out of each layer. Its transpose, for example, would move them by 1.
    const SkippingModel half(tiny.model(), Storage::kF16);
    EXPECT_LT(relative_error(all_logits(half.model, ids), expected), 3e-2);
  }
}

TEST(RotatedModel, ASkipIsNeeded) {
  const TinyModel tiny(true);
  const auto ids = random_ids(24, 96, 17);
  const SkippingModel rotated(tiny.model(), Storage::kF32);
  const std::vector<float> expected = all_logits(tiny.model(), ids);
  for (const NamedSkip& named : kLayerSkips) {
    Model broken = rotated.model;
    (broken.layers[1].*named.member).reset();
    EXPECT_GT(relative_error(all_logits(broken, ids), expected), 1e-2) << named.name;
  }
}

TEST(RotatedModel, InspectCountsAndVerifyChecksBasesAndSkips) {
  if (!std::filesystem::exists(TQ_BINARY)) GTEST_SKIP() << TQ_BINARY << " is not built";
  const Model source = load_hf_folder(std::string(TQ_FIXTURES) + "/random-models/llama-gqa-f32");
  const SkippingModel rotated(source, Storage::kF16);
  TempDir folder;
  rotated.write(folder / "m.tq");
  EXPECT_EQ(run_tq(folder, {"verify", folder / "m.tq"}).exit_code, 0);
  const CliResult result = run_tq(folder, {"inspect", folder / "m.tq", "--json"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const Json json = parse_json(result.out, "inspect");
  EXPECT_EQ(json["residual_basis"]["kind"], "dense");
  EXPECT_EQ(json["residual_basis"]["storage"], "f16");
  const int64_t dim = source.config.dim, rank = rotated.skips[0].a.rows;
  const int64_t bytes = 2 * dim * dim + source.config.n_layers * 2 * (2 * rank * dim * 4);
  const Json& linears = json["linears"];
  EXPECT_EQ(linears["basis_bytes"], bytes);
  // The linears themselves are f32.
  const double overhead = 8.0 * static_cast<double>(bytes) / linears["parameters"].get<double>();
  EXPECT_NEAR(linears["bits_per_weight"].get<double>(), 32 + overhead, 1e-9);
  EXPECT_NE(result.out.find("layers.0.attn_skip.a"), std::string::npos);
  EXPECT_NE(run_tq(folder, {"inspect", folder / "m.tq"}).out.find("KB of bases"),
            std::string::npos);
}

TEST(RotatedModel, ADifferentSeedGivesOtherWeightsAndTheSameLogits) {
  const TinyModel tiny(true);
  const auto layer = [&](uint64_t seed) {
    const QuantizeOptions options = rotated_unrounded(seed);
    const ModelBasis basis(options, tiny.model().config);
    return fold_layer(tiny.model(), 0, options, basis);
  };
  EXPECT_NE(layer(1).linears[kWq].data, layer(2).linears[kWq].data);
  EXPECT_NE(layer(1).linears[kWo].data, layer(2).linears[kWo].data);
  EXPECT_LT(rotation_error(tiny.model(), rotated_unrounded(99)), kMaxRotationError);
}

TEST(RotatedModel, AKeptDownProjectionNeedsNoOnlineTransform) {
  const TinyModel tiny(true);
  QuantizeOptions options = rotated_unrounded(1);
  options.keep = {"layers.1.w_down"};
  TempDir folder;
  CpuBackend backend(2);
  quantize_model(tiny.model(), options, nullptr, 0, backend, folder / "m.tq", false, {});
  const Model rotated = load_tq_file(folder / "m.tq");
  EXPECT_TRUE(rotated.layers[0].w_down.input.active());
  EXPECT_FALSE(rotated.layers[1].w_down.input.active());
  const auto ids = random_ids(24, 96, 17);
  // The kept weight is rounded to f16: 2^-12 relative.
  EXPECT_LT(relative_error(all_logits(rotated, ids), all_logits(tiny.model(), ids)), 1e-2);
}

TEST(RotatedModel, RotationFlattensHeavyTails) {
  // What rotations are for: the same 4 bits lose less in the rotated basis.
  const TinyModel tiny(true);
  double snr[2];
  for (int rotated : {0, 1}) {
    QuantizeOptions options = method_preset("rtn");
    options.basis = rotated ? Basis::kHadamard : Basis::kNone;
    options.group = 128;
    const ModelBasis basis(options, tiny.model().config);
    const FloatLayer layer = fold_layer(tiny.model(), 0, options, basis);
    snr[rotated] = quantize_layer(layer, 0, options, tiny.model().config, basis, nullptr, [] {})
                       .reports[kWq]
                       .weight_snr_db;
  }
  EXPECT_GT(snr[1], snr[0]);
}

}  // namespace
}  // namespace tq
