// Stiefel manifolds: laws of tangent vectors and retractions, and optima that are known exactly.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "quant/rng.h"
#include "quant/stiefel.h"

namespace tq {
namespace {

constexpr Metric kMetrics[] = {Metric::kEuclidean, Metric::kCanonical};
constexpr Retraction kRetractions[] = {Retraction::kCayley, Retraction::kCayleyFixedPoint,
                                       Retraction::kQr, Retraction::kPolar};
struct Shape {
  int64_t n, p;
};
constexpr Shape kShapes[] = {{8, 8}, {20, 20}, {20, 3}, {20, 1}, {20, 15}};

MatrixRM random_matrix(int64_t rows, int64_t cols, uint64_t seed) {
  SplitMix64 rng(seed);
  MatrixRM m(rows, cols);
  for (int64_t i = 0; i < m.size(); ++i) m.data()[i] = rng.normal();
  return m;
}

MatrixRM random_frame(Shape shape, uint64_t seed) {
  return orthonormalise(random_matrix(shape.n, shape.p, seed));
}

// A tangent vector at x whose generator W has Frobenius norm `length`.
MatrixRM random_tangent(const MatrixRM& x, double length, uint64_t seed) {
  const MatrixRM xi = project_tangent(x, random_matrix(x.rows(), x.cols(), seed));
  return length / std::sqrt(2 * inner_product(x, xi, xi, Metric::kCanonical)) * xi;
}

// W [n, n], written out.
MatrixRM generator(const MatrixRM& x, const MatrixRM& xi) {
  const MatrixRM p_xi = xi - 0.5 * x * (x.transpose() * xi);
  return p_xi * x.transpose() - x * p_xi.transpose();
}

// The Cayley transform by a dense solve.
MatrixRM cayley(const MatrixRM& w) {
  const MatrixRM one = MatrixRM::Identity(w.rows(), w.cols());
  return (one - 0.5 * w).partialPivLu().solve(one + 0.5 * w);
}

double tangency_error(const MatrixRM& x, const MatrixRM& xi) {
  const MatrixRM product = x.transpose() * xi;
  return (product + product.transpose()).cwiseAbs().maxCoeff();
}

// log2 of the ratio of errors when the step is halved.
double slope(const std::function<double(double)>& error, double step) {
  return std::log2(error(step) / error(step / 2));
}

// Tolerance of identities in f64: sums of at most 40 terms of size about 1, 40 * 2^-53 = 4e-15,
// a few of them in a row, and linear solves of condition < 2.
constexpr double kExact = 1e-12;

TEST(Stiefel, OrthonormaliseKeepsTheSpanAndAPositiveDiagonal) {
  for (const Shape shape : kShapes) {
    const MatrixRM m = random_matrix(shape.n, shape.p, 1);
    const MatrixRM q = orthonormalise(m);
    EXPECT_LT(orthogonality_error(q), kExact);
    const MatrixRM r = q.transpose() * m;
    EXPECT_LT((q * r - m).cwiseAbs().maxCoeff(), kExact);
    for (int64_t i = 0; i < shape.p; ++i) {
      EXPECT_GT(r(i, i), 0);
      for (int64_t j = 0; j < i; ++j) EXPECT_NEAR(r(i, j), 0, kExact);
    }
  }
}

TEST(Stiefel, NearestOrthogonalIsThePolarFactorNearAndFarFromTheManifold) {
  for (const Shape shape : kShapes) {
    for (double distance : {1e-7, 0.1, 30.0}) {
      const MatrixRM q = random_frame(shape, 2);
      const MatrixRM m = q + distance / shape.n * random_matrix(shape.n, shape.p, 3);
      const MatrixRM nearest = nearest_orthogonal(m);
      EXPECT_LT(orthogonality_error(nearest), kExact);
      // The polar factor is the orthonormal U for which U^T M is symmetric positive semidefinite.
      const MatrixRM h = nearest.transpose() * m;
      EXPECT_LT((h - h.transpose()).cwiseAbs().maxCoeff(), kExact * (1 + distance));
      const Eigen::SelfAdjointEigenSolver<MatrixRM> eigen(h);
      EXPECT_GT(eigen.eigenvalues().minCoeff(), 0);
    }
  }
  EXPECT_LT(orthogonality_error(nearest_orthogonal(MatrixRM::Zero(6, 4))), kExact);
}

TEST(Stiefel, ProjectionIsTangentAndIdempotent) {
  for (const Shape shape : kShapes) {
    const MatrixRM x = random_frame(shape, 4), v = random_matrix(shape.n, shape.p, 5);
    const MatrixRM xi = project_tangent(x, v);
    EXPECT_LT(tangency_error(x, xi), kExact);
    EXPECT_LT((project_tangent(x, xi) - xi).cwiseAbs().maxCoeff(), kExact);
  }
}

// Cubic in the entries of X, so that nothing vanishes by symmetry.
struct CubicLoss {
  MatrixRM a, b;
  double value(const MatrixRM& x) const {
    return a.cwiseProduct(x).sum() + b.cwiseProduct(x).array().cube().sum();
  }
  MatrixRM gradient(const MatrixRM& x) const {
    return a + MatrixRM(3 * b.array().cube() * x.array().square());
  }
};

TEST(Stiefel, RiemannianGradientGivesTheSlopeOfTheLossInBothMetrics) {
  for (const Shape shape : kShapes) {
    const CubicLoss loss{random_matrix(shape.n, shape.p, 6), random_matrix(shape.n, shape.p, 7)};
    const MatrixRM x = random_frame(shape, 8), xi = random_tangent(x, 1, 9);
    for (Metric metric : kMetrics) {
      const MatrixRM gradient = riemannian_gradient(x, loss.gradient(x), metric);
      EXPECT_LT(tangency_error(x, gradient), 100 * kExact);  // entries up to about 50
      const double slope_at_x = inner_product(x, gradient, xi, metric);
      for (Retraction retraction : kRetractions) {
        const auto error = [&](double t) {
          return std::fabs(loss.value(retract(x, t * xi, retraction)) - loss.value(x) -
                           t * slope_at_x);
        };
        // The remainder is c t^2 + O(t^3): the exponent is 2 + O(t).
        EXPECT_NEAR(slope(error, 1e-3), 2.0, 0.05) << shape.n << " x " << shape.p;
      }
    }
  }
}

TEST(Stiefel, RetractionsFixTheirPointAndAgreeWithTheTangentToFirstOrder) {
  for (const Shape shape : kShapes) {
    const MatrixRM x = random_frame(shape, 10), xi = random_tangent(x, 1, 11);
    for (Retraction retraction : kRetractions) {
      EXPECT_LT((retract(x, 0 * xi, retraction) - x).cwiseAbs().maxCoeff(), kExact);
      const auto error = [&](double t) {
        return (retract(x, t * xi, retraction) - x - t * xi).norm();
      };
      EXPECT_NEAR(slope(error, 1e-3), 2.0, 0.01) << shape.n << " x " << shape.p;
      if (retraction == Retraction::kCayleyFixedPoint) continue;
      EXPECT_LT(orthogonality_error(retract(x, xi, retraction)), kExact);
    }
  }
}

TEST(Stiefel, GeneratorMapsThePointToTheTangentAndHasTheCanonicalNorm) {
  for (const Shape shape : kShapes) {
    const MatrixRM x = random_frame(shape, 12), xi = random_tangent(x, 1, 13);
    EXPECT_LT((generator(x, xi) * x - xi).cwiseAbs().maxCoeff(), kExact);
    EXPECT_NEAR(generator(x, xi).norm(), 1.0, kExact);
  }
}

TEST(Stiefel, SquareAndWoodburyFormsEqualTheDenseCayleyTransform) {
  for (const Shape shape : kShapes) {
    for (double length : {0.01, 1.0, 10.0}) {
      const MatrixRM x = random_frame(shape, 14), xi = random_tangent(x, length, 15);
      const MatrixRM dense = cayley(generator(x, xi)) * x;
      EXPECT_LT((retract(x, xi, Retraction::kCayley) - dense).cwiseAbs().maxCoeff(), kExact);
      EXPECT_LT((CayleyMap(x, xi).apply(x) - dense).cwiseAbs().maxCoeff(), kExact);
    }
  }
}

TEST(Stiefel, FixedPointFormIsAsCloseToTheClosedFormAsItsContraction) {
  for (const Shape shape : kShapes) {
    for (double length : {0.1, 0.5, 1.0}) {
      const MatrixRM x = random_frame(shape, 16), xi = random_tangent(x, length, 17);
      const double norm = generator(x, xi).jacobiSvd().singularValues()(0);
      const double error =
          (retract(x, xi, Retraction::kCayleyFixedPoint) - retract(x, xi, Retraction::kCayley))
              .norm();
      // Each round multiplies the error by W/2; the start X + W X is off by
      // (I - W/2)^-1 W^2 X / 2, of Frobenius norm <= ||W|| ||W X||_F / 2.
      EXPECT_LE(error, std::pow(norm / 2, 5) * norm * xi.norm() / 2 * (1 + 1e-9) + 1e-15);
      EXPECT_GT(error, 0);
    }
  }
}

TEST(Stiefel, CayleyTransportIsTangentAndIsometricInBothMetrics) {
  for (const Shape shape : kShapes) {
    const MatrixRM x = random_frame(shape, 18), xi = random_tangent(x, 1, 19);
    const MatrixRM eta = random_tangent(x, 1, 20);
    const CayleyMap map(x, xi);
    const MatrixRM y = map.apply(x), moved = map.apply(eta);
    EXPECT_LT(tangency_error(y, moved), kExact);
    for (Metric metric : kMetrics) {
      EXPECT_NEAR(inner_product(y, moved, moved, metric), inner_product(x, eta, eta, metric),
                  kExact);
    }
    // On O(n) it keeps the coordinates X^T eta, which is how the optimizer stores momentum there.
    if (shape.n == shape.p) {
      EXPECT_LT((y.transpose() * moved - x.transpose() * eta).cwiseAbs().maxCoeff(), kExact);
    }
  }
}

StiefelOptions options(Metric metric, Retraction retraction, bool adam, double lr) {
  StiefelOptions result;
  result.metric = metric;
  result.retraction = retraction;
  result.descent.adam = adam;
  result.descent.momentum = adam ? 0.9 : 0.5;
  result.descent.second_momentum = 0.95;  // forgets the large gradients of the start in time
  result.descent.lr = lr;
  return result;
}

TEST(Stiefel, MomentumStaysTangentAndPointsStayOrthonormal) {
  for (const Shape shape : kShapes) {
    for (Retraction retraction : kRetractions) {
      MatrixRM x = random_frame(shape, 21);
      StiefelOptimizer optimizer(options(Metric::kEuclidean, retraction, false, 0.1));
      for (uint64_t step = 0; step < 50; ++step) {
        optimizer.step(x, random_matrix(shape.n, shape.p, 100 + step));
        const MatrixRM& m = optimizer.momentum();
        // Momentum has entries up to about 3 / (1 - 0.5).
        EXPECT_LT(shape.n == shape.p ? (m + m.transpose()).norm() : tangency_error(x, m), 1e-11);
        EXPECT_LT(orthogonality_error(x), 1e-11);
      }
    }
  }
}

TEST(Stiefel, TenThousandStepsKeepTheColumnsOrthonormal) {
  for (const Shape shape : {Shape{12, 12}, Shape{24, 3}}) {
    for (Retraction retraction : kRetractions) {
      MatrixRM x = random_frame(shape, 22);
      StiefelOptimizer optimizer(options(Metric::kCanonical, retraction, false, 0.3));
      double worst = 0;
      for (uint64_t step = 0; step < 10000; ++step) {
        optimizer.step(x, random_matrix(shape.n, shape.p, 1000 + step));
        worst = std::max(worst, orthogonality_error(x));
      }
      // A step adds a few 2^-53 * n; a hundred of them lie between clean-ups.
      EXPECT_LT(worst, 1e-11) << static_cast<int>(retraction);
    }
  }
}

TEST(Stiefel, ACleanUpRepairsAStartInSinglePrecision) {
  const MatrixRM exact = random_frame({20, 20}, 23);
  MatrixRM x = exact.cast<float>().cast<double>();
  EXPECT_GT(orthogonality_error(x), 1e-9);
  StiefelOptimizer(options(Metric::kEuclidean, Retraction::kCayley, false, 0.1))
      .step(x, MatrixRM::Zero(20, 20));
  EXPECT_LT(orthogonality_error(x), kExact);
  EXPECT_LT((x - exact).cwiseAbs().maxCoeff(), 1e-6);  // f32 rounds at 2^-25 relative
}

TEST(Stiefel, StepsAreNoLongerThanTheCap) {
  for (const Shape shape : {Shape{20, 20}, Shape{20, 3}}) {
    for (Retraction retraction : kRetractions) {
      const MatrixRM x = random_frame(shape, 24);
      MatrixRM y = x;
      StiefelOptimizer optimizer(options(Metric::kEuclidean, retraction, false, 1e6));
      optimizer.step(y, random_matrix(shape.n, shape.p, 25));
      // A generator of norm 1 moves X by at most 1 (every retraction here moves by at most the
      // length of its tangent vector, itself at most the norm of the generator).
      EXPECT_LT((y - x).norm(), 1 + 1e-3);
      EXPECT_GT((y - x).norm(), 0.5);
    }
  }
}

// Runs `steps` steps with a learning rate that falls to zero at the end, and returns the loss.
double minimise(const StiefelOptions& how, MatrixRM& x, int steps,
                const std::function<double(const MatrixRM&)>& value,
                const std::function<MatrixRM(const MatrixRM&)>& gradient) {
  StiefelOptimizer optimizer(how);
  for (int step = 0; step < steps; ++step) {
    // Adam's steps have length ~lr, so the rate must fall geometrically; SGD's may stay.
    if (how.descent.adam) optimizer.set_lr(how.descent.lr * std::pow(1e-7, step / double(steps)));
    optimizer.step(x, gradient(x));
  }
  return value(x);
}

TEST(Stiefel, ProcrustesProblemsReachTheirPolarFactor) {
  // min ||X - M||_F^2 over orthonormal X: X = polar(M), minimum = sum (1 - sigma_i)^2 (p = n).
  const int64_t n = 10;
  const MatrixRM target = random_frame({n, n}, 26);
  MatrixRM spread = random_matrix(n, n, 27);
  spread = 0.1 * spread * spread.transpose() + MatrixRM::Identity(n, n);
  const MatrixRM m = target * spread;
  // Start 1 rad away in the same component of O(n).
  const MatrixRM start = retract(target, random_tangent(target, 1, 28), Retraction::kCayley);
  const auto value = [&](const MatrixRM& x) { return (x - m).squaredNorm(); };
  const auto gradient = [&](const MatrixRM& x) -> MatrixRM { return 2 * (x - m); };
  for (Metric metric : kMetrics) {
    for (Retraction retraction : kRetractions) {
      for (bool adam : {false, true}) {
        MatrixRM x = start;
        minimise(options(metric, retraction, adam, adam ? 0.2 : 0.05), x, 600, value, gradient);
        // The Hessian is bounded below by 2, so a gradient of 1e-7 leaves a distance of 1e-7.
        EXPECT_LT((x - target).norm(), 1e-6)
            << static_cast<int>(metric) << static_cast<int>(retraction) << adam;
      }
    }
  }
}

TEST(Stiefel, BrockettProblemsReachTheSumOfSortedEigenvalues) {
  // min tr(X^T A X N), N = diag(p, ..., 1): X holds the eigenvectors of the p smallest eigenvalues,
  // and the minimum is the sum of lambda_i N_i.
  for (const Shape shape : {Shape{12, 3}, Shape{6, 6}}) {
    const MatrixRM basis = random_frame({shape.n, shape.n}, 29);
    Eigen::VectorXd lambda(shape.n), weight(shape.p);
    for (int64_t i = 0; i < shape.n; ++i) lambda(i) = static_cast<double>(i + 1);
    for (int64_t i = 0; i < shape.p; ++i) weight(i) = static_cast<double>(shape.p - i);
    const MatrixRM a = basis * lambda.asDiagonal() * basis.transpose();
    const double minimum = lambda.head(shape.p).dot(weight);
    const auto value = [&](const MatrixRM& x) {
      return (x.transpose() * a * x * weight.asDiagonal()).trace();
    };
    const auto gradient = [&](const MatrixRM& x) -> MatrixRM {
      return 2 * a * x * weight.asDiagonal();
    };
    for (Metric metric : kMetrics) {
      for (Retraction retraction : kRetractions) {
        for (bool adam : {false, true}) {
          MatrixRM x = random_frame(shape, 30);
          const double reached = minimise(options(metric, retraction, adam, adam ? 0.3 : 0.008), x,
                                          2500, value, gradient);
          // Quadratic in the distance: 1e-6 apart costs about 100 * 1e-12.
          EXPECT_NEAR(reached, minimum, 1e-9)
              << static_cast<int>(metric) << static_cast<int>(retraction) << adam;
        }
      }
    }
  }
}

TEST(Stiefel, AdamDoesNotDependOnTheBasisNorOnTheScaleOfTheLoss) {
  const Shape shape{20, 3};
  const MatrixRM rotation = random_frame({20, 20}, 31);
  MatrixRM x = random_frame(shape, 32), scaled = x, rotated = rotation * x;
  const StiefelOptions how = options(Metric::kEuclidean, Retraction::kCayley, true, 0.05);
  StiefelOptimizer first(how), second(how), third(how);
  for (uint64_t step = 0; step < 30; ++step) {
    const MatrixRM d = random_matrix(shape.n, shape.p, 200 + step);
    first.step(x, d);
    second.step(scaled, 1e-9 * d);
    third.step(rotated, rotation * d);
  }
  // Thirty steps, each with the rounding of kExact at most.
  EXPECT_LT((scaled - x).norm(), 30 * kExact);
  EXPECT_LT((rotated - rotation * x).norm(), 30 * kExact);
}

}  // namespace
}  // namespace tq
