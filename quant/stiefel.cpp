// stiefel - retractions and descent on matrices with orthonormal columns. See stiefel.h.
#include "quant/stiefel.h"

#include <algorithm>
#include <cmath>

#include "model/error.h"

namespace tq {
namespace {

constexpr int kFixedPointRounds = 5;  // SpinQuant's

MatrixRM identity(int64_t n) {
  return MatrixRM::Identity(n, n);
}

// (m + m^T) / 2; the two triangles carry the same bits.
MatrixRM symmetric_part(const MatrixRM& m) {
  return 0.5 * (m + m.transpose());
}

// 2 X (I - A/2)^-1 - X = X (I - A/2)^-1 (I + A/2), for a skew A [n, n]. I - A/2 has a positive
// definite symmetric part: never singular, whatever the step.
MatrixRM cayley_square(const MatrixRM& x, const MatrixRM& a) {
  // Solved transposed, (I - A/2)^T = I + A/2, because the unknown stands on the left.
  MatrixRM system = 0.5 * a;
  system.diagonal().array() += 1.0;
  const Eigen::PartialPivLU<Eigen::Ref<MatrixRM>> lu(system);
  const MatrixRM half = lu.solve(x.transpose());
  return 2.0 * half.transpose() - x;
}

// The factors [n, 2p] of W = U V^T.
struct Generator {
  MatrixRM u, v;
};

Generator generator(const MatrixRM& x, const MatrixRM& xi) {
  const int64_t n = x.rows(), p = x.cols();
  const MatrixRM p_xi = xi - 0.5 * x * (x.transpose() * xi);
  Generator w{MatrixRM(n, 2 * p), MatrixRM(n, 2 * p)};
  w.u << p_xi, x;
  w.v << x, -p_xi;
  return w;
}

MatrixRM cayley_fixed_point(const MatrixRM& x, const MatrixRM& xi) {
  MatrixRM y = x + xi;
  if (x.rows() == x.cols()) {
    const MatrixRM a = x.transpose() * xi;  // W (X + Y) = (X + Y) A for every Y = X f(A)
    for (int round = 0; round < kFixedPointRounds; ++round) y = x + 0.5 * (x + y) * a;
    return y;
  }
  const Generator w = generator(x, xi);
  for (int round = 0; round < kFixedPointRounds; ++round) {
    y = x + 0.5 * w.u * (w.v.transpose() * (x + y));
  }
  return y;
}

}  // namespace

double orthogonality_error(const MatrixRM& x) {
  return (x.transpose() * x - identity(x.cols())).cwiseAbs().maxCoeff();
}

MatrixRM orthonormalise(const MatrixRM& m) {
  TQ_CHECK(m.rows() >= m.cols());
  const Eigen::HouseholderQR<MatrixRM> qr(m);
  MatrixRM q = qr.householderQ() * MatrixRM::Identity(m.rows(), m.cols());
  for (int64_t j = 0; j < m.cols(); ++j) {
    if (qr.matrixQR()(j, j) < 0) q.col(j) *= -1.0;
  }
  return q;
}

MatrixRM nearest_orthogonal(const MatrixRM& m) {
  TQ_CHECK(m.rows() >= m.cols() && m.allFinite());
  // X <- X + X E / 2 with E = I - X^T X takes ||E|| to at most 3/4 ||E||^2 + 1/4 ||E||^3, so it
  // converges from ||E|| < 1; after an update from 1e-8 only rounding is left.
  MatrixRM x = m;
  for (;;) {
    const MatrixRM defect = identity(x.cols()) - x.transpose() * x;
    const double size = defect.norm();
    if (!(size < 0.9)) break;
    x += 0.5 * x * defect;
    if (size < 1e-8) return x;
  }
  const Eigen::BDCSVD<MatrixRM> svd(m, Eigen::ComputeThinU | Eigen::ComputeThinV);
  return svd.matrixU() * svd.matrixV().transpose();
}

MatrixRM project_tangent(const MatrixRM& x, const MatrixRM& v) {
  return v - x * symmetric_part(x.transpose() * v);
}

MatrixRM riemannian_gradient(const MatrixRM& x, const MatrixRM& d, Metric metric) {
  if (metric == Metric::kEuclidean) return project_tangent(x, d);
  return d - x * (d.transpose() * x);
}

double inner_product(const MatrixRM& x, const MatrixRM& a, const MatrixRM& b, Metric metric) {
  const double euclidean = a.cwiseProduct(b).sum();
  if (metric == Metric::kEuclidean) return euclidean;
  const MatrixRM xa = x.transpose() * a, xb = x.transpose() * b;
  return euclidean - 0.5 * xa.cwiseProduct(xb).sum();
}

MatrixRM retract(const MatrixRM& x, const MatrixRM& xi, Retraction retraction) {
  switch (retraction) {
    case Retraction::kCayley:
      if (x.rows() == x.cols()) return cayley_square(x, x.transpose() * xi);
      return CayleyMap(x, xi).apply(x);
    case Retraction::kCayleyFixedPoint:
      return cayley_fixed_point(x, xi);
    case Retraction::kQr:
      return orthonormalise(x + xi);
    case Retraction::kPolar:
      return nearest_orthogonal(x + xi);
  }
  TQ_CHECK(false, "unknown retraction");
  return x;
}

CayleyMap::CayleyMap(const MatrixRM& x, const MatrixRM& xi) {
  Generator w = generator(x, xi);
  u_ = std::move(w.u);
  v_ = std::move(w.v);
  lu_.compute(identity(2 * x.cols()) - 0.5 * v_.transpose() * u_);
}

MatrixRM CayleyMap::apply(const MatrixRM& y) const {
  const MatrixRM coordinates = v_.transpose() * y;
  return y + u_ * lu_.solve(coordinates);
}

StiefelOptimizer::StiefelOptimizer(const StiefelOptions& options)
    : options_(options), descent_(options.descent) {
  TQ_CHECK(options.descent.max_step > 0);
  TQ_CHECK(options.retraction != Retraction::kCayleyFixedPoint || options.descent.max_step <= 1,
           "five rounds are not enough for longer steps");
}

double StiefelOptimizer::cap(double generator_norm) const {
  const double limit = options_.descent.max_step;
  return generator_norm > limit ? limit / generator_norm : 1.0;
}

void StiefelOptimizer::step(MatrixRM& x, const MatrixRM& d) {
  TQ_CHECK(x.rows() >= x.cols() && d.rows() == x.rows() && d.cols() == x.cols());
  if (steps_++ % kCleanUpInterval == 0) x = nearest_orthogonal(x);
  if (x.rows() == x.cols()) {
    step_square(x, d);
  } else {
    step_tall(x, d);
  }
}

void StiefelOptimizer::retract_in_place(MatrixRM& x, const MatrixRM& xi) const {
  x = retract(x, xi, options_.retraction);
  if (options_.retraction == Retraction::kCayleyFixedPoint) x = nearest_orthogonal(x);
}

// In the Lie algebra: xi = X A. The gradient, the momentum and the step are skew matrices.
void StiefelOptimizer::step_square(MatrixRM& x, const MatrixRM& d) {
  const bool euclidean = options_.metric == Metric::kEuclidean;
  const MatrixRM product = x.transpose() * d;
  const MatrixRM gradient = (euclidean ? 0.5 : 1.0) * (product - product.transpose());
  const double squared_norm = (euclidean ? 1.0 : 0.5) * gradient.squaredNorm();
  MatrixRM a = descent_.step(gradient, squared_norm);
  a *= cap(a.norm());  // ||W||_F = ||A||_F
  if (options_.retraction == Retraction::kCayley) {
    x = cayley_square(x, a);
  } else {
    retract_in_place(x, x * a);
  }
}

void StiefelOptimizer::step_tall(MatrixRM& x, const MatrixRM& d) {
  const MatrixRM gradient = riemannian_gradient(x, d, options_.metric);
  MatrixRM xi = descent_.step(gradient, inner_product(x, gradient, gradient, options_.metric));
  // ||W||_F^2 = 2 <xi, xi> in the canonical metric.
  xi *= cap(std::sqrt(2.0 * inner_product(x, xi, xi, Metric::kCanonical)));
  MatrixRM& momentum = descent_.momentum();
  if (options_.retraction == Retraction::kCayley) {
    const CayleyMap map(x, xi);
    x = map.apply(x);
    if (options_.descent.momentum != 0) momentum = map.apply(momentum);
  } else {
    retract_in_place(x, xi);
    if (options_.descent.momentum != 0) momentum = project_tangent(x, momentum);
  }
}

}  // namespace tq
