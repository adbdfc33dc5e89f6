// Low-rank rotations: orthogonal for every rank, and as good as the dropped angles say.
#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <vector>

#include "quant/rng.h"
#include "quant/stiefel.h"
#include "quant/subspace_rotation.h"

namespace tq {
namespace {

// Sums of 24 products of numbers below 1, an eigenbasis and an SVD: a few hundred 2^-53.
constexpr double kExact = 1e-12;
constexpr double kPi = std::numbers::pi;

MatrixRM random_orthogonal(int64_t n, uint64_t seed) {
  SplitMix64 rng(seed);
  MatrixRM m(n, n);
  for (int64_t i = 0; i < m.size(); ++i) m.data()[i] = rng.normal();
  return orthonormalise(m);
}

// basis (plane rotations by the angles, then the signs on the diagonal) basis^T.
MatrixRM with_angles(const MatrixRM& basis, const std::vector<double>& angles,
                     const std::vector<double>& signs = {}) {
  MatrixRM block = MatrixRM::Identity(basis.rows(), basis.rows());
  int64_t i = 0;
  for (double angle : angles) {
    block(i, i) = block(i + 1, i + 1) = std::cos(angle);
    block(i, i + 1) = -std::sin(angle);
    block(i + 1, i) = std::sin(angle);
    i += 2;
  }
  for (double sign : signs) block(i, i) = sign, ++i;
  return basis * block * basis.transpose();
}

double dropped(const std::vector<double>& angles, int64_t kept) {
  double sum = 0;
  for (size_t i = static_cast<size_t>(kept); i < angles.size(); ++i) {
    sum += 8 * std::pow(std::sin(angles[i] / 2), 2);
  }
  return sum;
}

struct Case {
  std::vector<double> angles;  // falling
  std::vector<double> signs;
};
// Distinct; tiny; all equal; equal in groups and nearly equal; near pi; reflections of each parity.
const Case kCases[] = {
    {{3, 2.5, 2, 1.5, 1, 0.5, 0.4, 0.3, 0.2, 0.1}, {1, 1}},
    {{1e-2, 1e-3, 1e-4, 1e-5}, {}},
    {{1, 1, 1, 1, 1, 1}, {}},
    {{2, 2, 2, 1 + 1e-11, 1, 1, 0.5, 0.5}, {}},
    {{kPi - 1e-5, kPi - 1e-7, 1, 0.5}, {}},
    {{kPi / 2, kPi / 2, kPi / 2}, {}},
    {{2, 1}, {-1}},
    {{2, 1, 0.5}, {-1, -1, -1, 1}},
    {{2, 1, 0.5}, {-1, -1}},
};

TEST(SubspaceRotation, IsOrthogonalForEveryRankAndKeepsTheDeterminant) {
  for (const Case& c : kCases) {
    const int64_t n = static_cast<int64_t>(2 * c.angles.size() + c.signs.size());
    const MatrixRM t = with_angles(random_orthogonal(n, 1), c.angles, c.signs);
    for (int64_t r = 1; r <= n; ++r) {
      const SubspaceRotation rotation = low_rank_rotation(t, r);
      EXPECT_EQ(rotation.u.cols(), r);
      EXPECT_LT(orthogonality_error(rotation.u), kExact);
      EXPECT_LT(orthogonality_error(rotation.dense()), kExact) << r;
      EXPECT_NEAR(rotation.dense().determinant(), t.determinant(), 1e-10) << r;
    }
  }
}

TEST(SubspaceRotation, FullRankIsExactAndRankZeroIsTheIdentity) {
  for (const Case& c : kCases) {
    const int64_t n = static_cast<int64_t>(2 * c.angles.size() + c.signs.size());
    const MatrixRM t = with_angles(random_orthogonal(n, 2), c.angles, c.signs);
    EXPECT_LT((low_rank_rotation(t, n).dense() - t).cwiseAbs().maxCoeff(), kExact);
    EXPECT_EQ(low_rank_rotation(t, 0).dense(), MatrixRM(MatrixRM::Identity(n, n)));
  }
}

TEST(SubspaceRotation, ErrorIsTheSumOverTheDroppedPlanes) {
  for (const Case& c : kCases) {
    if (!c.signs.empty() && c.signs[0] < 0) continue;
    const int64_t n = static_cast<int64_t>(2 * c.angles.size() + c.signs.size());
    const MatrixRM t = with_angles(random_orthogonal(n, 3), c.angles, c.signs);
    for (int64_t planes = 0; planes <= static_cast<int64_t>(c.angles.size()); ++planes) {
      const double error = (low_rank_rotation(t, 2 * planes).dense() - t).squaredNorm();
      // Angles are found to 1e-8 where they nearly agree (1e-11 apart) or are near pi.
      EXPECT_NEAR(error, dropped(c.angles, planes), 1e-9) << planes;
    }
  }
}

TEST(SubspaceRotation, OddRanksGainNothingOverTheEvenRankBelow) {
  const std::vector<double> angles = {2.5, 1.2, 0.5};
  const MatrixRM t = with_angles(random_orthogonal(6, 4), angles);
  for (int64_t r : {1, 3, 5}) {
    EXPECT_NEAR((low_rank_rotation(t, r).dense() - t).squaredNorm(), dropped(angles, r / 2), 1e-9);
  }
}

TEST(SubspaceRotation, PairsOfReflectionsArePlanesAndAnOddOneComesAlong) {
  // Angles 2, 1, 0.5 and three reflections: rank 3 turns the reflections, rank 5 the first plane.
  const MatrixRM t = with_angles(random_orthogonal(10, 5), {2, 1, 0.5}, {-1, -1, -1, 1});
  EXPECT_NEAR((low_rank_rotation(t, 3).dense() - t).squaredNorm(), dropped({2, 1, 0.5}, 0), 1e-9);
  EXPECT_NEAR((low_rank_rotation(t, 5).dense() - t).squaredNorm(), dropped({2, 1, 0.5}, 1), 1e-9);
}

TEST(SubspaceRotation, NoOtherPlanesAreBetter) {
  const MatrixRM t = with_angles(random_orthogonal(12, 6), {2, 1.5, 1, 0.6, 0.3, 0.1});
  const double best = (low_rank_rotation(t, 4).dense() - t).squaredNorm();
  for (uint64_t seed = 0; seed < 50; ++seed) {
    // Another subspace with its best orthogonal R.
    const MatrixRM u = random_orthogonal(12, 100 + seed).leftCols(4);
    const MatrixRM r = nearest_orthogonal(u.transpose() * t * u);
    const SubspaceRotation other{u, r - MatrixRM::Identity(4, 4)};
    EXPECT_GT((other.dense() - t).squaredNorm(), best);
  }
}

TEST(SubspaceRotation, WeightsPreferThePlanesThatCarryEnergy) {
  // The small angle carries a hundred times the energy: it is kept first.
  const MatrixRM basis = random_orthogonal(6, 7);
  const MatrixRM t = with_angles(basis, {1, 0.5, 0.2});
  Eigen::VectorXd energy(6);
  energy << 1, 1, 1, 1, 100, 100;
  const MatrixRM moment = basis * energy.asDiagonal() * basis.transpose();
  const MatrixRM error = low_rank_rotation(t, 2, &moment).dense() - t;
  const double weighted = (error.transpose() * moment * error).trace();
  EXPECT_NEAR(weighted, dropped({1, 0.5}, 0), 1e-9);
  const MatrixRM even = MatrixRM::Identity(6, 6);
  EXPECT_LT((low_rank_rotation(t, 2, &even).dense() - low_rank_rotation(t, 2).dense()).norm(),
            kExact);
}

TEST(SubspaceRotation, AChainOfBasesReaimsAndEndsExactWithFullRank) {
  const int64_t n = 24;
  MatrixRM target = random_orthogonal(n, 8), chain = target;
  double last_error = 0;
  for (uint64_t step = 0; step < 5; ++step) {
    const MatrixRM skew =
        random_orthogonal(n, 9 + step) - random_orthogonal(n, 9 + step).transpose();
    target = retract(target, 0.05 * target * skew, Retraction::kCayley);
    const MatrixRM t = chain.transpose() * target;
    chain = chain * low_rank_rotation(t, step == 4 ? n : 8).dense();
    EXPECT_LT(orthogonality_error(chain), kExact);
    last_error = (chain - target).norm();
    if (step < 4) {
      EXPECT_GT(last_error, 1e-3);
    }
  }
  EXPECT_LT(last_error, 10 * kExact);
}

}  // namespace
}  // namespace tq
