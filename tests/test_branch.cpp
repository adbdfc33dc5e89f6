// What calibration knows of a site, the correction of weights, and branches fitted to an error.
#include <gtest/gtest.h>

#include <cmath>

#include "quant/branch.h"
#include "quant/decompose.h"
#include "quant/learned_basis.h"
#include "quant/product.h"
#include "quant/rng.h"
#include "quant/rounding.h"
#include "tests/orthogonal.h"

namespace tq {
namespace {

constexpr int64_t kTokens = 512, kIn = 96, kOut = 80, kRank = 8;

FloatMatrix random_matrix(int64_t rows, int64_t cols, uint64_t seed, double size = 1) {
  SplitMix64 rng(seed);
  FloatMatrix m{rows, cols, std::vector<float>(static_cast<size_t>(rows * cols))};
  for (float& value : m.data) value = static_cast<float>(size * rng.normal());
  return m;
}

double energy(const FloatMatrix& m) {
  double sum = 0;
  for (float value : m.data) sum += double{value} * double{value};
  return sum;
}

FloatMatrix difference(FloatMatrix a, const FloatMatrix& b) {
  subtract(a, b);
  return a;
}

// Inputs whose energy falls by a factor of 10^4 over the directions, as in trained models.
FloatMatrix correlated_inputs(int64_t rows, uint64_t seed) {
  FloatMatrix z = random_matrix(rows, kIn, seed);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < kIn; ++j) {
      z.row(i)[j] *= static_cast<float>(std::pow(10.0, -2.0 * static_cast<double>(j) / kIn));
    }
  }
  const std::vector<double> mixing = random_orthogonal(kIn, 3);
  return product_nn(z, {kIn, kIn, {mixing.begin(), mixing.end()}}, 1);
}

// A site that saw `x`, under the options of twinquant.
struct SeenSite {
  explicit SeenSite(FloatMatrix inputs, int bits_a = 4)
      : x(std::move(inputs)), stats(x.cols, 64, options_for(bits_a)) {
    // In two calls, as the samples of a text come.
    const int64_t half = x.rows / 2;
    stats.add(x.data.data(), half, 2);
    stats.add(x.row(half), x.rows - half, 2);
    factor = factorize(stats.gram(), 2, "test");
  }
  static QuantizeOptions options_for(int bits_a) {
    QuantizeOptions options = method_preset("twinquant");
    options.bits_a = bits_a;
    return options;
  }
  // What a branch puts out at run time for the rounded inputs.
  FloatMatrix output(const OwnedMatrix& a, const OwnedMatrix& b) const {
    const FloatMatrix h = product_nt(stats.rounded(), to_float_matrix(a.view()), 1);
    ActQuant act = stats.act();
    act.group = b.group;
    act.clip = 1;
    FloatMatrix rounded = h;
    round_tokens(h.data.data(), h.rows, h.cols, act, rounded.data.data(), 1);
    return product_nt(rounded, to_float_matrix(b.view()), 1);
  }
  // Energy of what is missing from the outputs of `error`, relative to them.
  double missing(const FloatMatrix& error, const OwnedMatrix& a, const OwnedMatrix& b) const {
    const FloatMatrix wanted = product_nt(stats.rounded(), error, 1);
    return energy(difference(wanted, output(a, b))) / energy(wanted);
  }

  FloatMatrix x;
  SiteStats stats;
  GptqFactor factor;
};

BranchSpec spec(int bits, int threads = 2) {
  return {kRank, bits, 64, false, threads};
}

// Low rank plus 1 % of noise.
FloatMatrix planted_error() {
  FloatMatrix error = product_nn(random_matrix(kOut, kRank, 5), random_matrix(kRank, kIn, 6), 1);
  add(error, random_matrix(kOut, kIn, 7, 0.1 * std::sqrt(double{kRank})));
  return error;
}

TEST(FitBranch, RecoversAPlantedErrorOfLowRank) {
  const FloatMatrix error = planted_error();
  // A Gaussian group of 64 in 16 levels, step about 2.5 sigma / 7.5, loses step^2 / 12: 1 % of its
  // energy. A, B and the narrow input lose that much each, and the noise is 1 % itself.
  const SeenSite four(correlated_inputs(kTokens, 1), 4);
  const FittedBranch coarse = fit_branch(error, four.stats, four.factor, spec(4));
  EXPECT_LT(four.missing(error, coarse.a, coarse.b), 0.04 + 0.02);
  // In 8 bits only the noise is left, less what of it lies in the branch.
  const SeenSite eight(correlated_inputs(kTokens, 1), 8);
  const FittedBranch fine = fit_branch(error, eight.stats, eight.factor, spec(8));
  EXPECT_LT(eight.missing(error, fine.a, fine.b), 0.012);
}

TEST(FitBranch, BeatsTheSvdOfTheErrorOnCorrelatedInputs) {
  const SeenSite site(correlated_inputs(kTokens, 1));
  const FloatMatrix error = random_matrix(kOut, kIn, 8);  // a flat spectrum: only inputs matter
  const FittedBranch fitted = fit_branch(error, site.stats, site.factor, spec(4));
  const Decomposed svd = decompose(error, kRank, {4, 64});
  EXPECT_LT(site.missing(error, fitted.a, fitted.b), 0.8 * site.missing(error, svd.a, svd.b));
}

TEST(FitBranch, DoesNotDependOnThreads) {
  const SeenSite site(correlated_inputs(kTokens, 1));
  const FloatMatrix error = planted_error();
  const FittedBranch one = fit_branch(error, site.stats, site.factor, spec(4, 1));
  const FittedBranch three = fit_branch(error, site.stats, site.factor, spec(4, 3));
  EXPECT_EQ(one.a.data, three.a.data);
  EXPECT_EQ(one.b.data, three.b.data);
  EXPECT_EQ(one.b.scales, three.b.scales);
  EXPECT_EQ(one.seen.data, three.seen.data);
}

TEST(FitBranch, SeenIsTheBranchAsALinearMapOfTheRoundedInputs) {
  const SeenSite site(correlated_inputs(kTokens, 1));
  const FittedBranch branch = fit_branch(planted_error(), site.stats, site.factor, spec(4));
  const FloatMatrix put_out = site.output(branch.a, branch.b);
  const auto off = [&](const FloatMatrix& w) {
    return energy(difference(put_out, product_nt(site.stats.rounded(), w, 1))) / energy(put_out);
  };
  // Only the noise of the narrow input's rounding, 1 %, is no linear map.
  EXPECT_LT(off(branch.seen), 0.02);
  const FloatMatrix stored =
      product_nn(to_float_matrix(branch.b.view()), to_float_matrix(branch.a.view()), 1);
  EXPECT_LT(off(branch.seen), off(stored));  // least squares drawn towards B A
}

TEST(RoundBranch, IsBetterThanRoundingTheFactorsToNearest) {
  const SeenSite site(correlated_inputs(kTokens, 1));
  const FloatMatrix w = random_matrix(kOut, kIn, 9);
  const LowRank factors = truncated_svd(w, kRank);
  const FloatMatrix product = product_nn(factors.b, factors.a, 1);
  const FittedBranch branch = round_branch(factors, product, site.stats, site.factor, spec(4));
  const OwnedMatrix a = round_matrix(factors.a, {4, 64}, nullptr, 1).matrix;
  const OwnedMatrix b = round_matrix(factors.b, {4, 64}, nullptr, 1).matrix;
  EXPECT_LT(site.missing(product, branch.a, branch.b), site.missing(product, a, b));
}

TEST(RoundBranch, FitsTheSecondFactorToTheTarget) {
  const SeenSite site(correlated_inputs(kTokens, 1));
  LowRank factors = truncated_svd(random_matrix(kOut, kIn, 9), kRank);
  const FloatMatrix product = product_nn(factors.b, factors.a, 1);
  for (float& value : factors.b.data) value *= -1;  // so that what is given misses the target
  const FittedBranch branch = round_branch(factors, product, site.stats, site.factor, spec(4));
  // Three roundings of 1 % each, as above, and damping of 1 % towards the opposite.
  EXPECT_LT(site.missing(product, branch.a, branch.b), 0.05);
}

TEST(BalanceBranch, KeepsTheProduct) {
  LowRank factors = truncated_svd(random_matrix(kOut, kIn, 9), kRank);
  const FloatMatrix before = product_nn(factors.b, factors.a, 1);
  const LowRank old = factors;
  const FloatMatrix x = correlated_inputs(kTokens, 1);
  const FloatMatrix h = product_nt(x, factors.a, 1);
  balance_branch(factors, to_double(product_tn(h, h, 1)) / double{kTokens}, 1);
  EXPECT_NE(factors.a.data, old.a.data);
  // G has a condition of at most 1000, and both factors are rounded to 2^-24.
  const FloatMatrix after = product_nn(factors.b, factors.a, 1);
  EXPECT_LT(std::sqrt(energy(difference(before, after)) / energy(before)), 2 * 1000 * 0x1.0p-24);
}

TEST(CorrectWeights, LowersTheErrorOfTheOutputs) {
  for (int bits : {3, 4, 8}) {
    const SeenSite site(correlated_inputs(kTokens, 1), bits);
    const FloatMatrix w = random_matrix(kOut, kIn, 10);
    const FloatMatrix corrected = correct_weights(w, site.stats, site.factor, 2);
    const FloatMatrix wanted = product_nt(site.x, w, 1);
    const auto error = [&](const FloatMatrix& used) {
      return energy(difference(wanted, product_nt(site.stats.rounded(), used, 1)));
    };
    EXPECT_LT(error(corrected), error(w)) << bits;
  }
}

TEST(CorrectWeights, SolvesTheNormalEquations) {
  const SeenSite site(correlated_inputs(kTokens, 1));
  const FloatMatrix w = random_matrix(kOut, kIn, 10);
  const FloatMatrix corrected = correct_weights(w, site.stats, site.factor, 2);
  // (X W^T - X' W'^T)^T X' = damping (W' - W)
  const FloatMatrix error =
      difference(product_nt(site.x, w, 1), product_nt(site.stats.rounded(), corrected, 1));
  const FloatMatrix gradient = product_tn(error, site.stats.rounded(), 1);
  FloatMatrix pull = difference(corrected, w);
  for (float& value : pull.data) value *= static_cast<float>(site.factor.damping);
  // Sums of 512 f32 products whose terms are as large as those of (X W^T)^T X', and a factor whose
  // condition is at most trace / damping = 100 * 96: in practice far less.
  const FloatMatrix terms = product_tn(product_nt(site.x, w, 1), site.stats.rounded(), 1);
  EXPECT_LT(std::sqrt(energy(difference(gradient, pull))),
            512 * 0x1.0p-24 * std::sqrt(energy(terms)));
  EXPECT_GT(std::sqrt(energy(pull)), 0);
}

TEST(CorrectWeights, ChangesNothingWhereInputsAreNotRounded) {
  // Integers, and the lowest code -8 belongs to an 8 in every group of every token: exact.
  SplitMix64 rng(11);
  FloatMatrix x{kTokens, kIn, std::vector<float>(static_cast<size_t>(kTokens * kIn))};
  for (int64_t i = 0; i < x.size(); ++i) {
    const int64_t column = i % kIn % 64;
    x.data[static_cast<size_t>(i)] =
        column == 0 ? 8.0f : static_cast<float>(static_cast<int64_t>(rng.next() % 15) - 7);
  }
  const SeenSite site(x);
  EXPECT_EQ(site.stats.act().clip, 1.0f);
  EXPECT_EQ(site.stats.rounded().data, site.x.data);
  const FloatMatrix w = random_matrix(kOut, kIn, 10);
  EXPECT_EQ(correct_weights(w, site.stats, site.factor, 2).data, w.data);
}

TEST(SolveRight, Inverts) {
  const SeenSite site(correlated_inputs(kTokens, 1));
  const FloatMatrix m = random_matrix(kOut, kIn, 12);
  const FloatMatrix solved = solve_right(m, site.factor, 2);
  MatrixRM h(kIn, kIn);
  for (int64_t i = 0; i < kIn; ++i) {
    for (int64_t j = 0; j < kIn; ++j) {
      h(i, j) = site.stats.gram().at(i, j) + (i == j ? site.factor.damping : 0);
    }
  }
  const MatrixRM back = to_double(solved) * h;
  // The condition of the damped H is below trace / damping = 100 n; U holds 2^-24 of each entry.
  EXPECT_LT((back - to_double(m)).norm() / to_double(m).norm(), 100 * kIn * 0x1.0p-24);
}

TEST(SearchClip, NeverIncreasesTheErrorAndClipsNormalInputs) {
  const auto error = [](const FloatMatrix& x, const ActQuant& act) {
    FloatMatrix rounded = x;
    round_tokens(x.data.data(), x.rows, x.cols, act, rounded.data.data(), 1);
    return energy(difference(x, rounded));
  };
  for (ActCodes codes : {ActCodes::kSymmetric, ActCodes::kAll, ActCodes::kAsymmetric}) {
    for (int bits : {3, 4}) {
      for (uint64_t seed : {1u, 2u, 3u}) {
        FloatMatrix x = random_matrix(40, 128, seed);
        for (int64_t i = 0; seed > 1 && i < x.size(); i += 37) {
          x.data[static_cast<size_t>(i)] *= seed == 2 ? 4.0f : 0.1f;
        }
        ActQuant act{bits, 64, 1.0f, codes};
        const double before = error(x, act);
        act.clip = search_clip(x.data.data(), x.rows, x.cols, act, 2);
        EXPECT_LE(error(x, act), before);
        if (seed == 1) {
          EXPECT_LT(act.clip, 1.0f) << bits << static_cast<int>(codes);
        }
      }
    }
  }
}

}  // namespace
}  // namespace tq
