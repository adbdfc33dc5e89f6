// stiefel - descent over matrices with orthonormal columns, St(n, p) = {X [n, p] : X^T X = I}.
//
// p = n is the orthogonal group O(n): rotations of the residual stream, of heads, of a rank space.
// p < n are orthonormal frames: the row space of a low-rank branch.
//
// Tangent vectors at X: xi [n, p] with X^T xi skew. With D the Euclidean gradient of a loss and
// sym(M) = (M + M^T) / 2:
//   Euclidean metric  <a, b> = tr a^T b                     gradient  D - X sym(X^T D)
//   canonical metric  <a, b> = tr a^T (I - X X^T / 2) b     gradient  D - X D^T X
// (Edelman, Arias, Smith 1998). On O(n) the two gradients are X A and 2 X A, A = skew(X^T D).
//
// Retractions R_X(xi), curves through X with velocity xi:
//   Cayley  (I - W/2)^-1 (I + W/2) X,  W = P xi X^T - X xi^T P skew [n, n],  P = I - X X^T / 2,
//           for which W X = xi (Wen, Yin 2013). p = n: W = X A X^T with A = X^T xi, so the result
//           is 2 X (I - A/2)^-1 - X, one LU and one product. p < n: W = U V^T has rank 2p; by
//           Woodbury a [2p, 2p] solve and O(n p^2) work.
//   fixed point  five rounds of Y <- X + W (X + Y) / 2 (Li, Fuxin, Todorovic 2020; SpinQuant). Its
//           error is at most (||W||/2)^5 ||W||^2 / 2, so every step needs a clean-up afterwards.
//   QR      the Q factor of X + xi with positive diagonal of R;  polar  its nearest orthonormal.
//
// Cayley is the default: on a CPU the LU (2/3 n^3) costs less than the rounds (2 n^3 each).
// Not here: where the gradients come from. Read next: subspace_rotation.h, gl.h.
#pragma once

#include <cstdint>

#include "quant/descent.h"
#include "quant/eigen.h"

namespace tq {

enum class Metric { kEuclidean, kCanonical };
enum class Retraction { kCayley, kCayleyFixedPoint, kQr, kPolar };

/// max |X^T X - I|.
double orthogonality_error(const MatrixRM& x);

/// The Q factor [n, p] of m with positive diagonal of R: orthonormal columns of the same nested
/// spans. m [n, p], n >= p, of full rank.
MatrixRM orthonormalise(const MatrixRM& m);

/// The polar factor of m [n, p], n >= p: the nearest matrix with orthonormal columns. Newton-Schulz
/// near the manifold (a few products), the SVD elsewhere. A singular m has several; one is taken.
MatrixRM nearest_orthogonal(const MatrixRM& m);

/// The orthogonal projection of any v [n, p] on the tangent space at x.
MatrixRM project_tangent(const MatrixRM& x, const MatrixRM& v);

/// The Riemannian gradient at x of a loss with Euclidean gradient d.
MatrixRM riemannian_gradient(const MatrixRM& x, const MatrixRM& d, Metric metric);

double inner_product(const MatrixRM& x, const MatrixRM& a, const MatrixRM& b, Metric metric);

/// R_x(xi) for a tangent xi. The fixed point form needs ||W|| < 2 and is meant for ||W|| <= 1.
MatrixRM retract(const MatrixRM& x, const MatrixRM& xi, Retraction retraction);

/// The Cayley step of a tangent xi at x as a rotation C of R^n, in its Woodbury form; for p < n/2.
class CayleyMap {
 public:
  CayleyMap(const MatrixRM& x, const MatrixRM& xi);

  /// C y, y [n, k]. C x is the retraction; C eta is the transport of a tangent vector eta from x to
  /// C x. C is orthogonal, so the transport is isometric in both metrics.
  MatrixRM apply(const MatrixRM& y) const;

 private:
  MatrixRM u_, v_;                    // [n, 2p], W = U V^T
  Eigen::PartialPivLU<MatrixRM> lu_;  // of I - V^T U / 2  [2p, 2p]
};

struct StiefelOptions {
  Metric metric = Metric::kEuclidean;
  Retraction retraction = Retraction::kCayley;
  DescentOptions descent;
};

/// Riemannian SGD (Cayley SGD with the defaults) or Adam on one matrix.
///
/// Momentum is transported: on O(n) it is kept as A = X^T xi, skew, which left translation carries
/// along unchanged (and which is the Cayley transport too); on St(n, p) by the Cayley map, or by
/// projection with the other retractions. X is cleaned up every kCleanUpInterval steps, and after
/// every step of the fixed point form, so rounding never accumulates.
class StiefelOptimizer {
 public:
  static constexpr int64_t kCleanUpInterval = 100;

  explicit StiefelOptimizer(const StiefelOptions& options);

  /// Moves x [n, p], n >= p, against the Euclidean gradient d [n, p] of the loss at x. Always the
  /// same matrix for one optimizer. An x that is orthonormal only to f32 is cleaned up first.
  void step(MatrixRM& x, const MatrixRM& d);

  void set_lr(double lr) { descent_.set_lr(lr); }
  /// The first moment: tangent at x [n, p] if p < n, skew [n, n] if p = n. Empty before a step.
  const MatrixRM& momentum() { return descent_.momentum(); }
  /// Everything but the options and the matrix that is moved (quant/archive.h).
  template <typename Archive>
  void transfer(Archive& archive) {
    archive.value(steps_);
    descent_.transfer(archive);
  }

 private:
  void step_square(MatrixRM& x, const MatrixRM& d);
  void step_tall(MatrixRM& x, const MatrixRM& d);
  void retract_in_place(MatrixRM& x, const MatrixRM& xi) const;
  double cap(double generator_norm) const;

  StiefelOptions options_;
  Descent descent_;
  int64_t steps_ = 0;
};

}  // namespace tq
