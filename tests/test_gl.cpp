// The gauge of a low-rank branch: a symmetry before rounding, gradients after it, closed forms.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "quant/gl.h"
#include "quant/rng.h"

namespace tq {
namespace {

// Identities in f64: sums of at most 40 terms of size 1 and condition numbers up to 100 squared.
constexpr double kExact = 1e-10;
constexpr int64_t kRank = 6, kIn = 20, kOut = 16, kTokens = 40;

MatrixRM random_matrix(int64_t rows, int64_t cols, uint64_t seed) {
  SplitMix64 rng(seed);
  MatrixRM m(rows, cols);
  for (int64_t i = 0; i < m.size(); ++i) m.data()[i] = rng.normal();
  return m;
}

MatrixRM random_positive(int64_t r, uint64_t seed) {
  const MatrixRM m = random_matrix(r, r + 4, seed);
  return m * m.transpose() / static_cast<double>(r);
}

double largest(const MatrixRM& m) {
  return m.cwiseAbs().maxCoeff();
}

double condition(const MatrixRM& g) {
  const Eigen::VectorXd s = g.jacobiSvd().singularValues();
  return s(0) / s(s.size() - 1);
}

// A smooth stand-in for rounding, so that slopes exist: x + 0.1 sin(5 x).
MatrixRM bend(const MatrixRM& m) {
  return m.array() + 0.1 * (5 * m.array()).sin();
}
MatrixRM bend_slope(const MatrixRM& m) {
  return 1 + 0.5 * (5 * m.array()).cos();
}

// || X W^T - bend(X bend(A')^T) bend(B')^T ||^2 / 2 and its exact gradients; `bent` = false is the
// branch without rounding.
struct Branch {
  MatrixRM x, target;
  bool bent = true;

  MatrixRM round(const MatrixRM& m) const { return bent ? bend(m) : m; }
  MatrixRM slope(const MatrixRM& m) const {
    return bent ? bend_slope(m) : MatrixRM::Ones(m.rows(), m.cols());
  }
  double loss(const MatrixRM& a, const MatrixRM& b) const {
    const MatrixRM h = x * round(a).transpose();
    return 0.5 * (round(h) * round(b).transpose() - target).squaredNorm();
  }
  MatrixRM z(const MatrixRM& a, const MatrixRM& b) const {
    const MatrixRM h = x * round(a).transpose();
    const MatrixRM e = round(h) * round(b).transpose() - target;
    const MatrixRM g_b = (e.transpose() * round(h)).cwiseProduct(slope(b));
    const MatrixRM g_h = (e * round(b)).cwiseProduct(slope(h));
    const MatrixRM g_a = (g_h.transpose() * x).cwiseProduct(slope(a));
    return gauge_gradient(g_a, a, b, g_b);
  }
};

struct Case {
  MatrixRM a = 0.3 * random_matrix(kRank, kIn, 1), b = random_matrix(kOut, kRank, 2);
  Branch branch{random_matrix(kTokens, kIn, 3), random_matrix(kTokens, kOut, 4)};
};

GaugeOptions options(double lr, double max_condition = 100) {
  GaugeOptions result;
  result.descent.lr = lr;
  result.max_condition = max_condition;
  return result;
}

TEST(Gl, GradientVanishesWhenNothingIsRounded) {
  Case c;
  const double with_rounding = largest(c.branch.z(c.a, c.b));
  c.branch.bent = false;
  // Two equal products of about 40 * 20 terms of size 10 each: 2^-53 * 1e4, with room.
  EXPECT_LT(largest(c.branch.z(c.a, c.b)), 1e-10);
  EXPECT_GT(with_rounding, 1);
}

TEST(Gl, GradientIsDrivenByTheRoundingErrorsAlone) {
  // Straight-through gradients with any roundings: Z = dB^T E^T q(H) - q(B')^T E^T dH
  // - q(B')^T E^T X dA^T with dB = q(B') - B', dH = q(H) - X q(A')^T, dA = q(A') - A'.
  const Case c;
  const auto q = [](const MatrixRM& m) -> MatrixRM { return (4 * m.array()).round() / 4; };
  const MatrixRM qa = q(c.a), qb = q(c.b), h = c.branch.x * qa.transpose(), qh = q(h);
  const MatrixRM e = qh * qb.transpose() - c.branch.target;
  const MatrixRM z =
      gauge_gradient((e * qb).transpose() * c.branch.x, c.a, c.b, e.transpose() * qh);
  const MatrixRM qbe = qb.transpose() * e.transpose();
  const MatrixRM expected = (qb - c.b).transpose() * e.transpose() * qh - qbe * (qh - h) -
                            qbe * c.branch.x * (qa - c.a).transpose();
  // The sign of dB: Z has -B'^T g_B = (dB - q(B'))^T g_B.
  EXPECT_LT(largest(z - expected), kExact);
}

TEST(Gl, StepLeavesTheProductUnchanged) {
  for (bool polar : {false, true}) {
    Case c;
    const MatrixRM product = c.b * c.a, a0 = c.a, b0 = c.b;
    MultiplicativeGauge multiplicative(MatrixRM::Identity(kRank, kRank), options(0.05));
    PolarGauge polar_gauge(MatrixRM::Identity(kRank, kRank), options(0.05));
    for (int step = 0; step < 50; ++step) {
      const MatrixRM z = c.branch.z(c.a, c.b);
      (polar ? polar_gauge.step(z) : multiplicative.step(z)).apply(c.a, c.b);
    }
    EXPECT_LT(largest(c.b * c.a - product), kExact);
    EXPECT_GT(largest(c.a - a0), 0.1);
    const MatrixRM g = polar ? polar_gauge.g() : multiplicative.g();
    EXPECT_LT(largest(g * a0 - c.a), kExact);
    EXPECT_LT(largest(c.b * g - b0), kExact);
  }
}

TEST(Gl, GradientGivesTheSlopeAlongOneParameterGroups) {
  const Case c;
  const MatrixRM direction = random_matrix(kRank, kRank, 5) / kRank;
  const double slope = c.branch.z(c.a, c.b).cwiseProduct(direction).sum();
  const auto error = [&](double t) {
    // d/dt at 0 of L(exp(t D) A', B' exp(-t D)) = <Z, D>; exp to third order is enough here.
    const MatrixRM one = MatrixRM::Identity(kRank, kRank), d = t * direction;
    const MatrixRM k = one + d + 0.5 * d * d, k_inverse = one - d + 0.5 * d * d;
    return std::fabs(c.branch.loss(k * c.a, c.b * k_inverse) - c.branch.loss(c.a, c.b) - t * slope);
  };
  EXPECT_NEAR(std::log2(error(1e-3) / error(5e-4)), 2.0, 0.1);
}

TEST(Gl, FirstStepIsTheGradientStepOfEachParametrisation) {
  // From G = I both move G by -lr times a gradient: Z for GL, and for the polar form its skew
  // and its symmetric part, which add up to Z again. Checked to first order in lr.
  const Case c;
  const MatrixRM z = c.branch.z(c.a, c.b), one = MatrixRM::Identity(kRank, kRank);
  for (double lr : {1e-6, 1e-7}) {
    const double scale = lr * z.norm();
    MultiplicativeGauge multiplicative(one, options(lr));
    PolarGauge polar(one, options(lr));
    EXPECT_LT((multiplicative.step(z).k - one + lr * z).norm(), scale * scale);
    EXPECT_LT((polar.step(z).k - one + lr * z).norm(), scale * scale);
  }
}

TEST(Gl, PolarGradientsMatchTheLossAwayFromTheIdentity) {
  // L(P exp(Y)) along Y + t E: the slope is <exponential_gradient, E>.
  const MatrixRM y0 = random_positive(kRank, 6), e0 = random_positive(kRank, 7);
  const MatrixRM weight = random_matrix(kRank, kRank, 8);  // L(S) = <weight, S> + |S|^2
  const auto exponential = [](const MatrixRM& y) -> MatrixRM {
    const Eigen::SelfAdjointEigenSolver<MatrixRM> eigen(y);
    const Eigen::VectorXd exp = eigen.eigenvalues().array().exp();
    return eigen.eigenvectors() * exp.asDiagonal() * eigen.eigenvectors().transpose();
  };
  const auto loss = [&](const MatrixRM& y) {
    const MatrixRM s = exponential(y);
    return weight.cwiseProduct(s).sum() + s.squaredNorm();
  };
  // With a double eigenvalue too, where the divided difference is a derivative.
  const MatrixRM twice = exponential(0.1 * y0);
  for (const MatrixRM& y : {y0, MatrixRM(MatrixRM::Identity(kRank, kRank)), twice}) {
    const Eigen::SelfAdjointEigenSolver<MatrixRM> eigen(y);
    const MatrixRM s = exponential(y);
    const MatrixRM d = 0.5 * (weight + weight.transpose()) + 2 * s;
    const double slope =
        exponential_gradient(eigen.eigenvectors(), eigen.eigenvalues(), d).cwiseProduct(e0).sum();
    const auto error = [&](double t) { return std::fabs(loss(y + t * e0) - loss(y) - t * slope); };
    EXPECT_NEAR(std::log2(error(1e-3) / error(5e-4)), 2.0, 0.1);
  }
}

TEST(Gl, PolarStepGoesDownhillFromAnyGauge) {
  // A small step changes the loss by -lr (|grad_P|^2 + |grad_Y|^2) < 0 to first order, from a G
  // that is neither orthogonal nor symmetric.
  const Case c;
  const MatrixRM g = random_matrix(kRank, kRank, 9) + 3 * MatrixRM::Identity(kRank, kRank);
  MatrixRM a = g * c.a, b = c.b * MatrixRM(g.inverse());
  PolarGauge gauge(g, options(1e-7, 1e6));
  EXPECT_LT(largest(gauge.g() - g), kExact);
  MatrixRM last_a = a, last_b = b;
  double last = c.branch.loss(a, b);
  for (int step = 0; step < 20; ++step) {
    gauge.step(c.branch.z(a, b)).apply(a, b);
    const double now = c.branch.loss(a, b);
    EXPECT_LT(now, last);
    last = now;
  }
}

TEST(Gl, DescentReachesTheClosedFormMinimumInBothParametrisations) {
  // L(G) = tr(G C_h G^T) + tr(G^-T C_b G^-1) is the sum of both energies; its minimum over GL is
  // 2 tr (C_h^(1/2) C_b C_h^(1/2))^(1/2), at G^T G = C_h^-1 # C_b.
  const MatrixRM c_h = random_positive(kRank, 10), c_b = random_positive(kRank, 11);
  const MatrixRM s = geometric_mean(c_h.inverse(), c_b);
  const double minimum = (s * c_h).trace() + (s.inverse() * c_b).trace();
  const MatrixRM start = MatrixRM::Identity(kRank, kRank);
  for (bool adam : {false, true}) {
    GaugeOptions how = options(adam ? 0.3 : 0.02, 1e6);
    how.descent.adam = adam;
    how.descent.momentum = adam ? 0.9 : 0.5;
    how.descent.second_momentum = 0.95;
    MultiplicativeGauge multiplicative(start, how);
    PolarGauge polar(start, how);
    MatrixRM g[2];
    for (int i = 0; i < 2; ++i) {
      for (int step = 0; step < 1500; ++step) {
        g[i] = i == 0 ? multiplicative.g() : polar.g();
        const MatrixRM inverse = g[i].inverse();
        const MatrixRM z =
            2 * g[i] * c_h * g[i].transpose() - 2 * inverse.transpose() * c_b * inverse;
        if (adam) multiplicative.set_lr(0.3 * std::pow(1e-7, step / 1500.0));
        if (adam) polar.set_lr(0.3 * std::pow(1e-7, step / 1500.0));
        i == 0 ? multiplicative.step(z) : polar.step(z);
      }
      const MatrixRM reached = g[i].transpose() * g[i];
      EXPECT_NEAR((reached * c_h).trace() + (reached.inverse() * c_b).trace(), minimum,
                  1e-8 * minimum)
          << i << adam;
      EXPECT_LT(largest(reached - s), 1e-3 * largest(s)) << i << adam;
    }
  }
}

TEST(Gl, ConditionStaysBoundedOverAThousandSteps) {
  const MatrixRM start = MatrixRM::Identity(kRank, kRank);
  MultiplicativeGauge multiplicative(start, options(10, 20));
  PolarGauge polar(start, options(10, 20));
  MatrixRM a[2], b[2];
  for (int i = 0; i < 2; ++i) a[i] = Case().a, b[i] = Case().b;
  const MatrixRM product = b[0] * a[0];
  double worst[2] = {0, 0};
  for (uint64_t step = 0; step < 1000; ++step) {
    const MatrixRM z = random_matrix(kRank, kRank, 1000 + step);  // capped to length 1
    multiplicative.step(z).apply(a[0], b[0]);
    polar.step(z).apply(a[1], b[1]);
    worst[0] = std::max(worst[0], condition(multiplicative.g()));
    worst[1] = std::max(worst[1], condition(polar.g()));
  }
  for (int i = 0; i < 2; ++i) {
    EXPECT_LE(worst[i], 20 * (1 + 1e-9)) << i;
    EXPECT_GT(worst[i], 19) << i;  // the bound was reached
    // A thousand products of condition up to 20 times e^2, each with a rounding of 2^-53 * 10.
    EXPECT_LT(largest(b[i] * a[i] - product), 1e-9) << i;
  }
}

TEST(Gl, GeometricMeanSolvesItsRiccatiEquation) {
  for (int64_t r : {1, 2, 6, 20}) {
    const MatrixRM c = random_positive(r, 12), d = random_positive(r, 13);
    const MatrixRM x = geometric_mean(c, d);
    EXPECT_LT(largest(x * c.inverse() * x - d), kExact);
    EXPECT_LT(largest(x - geometric_mean(d, c)), kExact);
    EXPECT_LT(largest(geometric_mean(c, c) - c), kExact);
    EXPECT_EQ(x, MatrixRM(x.transpose()));
    EXPECT_GT(Eigen::SelfAdjointEigenSolver<MatrixRM>(x).eigenvalues().minCoeff(), 0);
  }
}

TEST(Gl, ClosedFormGaugeAttainsTheSquaredNuclearNorm) {
  for (int64_t r : {8, 12, 22}) {  // Hadamard orders 8 and 12; 22 has none: blocks of 2
    const int64_t tokens = 50, out = 40;
    const MatrixRM h = random_matrix(tokens, r, 14) * random_positive(r, 15);
    const MatrixRM b = random_matrix(out, r, 16) * random_positive(r, 17);
    const MatrixRM c_h = h.transpose() * h / tokens, c_b = b.transpose() * b / out;
    const MatrixRM g = closed_form_gauge(c_h, c_b, 1e9, 1, 2);
    const MatrixRM s = g.transpose() * g;
    const double reached = (s * c_h).trace() * (s.inverse() * c_b).trace();
    const double nuclear = MatrixRM(h * b.transpose()).jacobiSvd().singularValues().sum();
    const double minimum = nuclear * nuclear / (tokens * out);
    EXPECT_GE(reached, minimum * (1 - 1e-9));
    // The ridge adds 1e-6 of the mean to each eigenvalue; at a minimum its first order shows only
    // through the ill-conditioned directions, which carry no energy.
    EXPECT_LT(reached, minimum * (1 + 1e-4));
    const MatrixRM identity_energy = MatrixRM::Identity(r, r);
    EXPECT_GT(c_h.trace() * c_b.trace(), minimum * 1.5);
  }
}

TEST(Gl, ClosedFormGaugeSpreadsTheEnergyOfBothFactorsEvenly) {
  // With S alone the transformed moments G C_h G^T and G^-T C_b G^-1 are equal; the Hadamard
  // matrix evens out the diagonal of a diagonal moment exactly.
  const int64_t r = 16;
  Eigen::VectorXd h = Eigen::VectorXd::LinSpaced(r, 1, 5), b = Eigen::VectorXd::LinSpaced(r, 3, 1);
  const MatrixRM c_h = h.asDiagonal(), c_b = b.asDiagonal();
  const MatrixRM g = closed_form_gauge(c_h, c_b, 100, 1, 0), inverse = g.inverse();
  const MatrixRM energy_h = g * c_h * g.transpose();
  const MatrixRM energy_b = inverse.transpose() * c_b * inverse;
  EXPECT_LT(largest(energy_h - energy_b), 1e-4);  // the ridge, 1e-6 of the mean 3
  const double mean = energy_h.trace() / r;
  for (int64_t i = 0; i < r; ++i) EXPECT_NEAR(energy_h(i, i), mean, 1e-4);
}

// A sum in f32 of inputs that nearly all point one way: beside that direction there is only noise,
// of either sign, and more of it than the usual ridge.
TEST(Gl, ClosedFormGaugeSurvivesMomentsThatAreNoiseButForOneDirection) {
  const int64_t r = 48;
  SplitMix64 rng(7);
  MatrixRM noise(r, r);
  for (int64_t i = 0; i < noise.size(); ++i) noise.data()[i] = 1e-6 * rng.normal();
  const Eigen::VectorXd one = Eigen::VectorXd::Ones(r);
  for (double scale : {1.0, 1e-22, 1e-40, 0.0}) {
    const MatrixRM c_h = scale * (one * one.transpose() + noise + noise.transpose());
    EXPECT_TRUE(closed_form_gauge(c_h, MatrixRM::Identity(r, r), 1000, 0, 0).allFinite()) << scale;
  }
}

TEST(Gl, ClosedFormGaugeSurvivesSingularMomentsWithinItsCondition) {
  const int64_t r = 12;
  const MatrixRM thin = random_matrix(r, 3, 18);
  const MatrixRM rank_three = thin * thin.transpose(), zero = MatrixRM::Zero(r, r);
  for (const MatrixRM& c_h : {rank_three, zero}) {
    for (const MatrixRM& c_b : {rank_three, zero, random_positive(r, 19)}) {
      const MatrixRM g = closed_form_gauge(c_h, c_b, 100, 1, 0);
      ASSERT_TRUE(g.allFinite());
      EXPECT_LE(condition(g), 100 * (1 + 1e-9));
    }
  }
}

}  // namespace
}  // namespace tq
