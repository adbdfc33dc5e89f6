// descent - the step rules shared by the matrix manifolds: SGD with momentum, and Adam.
//
// Knows no geometry: a manifold hands in its Riemannian gradient with the squared norm, moves along
// the returned tangent vector, and transports momentum() to the new point. Where tangent vectors
// are written in a Lie algebra (O(n), GL(r)) momentum() is valid at every point as it is.
// Read next: stiefel.h, gl.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "quant/eigen.h"

namespace tq {

struct DescentOptions {
  double lr = 1e-2;
  double momentum = 0.0;           // decay of the first moment
  bool adam = false;               // false: m <- momentum m + g; true: Adam with bias correction
  double second_momentum = 0.999;  // decay of the second moment, Adam only
  bool per_entry = false;          // Adam with a second moment for every entry, see below
  /// Longest step, in the Frobenius norm of the generator (the matrix that is exponentiated or
  /// Cayley-transformed). 1 is SpinQuant's cap 1 / ||W|| in another norm; no plane turns by more
  /// than 1 / sqrt(2) rad, so a wild gradient or learning rate cannot throw the iterate far away.
  double max_step = 1.0;
};

/// Adam keeps ONE second moment a matrix, the running mean of <g, g>. A second moment an entry, or
/// a row, would scale the entries of a tangent vector differently: the result is not tangent, and
/// it depends on the basis, which is what we are learning. One scalar a manifold is what Becigneul
/// and Ganea (2019) prove to converge, and what geoopt does on Stiefel. Near a minimum a step has
/// length ~lr, so lower lr towards the end.
///
/// On O(n) and GL(r) steps are written in the Lie algebra, where `per_entry` is possible: second
/// moments of the entries of a skew matrix are symmetric, and a skew matrix scaled by them is skew.
/// The result still depends on the basis. A rotation has planes with gradients of very different
/// size, and per entry each turns at its own pace. Then lr is the angle of one entry, and a step
/// has length up to n lr.
class Descent {
 public:
  explicit Descent(const DescentOptions& options) : options_(options) {}

  /// The tangent step -lr * (direction), before the cap by max_step, which the manifold applies.
  MatrixRM step(const MatrixRM& gradient, double squared_norm) {
    if (momentum_.size() == 0) momentum_ = MatrixRM::Zero(gradient.rows(), gradient.cols());
    const double weight = options_.adam ? 1.0 - options_.momentum : 1.0;
    momentum_ = options_.momentum * momentum_ + weight * gradient;
    if (!options_.adam) return -options_.lr * momentum_;
    ++steps_;
    if (options_.per_entry) return step_per_entry(gradient);
    second_ = options_.second_momentum * second_ + (1.0 - options_.second_momentum) * squared_norm;
    const double t = static_cast<double>(steps_);
    const double first_bias = 1.0 - std::pow(options_.momentum, t);
    const double second_bias = 1.0 - std::pow(options_.second_momentum, t);
    // The guard only matters for a gradient of zero; it must not change the scale of small losses.
    const double length = std::sqrt(second_ / second_bias) + 1e-100;
    return -options_.lr / (first_bias * length) * momentum_;
  }

  MatrixRM& momentum() { return momentum_; }

  const DescentOptions& options() const { return options_; }
  void set_lr(double lr) { options_.lr = lr; }

  /// Everything but the options (quant/archive.h).
  template <typename Archive>
  void transfer(Archive& archive) {
    archive.matrix(momentum_);
    archive.value(second_);
    archive.matrix(seconds_);
    archive.value(steps_);
  }

 private:
  MatrixRM step_per_entry(const MatrixRM& gradient) {
    if (seconds_.size() == 0) seconds_ = MatrixRM::Zero(gradient.rows(), gradient.cols());
    seconds_ = options_.second_momentum * seconds_ +
               (1.0 - options_.second_momentum) * gradient.cwiseProduct(gradient);
    const double t = static_cast<double>(steps_);
    const double first_bias = 1.0 - std::pow(options_.momentum, t);
    const double second_bias = 1.0 - std::pow(options_.second_momentum, t);
    const auto length = (seconds_ / second_bias).cwiseSqrt().array() + 1e-30;
    return -options_.lr / first_bias * (momentum_.array() / length).matrix();
  }

  DescentOptions options_;
  MatrixRM momentum_;  // first moment, a tangent vector at the current point
  double second_ = 0;
  MatrixRM seconds_;  // per entry
  int64_t steps_ = 0;
};

}  // namespace tq
