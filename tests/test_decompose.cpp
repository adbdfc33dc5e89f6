// The low-rank branch: near-optimal, monotone in its rank, and exact together with its residual.
#include <gtest/gtest.h>

#include <cmath>

#include "quant/decompose.h"
#include "quant/distortion.h"
#include "quant/eigen.h"
#include "quant/quantize_layer.h"
#include "quant/rng.h"
#include "quant/rounding.h"
#include "tests/tiny_model.h"

namespace tq {
namespace {

FloatMatrix random_matrix(int64_t rows, int64_t cols, uint64_t seed) {
  SplitMix64 rng(seed);
  FloatMatrix w{rows, cols, std::vector<float>(static_cast<size_t>(rows * cols))};
  for (float& value : w.data) value = static_cast<float>(rng.normal());
  return w;
}

double energy(const FloatMatrix& w) {
  double total = 0;
  for (float value : w.data) total += double{value} * value;
  return total;
}

TEST(TruncatedSvd, RecoversAMatrixOfLowRank) {
  const FloatMatrix b = random_matrix(70, 5, 1), a = random_matrix(5, 90, 2);
  FloatMatrix zero{70, 90, std::vector<float>(70 * 90)};
  FloatMatrix w = subtract_product(zero, b, a);  // -b a
  const LowRank factors = truncated_svd(w, 5);
  // Factors are stored in f32: relative error of a product about 2^-23.
  EXPECT_LT(energy(subtract_product(w, factors.b, factors.a)), 1e-12 * energy(w));
}

TEST(TruncatedSvd, IsCloseToTheOptimumOnAFlatSpectrum) {
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{96, 160}, {160, 96}}) {
    const FloatMatrix w = random_matrix(rows, cols, 3);
    MatrixRM m(rows, cols);
    for (int64_t i = 0; i < m.size(); ++i) m.data()[i] = w.data[static_cast<size_t>(i)];
    const Eigen::VectorXd s = Eigen::BDCSVD<Eigen::MatrixXd>(m).singularValues();
    const double optimum = s.tail(s.size() - 16).squaredNorm();
    const LowRank factors = truncated_svd(w, 16);
    const double error = energy(subtract_product(w, factors.b, factors.a));
    EXPECT_GE(error, optimum * (1 - 1e-6));
    EXPECT_LT(error, optimum * 1.002);  // normal noise has the flattest spectrum we meet
  }
}

TEST(TruncatedSvd, SplitsTheEnergyEvenly) {
  const LowRank factors = truncated_svd(random_matrix(40, 60, 4), 8);
  EXPECT_NEAR(energy(factors.a), energy(factors.b), 1e-5 * energy(factors.a));
}

TEST(TruncatedSvd, FullRankReproducesTheMatrix) {
  const FloatMatrix w = random_matrix(24, 17, 5);
  const LowRank factors = truncated_svd(w, 17);
  EXPECT_LT(energy(subtract_product(w, factors.b, factors.a)), 1e-11 * energy(w));
}

TEST(Decompose, ResidualCompletesTheStoredFactors) {
  const FloatMatrix w = random_matrix(48, 64, 6);
  for (int bits : {16, 8, 4}) {
    const Decomposed split = decompose(w, 8, {bits, 32});
    EXPECT_EQ(split.a.view().packed(), bits != 16);
    const FloatMatrix rest = subtract_product(split.residual, to_float_matrix(split.b.view()),
                                              to_float_matrix(split.a.view()));
    // residual - b a = w - 2 b a: so add the product back twice through the original.
    double worst = 0;
    for (size_t i = 0; i < w.data.size(); ++i) {
      const double product = double{split.residual.data[i]} - rest.data[i];
      worst = std::max(worst, std::fabs(split.residual.data[i] + product - w.data[i]));
    }
    EXPECT_LT(worst, 4e-6) << bits;  // a few roundings of values up to 8: 8 * 2^-23 each
  }
}

TEST(Decompose, ErrorFallsWithTheRank) {
  const TinyModel tiny(true);
  QuantizeOptions options = method_preset("svdquant");
  double last = 0;
  for (int64_t rank : {0, 4, 16, 64}) {
    options.rank = rank;
    const ModelBasis basis(options, tiny.model().config);
    const FloatLayer layer = fold_layer(tiny.model(), 0, options, basis);
    const QuantizedLayer result =
        quantize_layer(layer, 0, options, tiny.model().config, basis, nullptr, [] {});
    for (const OwnedLinear& linear : result.layer.linears) {
      EXPECT_EQ(linear.branch_a.has_value(), rank > 0);
    }
    EXPECT_GT(result.reports[kWq].weight_snr_db, last) << rank;
    last = result.reports[kWq].weight_snr_db;
  }
}

TEST(Decompose, ReportCountsTheBranch) {
  const TinyModel tiny(true);
  QuantizeOptions options = method_preset("svdquant");
  options.rank = 8;
  const ModelBasis basis(options, tiny.model().config);
  const FloatLayer layer = fold_layer(tiny.model(), 0, options, basis);
  const LinearReport report =
      quantize_layer(layer, 0, options, tiny.model().config, basis, nullptr, [] {}).reports[kWGate];
  // [256, 128]: 4.25 bits, and 8 * (128 + 256) factors of 16 bits over 256 * 128 weights.
  EXPECT_DOUBLE_EQ(report.bits_per_weight, 4.25 + 8.0 * 384 * 16 / (256 * 128));
}

}  // namespace
}  // namespace tq
