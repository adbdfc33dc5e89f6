// Learning of bases: gradients of the layer-output loss, and a descent that stays orthogonal.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "cpu/cpu_backend.h"
#include "quant/gl.h"
#include "quant/learn.h"
#include "quant/objective.h"
#include "quant/rng.h"
#include "quant/stiefel.h"
#include "tests/logits.h"
#include "tests/orthogonal.h"
#include "tests/tiny_model.h"

namespace tq {
namespace {

QuantizeOptions learning_options(const std::string& method) {
  QuantizeOptions options = method_preset(method);
  options.bits_a = 4;
  options.group = options.group_a = 32;
  options.rank = std::min<int64_t>(options.rank, 16);
  options.threads = 2;
  return options;
}

struct Learning {
  Learning(const Model& model, const QuantizeOptions& options)
      : model(model), options(options), basis(options, model.config), backend(2) {
    calibration = cut_samples(random_ids(768, 96, 4), 8, 96, 96, "test");
    bank.emplace(model, calibration, basis.down(), backend, 2, [](int64_t) {});
  }
  LearnResult run() {
    return learn_basis({model, calibration, &*bank, basis.down()}, options,
                       {[](int64_t, int64_t, double) {}, [] {}});
  }

  const Model& model;
  QuantizeOptions options;
  ModelBasis basis;
  CpuBackend backend;
  Calibration calibration;
  std::optional<InputBank> bank;
};

double mean(const std::vector<double>& values, size_t begin, size_t end) {
  double sum = 0;
  for (size_t i = begin; i < end; ++i) sum += values[i];
  return sum / static_cast<double>(end - begin);
}

TEST(Learn, TheLossFallsAndBasesStayOrthogonal) {
  const TinyModel tiny(true);
  for (const char* method : {"spinquant", "respinquant", "twinquant"}) {
    QuantizeOptions options = learning_options(method);
    options.split = Split::kSvd;
    options.steps = 40;
    Learning learning(tiny.model(), options);
    const LearnResult result = learning.run();
    ASSERT_EQ(result.losses.size(), 40u);
    EXPECT_LT(mean(result.losses, 35, 40), 0.95 * mean(result.losses, 0, 5)) << method;
    EXPECT_LT(result.orthogonality_error, 1e-9) << method;
    EXPECT_EQ(result.basis.residual.size(), options.basis == Basis::kLayerwise ? 7u : 1u);
    EXPECT_EQ(result.basis.heads.size(), 3u);
    for (const MatrixRM& m : result.basis.residual) EXPECT_LT(orthogonality_error(m), 1e-9);
    for (const MatrixRM& m : result.basis.heads) EXPECT_LT(orthogonality_error(m), 1e-9);
    EXPECT_EQ(result.basis.branches.size(), options.rank > 0 ? 3u : 0u);
  }
}

TEST(Learn, LossesOfBlocksAndOfPredictionsFallToo) {
  const TinyModel tiny(true);
  for (const LearningLoss loss :
       {LearningLoss::kBlock, LearningLoss::kKl, LearningLoss::kCrossEntropy}) {
    QuantizeOptions options = learning_options("spinquant");
    options.loss = loss;
    options.steps = 80;
    Learning learning(tiny.model(), options);
    const LearnResult result = learning.run();
    // Most of the cross entropy of random text is there without any rounding.
    const double share = loss == LearningLoss::kCrossEntropy ? 0.99 : 0.97;
    EXPECT_LT(mean(result.losses, 60, 80), share * mean(result.losses, 0, 20));
    EXPECT_LT(result.orthogonality_error, 1e-9);
    options.steps = 3;
    Learning two_threads(tiny.model(), options);
    options.threads = 1;
    Learning one_thread(tiny.model(), options);
    EXPECT_EQ(one_thread.run().losses, two_threads.run().losses);
  }
}

// G moves the factors of a branch and leaves their product alone.
TEST(Learn, BranchesKeepTheirProduct) {
  const TinyModel tiny(true);
  QuantizeOptions options = learning_options("twinquant");
  options.split = Split::kSvd;
  options.steps = 1;
  Learning first(tiny.model(), options);
  const LearnResult one = first.run();
  options.steps = 12;
  Learning second(tiny.model(), options);
  const LearnResult twelve = second.run();
  for (size_t layer = 0; layer < 3; ++layer) {
    for (size_t i = 0; i < kNLinears; ++i) {
      const LowRank &a = one.basis.branches[layer][i], &b = twelve.basis.branches[layer][i];
      EXPECT_NE(a.a.data, b.a.data);
      const MatrixRM before = to_double(a.b) * to_double(a.a);
      const MatrixRM after = to_double(b.b) * to_double(b.a);
      // 12 steps round factors to f32, whose product cancels by a condition of at most 1000.
      EXPECT_LT((after - before).norm(), 12 * 1000 * 0x1.0p-24 * before.norm());
    }
  }
}

// Weights are rounded with a clip of 0.95 (objective.cpp). In a group of one column every weight is
// the largest of its group, so rounding multiplies it by that, in the value and in the gradient.
constexpr double kClip = 0.95;

// One layer whose low-rank component is given, and whose outputs are to come close to those of
// other weights: with groups of one column the loss is a smooth function of bases and factors.
struct Planted {
  explicit Planted(const Model& model)
      : learning(model, learning_options("spinquant")),
        context(model.config, learning.basis.down()) {
    const Config& c = model.config;
    options = learning.options;
    options.bits_a = 16;
    options.group = 1;
    layer = load_float_layer(model, 1, 1);
    fold_norm_gains(layer, 1);
    transform_rows(layer.linears[kWDown], learning.basis.down(), 1, 1);
    std::vector<int64_t> tokens;
    for (int64_t i = 0; i < 64; ++i) tokens.push_back(7 * i);
    for (size_t site = 0; site < 4; ++site) {
      problem.inputs[site] = learning.bank->gather(1, static_cast<Site>(site), tokens);
    }
    problem.layer = &layer;
    const int64_t sizes[4] = {c.dim, c.dim, c.dim, c.head_dim};
    for (size_t i = 0; i < 4; ++i) {
      const std::vector<double> values = random_orthogonal(sizes[i], 20 + i);
      bases[i] = {sizes[i], sizes[i], {values.begin(), values.end()}};
    }
    SplitMix64 rng(5);
    for (size_t i = 0; i < kNLinears; ++i) {
      const FloatMatrix& w = layer.linears[i];
      const double size = 1 / std::sqrt(static_cast<double>(w.cols));
      const auto random = [&](int64_t rows, int64_t cols, double scale) {
        FloatMatrix m{rows, cols, std::vector<float>(static_cast<size_t>(rows * cols))};
        for (float& value : m.data) value = static_cast<float>(scale * rng.normal());
        return m;
      };
      factors[i] = {random(kRank, w.cols, std::sqrt(size)), random(w.rows, kRank, std::sqrt(size))};
      originals[i] = random(w.rows, w.cols, size);
      for (size_t j = 0; j < w.data.size(); ++j) originals[i].data[j] += w.data[j];
      problem.originals[i] = &originals[i];
    }
  }
  // The loss; `gradients` of the four bases, then of A and B of each linear.
  double run(std::vector<std::vector<float>>& gradients) {
    gradients.clear();
    for (FloatMatrix* m : operands()) gradients.emplace_back(m->data.size());
    BasisLeaf* leaves[4] = {&problem.bases.in, &problem.bases.mid, &problem.bases.out,
                            &problem.bases.heads};
    for (size_t i = 0; i < 4; ++i) *leaves[i] = {&bases[i], gradients[i].data()};
    for (size_t i = 0; i < kNLinears; ++i) {
      problem.branches[i] = {&factors[i], gradients[4 + 2 * i].data(), gradients[5 + 2 * i].data()};
    }
    return layer_loss(problem, context, options);
  }
  std::vector<FloatMatrix*> operands() {
    std::vector<FloatMatrix*> all;
    for (FloatMatrix& basis : bases) all.push_back(&basis);
    for (LowRank& branch : factors) {
      all.push_back(&branch.a);
      all.push_back(&branch.b);
    }
    return all;
  }
  // The same in f64, operand `moved` displaced by t * direction.
  double smooth_loss(size_t moved, const MatrixRM& direction, double t) {
    std::vector<MatrixRM> m;
    for (FloatMatrix* operand : operands()) m.push_back(to_double(*operand));
    m[moved] += t * direction;
    const auto blocks = [](const MatrixRM& head, int64_t n) {
      MatrixRM diagonal = MatrixRM::Zero(n, n);
      for (int64_t i = 0; i < n; i += head.rows()) {
        diagonal.block(i, i, head.rows(), head.rows()) = head;
      }
      return diagonal;
    };
    double loss = 0;
    for (size_t i = 0; i < kNLinears; ++i) {
      const MatrixRM w = to_double(layer.linears[i]), a = m[4 + 2 * i], b = m[5 + 2 * i];
      const MatrixRM x = to_double(problem.inputs[static_cast<size_t>(kSiteOf[i])]);
      const MatrixRM original = to_double(originals[i]);
      const bool reads_in = i == kWq || i == kWk || i == kWv, reads_mid = i == kWGate || i == kWUp;
      const MatrixRM read = reads_in    ? m[0]
                            : reads_mid ? m[1]
                            : i == kWo  ? blocks(m[3], w.cols())
                                        : MatrixRM::Identity(w.cols(), w.cols());
      const MatrixRM write = i == kWv      ? blocks(m[3], w.rows())
                             : i == kWo    ? m[1]
                             : i == kWDown ? m[2]
                                           : MatrixRM::Identity(w.rows(), w.rows());
      const MatrixRM target = x * original.transpose();
      const MatrixRM rest = (x * read) * (write.transpose() * w * read).transpose();
      const MatrixRM branch =
          (x * read) * (a * read).transpose() * (write.transpose() * b).transpose();
      loss += ((kClip * rest + kClip * kClip * branch) * write.transpose() - target).squaredNorm() /
              target.squaredNorm() / int{kNLinears};
    }
    return loss;
  }

  static constexpr int64_t kRank = 8;
  Learning learning;
  LayerContext context;
  QuantizeOptions options;
  FloatLayer layer;
  LayerProblem problem;
  FloatMatrix bases[4];
  std::array<LowRank, kNLinears> factors;
  std::array<FloatMatrix, kNLinears> originals;
};

// Central differences of an f32 loss along its gradient, for each of four bases.
void check_slopes(FloatMatrix (&bases)[4], BasisLeaf* (&leaves)[4],
                  std::vector<std::vector<float>>& gradients, const std::function<double()>& loss) {
  const auto run = [&] {
    for (size_t i = 0; i < 4; ++i) {
      gradients[i].assign(bases[i].data.size(), 0.0f);
      *leaves[i] = {&bases[i], gradients[i].data()};
    }
    return loss();
  };
  const double at_rest = run();
  ASSERT_GT(at_rest, 0);
  const std::vector<std::vector<float>> expected = gradients;
  for (size_t i = 0; i < 4; ++i) {
    const FloatMatrix start = bases[i];
    double norm = 0;
    for (float g : expected[i]) norm += double{g} * double{g};
    norm = std::sqrt(norm);
    ASSERT_GT(norm, 0) << i;
    const double t = 0.0003;
    double ends[2];
    for (int side = 0; side < 2; ++side) {
      for (size_t j = 0; j < start.data.size(); ++j) {
        const double step = (side ? t : -t) * double{expected[i][j]} / norm;
        bases[i].data[j] = static_cast<float>(double{start.data[j]} + step);
      }
      ends[side] = run();
    }
    bases[i] = start;
    // A percent for higher derivatives, and a loss that is wrong by some hundred eps.
    EXPECT_NEAR((ends[1] - ends[0]) / (2 * t), norm, 0.01 * norm + 200 * 0x1.0p-24 * at_rest / t)
        << "basis " << i;
  }
}

TEST(LayerLoss, GradientsAreThoseOfASmoothLoss) {
  const TinyModel tiny(true);
  Planted planted(tiny.model());
  std::vector<std::vector<float>> gradients;
  const double loss = planted.run(gradients);
  // Six f32 products in a row, of 256 terms at most.
  constexpr double kRelative = 6 * 256 * 0x1.0p-24;
  const std::vector<FloatMatrix*> operands = planted.operands();
  EXPECT_NEAR(loss, planted.smooth_loss(0, MatrixRM::Zero(128, 128), 0), kRelative * loss);
  SplitMix64 rng(6);
  for (size_t i = 0; i < operands.size(); ++i) {
    const MatrixRM gradient = to_double({operands[i]->rows, operands[i]->cols, gradients[i]});
    MatrixRM random(gradient.rows(), gradient.cols());
    for (int64_t j = 0; j < random.size(); ++j) random.data()[j] = rng.normal();
    const double norm = gradient.norm();
    ASSERT_GT(norm, 0) << i;
    for (const MatrixRM& direction : {MatrixRM(gradient / norm), MatrixRM(random.normalized())}) {
      // The loss is a polynomial of low degree: central differences are exact to some 1e-9.
      const double t = 1e-4, slope = (planted.smooth_loss(i, direction, t) -
                                      planted.smooth_loss(i, direction, -t)) /
                                     (2 * t);
      const double got = gradient.cwiseProduct(direction).sum();
      EXPECT_NEAR(got, slope, kRelative * norm) << "operand " << i;
    }
  }
}

// With groups of one column and inputs unrounded the losses are smooth; differences of f32 losses.
TEST(BlockLoss, GradientsAreSlopes) {
  const TinyModel tiny(true);
  Planted planted(tiny.model());
  std::vector<std::vector<float>> gradients(4);
  BasisLeaf* leaves[4] = {&planted.problem.bases.in, &planted.problem.bases.mid,
                          &planted.problem.bases.out, &planted.problem.bases.heads};
  for (size_t site = 0; site < 4; ++site) {  // neighbours: one sample of the bank
    std::vector<int64_t> tokens(96);
    std::iota(tokens.begin(), tokens.end(), 96);
    planted.problem.inputs[site] =
        planted.learning.bank->gather(1, static_cast<Site>(site), tokens);
  }
  planted.problem.originals = {};
  check_slopes(planted.bases, leaves, gradients,
               [&] { return block_loss(planted.problem, planted.context, planted.options); });
}

// The whole model with one sample.
struct PredictionCase {
  PredictionCase(const Planted& planted, const Model& model)
      : head(to_float_matrix(model.lm_head.weight)) {
    for (int64_t row = 0; row < head.rows; ++row) {
      for (int64_t i = 0; i < head.cols; ++i) {
        head.row(row)[i] *= model.final_norm[static_cast<size_t>(i)];
      }
    }
    problem.tokens = planted.learning.calibration.samples[1];
    problem.tok_embed = &model.tok_embed;
    problem.head = &head;
    problem.n_layers = model.config.n_layers;
    problem.layer = [this, &planted, &model](int64_t index) -> const FloatLayer& {
      loaded = load_float_layer(model, index, 1);
      fold_norm_gains(loaded, 1);
      transform_rows(loaded.linears[kWDown], planted.learning.basis.down(), 1, 1);
      return loaded;
    };
  }
  PredictionCase(const PredictionCase&) = delete;
  FloatMatrix head;
  FloatLayer loaded;
  PredictionProblem problem;
};

TEST(PredictionLoss, GradientsAreSlopes) {
  const TinyModel tiny(true);
  Planted planted(tiny.model());
  std::vector<std::vector<float>> gradients(4);
  LayerBases bases;
  BasisLeaf* leaves[4] = {&bases.in, &bases.mid, &bases.out, &bases.heads};
  const PredictionCase given(planted, tiny.model());
  PredictionProblem problem = given.problem;
  for (const LearningLoss loss : {LearningLoss::kKl, LearningLoss::kCrossEntropy}) {
    planted.options.loss = loss;
    check_slopes(planted.bases, leaves, gradients, [&] {
      problem.bases.assign(static_cast<size_t>(problem.n_layers), bases);
      return prediction_loss(problem, planted.context, planted.options);
    });
  }
}

// With groups of one column rounding multiplies every weight by kClip, in any basis: the runtime
// can do that too.
TEST(PredictionLoss, CrossEntropyIsThatOfTheNextTokens) {
  const TinyModel tiny(true);
  Planted planted(tiny.model());
  const PredictionCase given(planted, tiny.model());
  PredictionProblem problem = given.problem;
  std::vector<std::vector<float>> gradients;
  for (const FloatMatrix& basis : planted.bases) gradients.emplace_back(basis.data.size());
  const auto leaf = [&](size_t i) { return BasisLeaf{&planted.bases[i], gradients[i].data()}; };
  problem.bases.assign(static_cast<size_t>(problem.n_layers), {leaf(0), leaf(0), leaf(0), leaf(3)});
  planted.options.loss = LearningLoss::kCrossEntropy;
  const double loss = prediction_loss(problem, planted.context, planted.options);

  Model scaled = tiny.model();
  std::vector<FloatLayer> layers;
  for (int64_t i = 0; i < problem.n_layers; ++i) {
    layers.push_back(load_float_layer(tiny.model(), i, 1));
    for (FloatMatrix& w : layers.back().linears) {
      for (float& value : w.data) value *= static_cast<float>(kClip);
    }
  }
  for (size_t i = 0; i < layers.size(); ++i) scaled.layers[i] = layers[i].view();
  const std::vector<int32_t> ids(problem.tokens.begin(), problem.tokens.end());
  const std::vector<float> logits = all_logits(scaled, ids);
  const size_t vocab = static_cast<size_t>(scaled.config.vocab_size), n = ids.size() - 1;
  double expected = 0;
  for (size_t row = 0; row < n; ++row) {
    double sum = 0;
    for (size_t i = 0; i < vocab; ++i) sum += std::exp(double{logits[row * vocab + i]});
    const size_t next = static_cast<size_t>(ids[row + 1]);
    expected += (std::log(sum) - double{logits[row * vocab + next]}) / static_cast<double>(n);
  }
  // Some twenty products in a row, of 256 terms at most, in f32.
  EXPECT_NEAR(loss, expected, 20 * 256 * 0x1.0p-24 * expected);
}

// Without rounding, A <- G A and B <- B G^-1 change nothing: Z measures rounding alone.
TEST(LayerLoss, TheGaugeGradientComesFromRoundingOnly) {
  const TinyModel tiny(true);
  Planted planted(tiny.model());
  std::vector<std::vector<float>> gradients;
  const auto relative_z = [&](int64_t group) {
    planted.options.group = group;
    planted.run(gradients);
    double smallest = 1, largest = 0;
    for (size_t i = 0; i < kNLinears; ++i) {
      const LowRank& branch = planted.factors[i];
      const MatrixRM a = to_double(branch.a), b = to_double(branch.b);
      const MatrixRM g_a = to_double({branch.a.rows, branch.a.cols, gradients[4 + 2 * i]});
      const MatrixRM g_b = to_double({branch.b.rows, branch.b.cols, gradients[5 + 2 * i]});
      // Relative to the two terms whose difference it is.
      const double terms = (g_a * a.transpose()).norm() + (b.transpose() * g_b).norm();
      const double z = gauge_gradient(g_a, a, b, g_b).norm() / terms;
      smallest = std::min(smallest, z);
      largest = std::max(largest, z);
    }
    return std::pair(smallest, largest);
  };
  EXPECT_LT(relative_z(1).second, 6 * 256 * 0x1.0p-24);  // as above
  EXPECT_GT(relative_z(64).first, 0.01);
}

}  // namespace
}  // namespace tq
