// gl - descent over the change of basis inside a low-rank branch. See gl.h.
#include "quant/gl.h"

#include <algorithm>
#include <cmath>
#include <unsupported/Eigen/MatrixFunctions>

#include "model/error.h"
#include "quant/rotation.h"

namespace tq {
namespace {

// Added to the moments of a branch, relative to their mean eigenvalue. It bounds the condition of
// S by 1e6 times that of the other moment; a direction that carries less is noise to 4 bits.
constexpr double kMomentRidge = 1e-6, kSmallestMoment = 1e-30;

MatrixRM symmetric_part(const MatrixRM& m) {
  return 0.5 * (m + m.transpose());
}

// basis diag(values) basis^T.
MatrixRM from_spectrum(const MatrixRM& basis, const Eigen::VectorXd& values) {
  return basis * values.asDiagonal() * basis.transpose();
}

// Logarithms of singular values, clipped to a range of log(max_condition) around their middle.
Eigen::VectorXd clip_logs(const Eigen::VectorXd& log, double max_condition) {
  const double middle = 0.5 * (log.maxCoeff() + log.minCoeff());
  const double half = 0.5 * std::log(max_condition);
  return log.array().max(middle - half).min(middle + half);
}

// Shortens a step to the cap of the options.
void cap_step(MatrixRM& step, double max_step) {
  const double length = step.norm();
  if (length > max_step) step *= max_step / length;
}

void check_options(const MatrixRM& g, const GaugeOptions& options) {
  TQ_CHECK(g.rows() == g.cols() && options.max_condition > 1 && options.descent.max_step > 0);
}

MatrixRM regularised(const MatrixRM& moment, double ridge) {
  const int64_t r = moment.rows();
  const double mean = moment.trace() / static_cast<double>(r);
  // An empty branch, or one that says as little: moments are sums in f32, noise down there.
  if (!(mean > kSmallestMoment)) return MatrixRM::Identity(r, r);
  return symmetric_part(moment) + ridge * mean * MatrixRM::Identity(r, r);
}

// The inverse of a regularised moment. One direction that drowns the others leaves them with
// negative noise of f32, more than the usual ridge then.
MatrixRM regular_inverse(const MatrixRM& moment) {
  const MatrixRM one = MatrixRM::Identity(moment.rows(), moment.cols());
  for (double ridge = kMomentRidge; ridge <= 1; ridge *= 10) {
    const Eigen::LLT<MatrixRM> cholesky(regularised(moment, ridge));
    if (cholesky.info() != Eigen::Success) continue;
    const MatrixRM inverse = symmetric_part(cholesky.solve(one));
    if (Eigen::LLT<MatrixRM>(inverse).info() == Eigen::Success) return inverse;
  }
  return one;
}

MatrixRM random_hadamard(int64_t r, uint64_t seed, uint64_t stream) {
  const Rotation rotation = Rotation::random_hadamard(r, seed, stream);
  MatrixRM p = MatrixRM::Identity(r, r);
  for (int64_t i = 0; i < r; ++i) apply_transform(rotation.transform, p.row(i).data(), false);
  return p;
}

}  // namespace

MatrixRM gauge_gradient(const MatrixRM& g_a, const MatrixRM& a, const MatrixRM& b,
                        const MatrixRM& g_b) {
  return g_a * a.transpose() - b.transpose() * g_b;
}

void GaugeStep::apply(MatrixRM& a, MatrixRM& b) const {
  a = k * a;
  b = b * k_inverse;
}

MultiplicativeGauge::MultiplicativeGauge(const MatrixRM& g, const GaugeOptions& options)
    : options_(options), descent_(options.descent), g_(g) {
  check_options(g, options);
}

GaugeStep MultiplicativeGauge::step(const MatrixRM& z) {
  MatrixRM exponent = descent_.step(z, z.squaredNorm());
  cap_step(exponent, options_.descent.max_step);
  GaugeStep step{exponent.exp(), (-exponent).exp()};
  g_ = step.k * g_;
  // Singular values of G from G G^T: their squared ratio stays near max_condition^2, far from the
  // 2^53 at which this would lose the small ones.
  const Eigen::SelfAdjointEigenSolver<MatrixRM> eigen(g_ * g_.transpose());
  const Eigen::VectorXd log = 0.5 * eigen.eigenvalues().array().log();
  const Eigen::VectorXd change = clip_logs(log, options_.max_condition) - log;
  if (change.cwiseAbs().maxCoeff() > 0) {
    const MatrixRM clip = from_spectrum(eigen.eigenvectors(), change.array().exp());
    step.k = clip * step.k;
    step.k_inverse = step.k_inverse * from_spectrum(eigen.eigenvectors(), (-change).array().exp());
    g_ = clip * g_;
  }
  return step;
}

PolarGauge::PolarGauge(const MatrixRM& g, const GaugeOptions& options)
    : options_(options),
      rotation_({Metric::kEuclidean, Retraction::kCayley, options.descent}),
      stretch_(options.descent),
      p_(nearest_orthogonal(g)) {
  check_options(g, options);
  const Eigen::SelfAdjointEigenSolver<MatrixRM> eigen(symmetric_part(p_.transpose() * g));
  TQ_CHECK(eigen.eigenvalues().minCoeff() > 0, "G is singular");
  basis_ = eigen.eigenvectors();
  log_ = eigen.eigenvalues().array().log();
}

MatrixRM PolarGauge::g() const {
  return p_ * from_spectrum(basis_, log_.array().exp());
}

void PolarGauge::set_lr(double lr) {
  rotation_.set_lr(lr);
  stretch_.set_lr(lr);
}

GaugeStep PolarGauge::step(const MatrixRM& z) {
  const MatrixRM old_p = p_, old_s = from_spectrum(basis_, log_.array().exp());
  const MatrixRM old_s_inverse = from_spectrum(basis_, (-log_).array().exp());
  const MatrixRM d_p = z * old_p;
  const MatrixRM d_s = symmetric_part(old_p.transpose() * d_p * old_s_inverse);
  rotation_.step(p_, d_p);

  const MatrixRM d_y = exponential_gradient(basis_, log_, d_s);
  MatrixRM move = stretch_.step(d_y, d_y.squaredNorm());
  cap_step(move, options_.descent.max_step);
  const Eigen::SelfAdjointEigenSolver<MatrixRM> eigen(from_spectrum(basis_, log_) + move);
  basis_ = eigen.eigenvectors();
  log_ = clip_logs(eigen.eigenvalues(), options_.max_condition);

  const MatrixRM s_inverse = from_spectrum(basis_, (-log_).array().exp());
  return {g() * old_s_inverse * old_p.transpose(), old_p * old_s * s_inverse * p_.transpose()};
}

MatrixRM exponential_gradient(const MatrixRM& basis, const Eigen::VectorXd& log,
                              const MatrixRM& d) {
  MatrixRM inner = basis.transpose() * d * basis;
  for (int64_t i = 0; i < inner.rows(); ++i) {
    for (int64_t j = 0; j < inner.cols(); ++j) {
      // (e^li - e^lj) / (li - lj) without cancellation.
      const double h = 0.5 * (log(i) - log(j));
      const double ratio = std::fabs(h) < 1e-4 ? 1.0 + h * h / 6.0 : std::sinh(h) / h;
      inner(i, j) *= std::exp(0.5 * (log(i) + log(j))) * ratio;
    }
  }
  return symmetric_part(basis * inner * basis.transpose());
}

MatrixRM geometric_mean(const MatrixRM& c, const MatrixRM& d) {
  // With C = L L^T: X = L (L^-1 D L^-T)^(1/2) L^T, symmetric, and X C^-1 X = D.
  const Eigen::LLT<MatrixRM> cholesky(c);
  TQ_CHECK(cholesky.info() == Eigen::Success, "C is not positive definite");
  const MatrixRM half = cholesky.matrixL().solve(d);
  const MatrixRM inner = cholesky.matrixL().solve(half.transpose());
  const Eigen::SelfAdjointEigenSolver<MatrixRM> eigen(symmetric_part(inner));
  const MatrixRM root =
      from_spectrum(eigen.eigenvectors(), eigen.eigenvalues().array().max(0.0).sqrt());
  const MatrixRM l = cholesky.matrixL();
  return symmetric_part(l * root * l.transpose());
}

MatrixRM closed_form_gauge(const MatrixRM& c_h, const MatrixRM& c_b, double max_condition,
                           uint64_t seed, uint64_t stream) {
  const int64_t r = c_h.rows();
  TQ_CHECK(c_h.cols() == r && c_b.rows() == r && c_b.cols() == r && max_condition >= 1);
  const MatrixRM s = geometric_mean(regular_inverse(c_h), regularised(c_b, kMomentRidge));
  const Eigen::SelfAdjointEigenSolver<MatrixRM> eigen(s);
  const Eigen::VectorXd log = clip_logs(0.5 * eigen.eigenvalues().array().log(), max_condition);
  return random_hadamard(r, seed, stream) * from_spectrum(eigen.eigenvectors(), log.array().exp());
}

}  // namespace tq
