// gl - descent over GL(r), the change of basis inside a low-rank branch.
//
// A branch B A (A [r, in], B [out, r]) is stored and rounded as A' = G A, B' = B G^-1. Any
// invertible G gives the same product before rounding, so G is free to choose the basis in which
// the two factors and the intermediate x A'^T round best (TwinQuant, arXiv 2606.01556).
//
// The gradient is taken in the Lie algebra: with g_A, g_B the gradients of a loss with respect to
// A' and B',
//     Z = (dL/dG) G^T = g_A A'^T - B'^T g_B     [r, r], no inverse.
// Z vanishes identically when nothing is rounded: it is driven by the rounding errors only.
//
// Two parametrisations of the same group, with the same interface:
//   MultiplicativeGauge  G <- exp(-lr Z) G.
//   PolarGauge           G = P S, P in O(r), S = exp(Y), Y symmetric. dL/dP = (dL/dG) S = Z P;
//                        dL/dS = sym(P^T Z P S^-1), pulled back to Y by Daleckii and Krein.
// S balances the energy of the factors, P spreads it. cond(G) stays below a bound in both.
//
// Not here: rounding and its gradients. Read next: stiefel.h.
#pragma once

#include <cstdint>

#include "quant/descent.h"
#include "quant/eigen.h"
#include "quant/stiefel.h"

namespace tq {

/// Z [r, r] from g_a, a [r, in] and b, g_b [out, r]; a and b are A' and B', unrounded where the
/// gradients are straight-through.
MatrixRM gauge_gradient(const MatrixRM& g_a, const MatrixRM& a, const MatrixRM& b,
                        const MatrixRM& g_b);

/// A change of G: G <- k G, A' <- k A', B' <- B' k_inverse.
struct GaugeStep {
  MatrixRM k, k_inverse;  // [r, r]
  void apply(MatrixRM& a, MatrixRM& b) const;
};

struct GaugeOptions {
  DescentOptions descent;
  double max_condition = 100;  // of G
};

class MultiplicativeGauge {
 public:
  MultiplicativeGauge(const MatrixRM& g, const GaugeOptions& options);

  /// One step against Z, the gradient at the present A' and B'.
  GaugeStep step(const MatrixRM& z);
  const MatrixRM& g() const { return g_; }
  void set_lr(double lr) { descent_.set_lr(lr); }
  /// Everything but the options (quant/archive.h).
  template <typename Archive>
  void transfer(Archive& archive) {
    archive.matrix(g_);
    descent_.transfer(archive);
  }

 private:
  GaugeOptions options_;
  Descent descent_;
  MatrixRM g_;
};

class PolarGauge {
 public:
  /// Starts at the polar factors of g.
  PolarGauge(const MatrixRM& g, const GaugeOptions& options);

  GaugeStep step(const MatrixRM& z);
  MatrixRM g() const;
  void set_lr(double lr);

 private:
  GaugeOptions options_;
  StiefelOptimizer rotation_;  // moves p_
  Descent stretch_;            // moves Y
  MatrixRM p_;                 // [r, r] orthogonal
  MatrixRM basis_;             // [r, r] eigenvectors of Y, in columns
  Eigen::VectorXd log_;        // eigenvalues of Y; log cond(G) = max - min
};

/// exp(Y) for a symmetric Y = basis diag(log) basis^T: the gradient with respect to Y of a loss
/// whose gradient with respect to exp(Y) is the symmetric d (Daleckii, Krein 1965).
MatrixRM exponential_gradient(const MatrixRM& basis, const Eigen::VectorXd& log, const MatrixRM& d);

/// The matrix geometric mean C # D of symmetric positive definite C, D [r, r]: the positive
/// definite solution X of X C^-1 X = D (Pusz, Woronowicz 1975).
MatrixRM geometric_mean(const MatrixRM& c, const MatrixRM& d);

/// A start for G from c_h = H^T H / tokens, H = X A^T, and c_b = B^T B / out of the branch, both
/// [r, r] and possibly singular. Where the noise of rounding is proportional to the energy rounded,
/// the noise of the branch is proportional to tr(S c_h) tr(S^-1 c_b) with S = G^T G. Its minimiser
/// is S = c_h^-1 # c_b, its minimum the squared nuclear norm of H B^T, over tokens and out.
/// G = P S^(1/2), P a random Hadamard matrix (in blocks where r has none) that spreads the energy
/// evenly. The condition of G is at most max_condition.
MatrixRM closed_form_gauge(const MatrixRM& c_h, const MatrixRM& c_b, double max_condition,
                           uint64_t seed, uint64_t stream);

}  // namespace tq
