// subspace_rotation - a rotation of R^n that turns few planes, applied at run time in O(n r).
//
// Between two bases of the residual stream, B_k and B_k+1, stands T = B_k^T B_k+1. T is orthogonal,
// hence normal: it turns mutually orthogonal planes by angles theta_k. Its approximation
//     T^ = I + U M U^T,   M = R - I,   U [n, r] orthonormal, R [r, r] orthogonal
// keeps the r/2 planes with the largest angles and leaves the others alone (ReSpinQuant, arXiv
// 2604.11080, which finds the same planes by the SVD of T - I). Then
//     ||T - T^||_F^2 = sum over the dropped planes of 8 sin^2(theta / 2).
// T^ is exactly orthogonal, so a chain B'_k+1 = B'_k T^_k of bases is exact in floating point;
// to take T^ as if it were T is not.
// Not here: how the bases are learned (stiefel.h) or folded (rotation.h).
#pragma once

#include <cstdint>

#include "quant/eigen.h"

namespace tq {

struct SubspaceRotation {
  MatrixRM u;  // [n, r], orthonormal columns
  MatrixRM m;  // [r, r], R - I

  /// T^ [n, n].
  MatrixRM dense() const;
};

/// The best T^ of rank r <= n for an orthogonal T [n, n]. `second_moment` E[x^T x] [n, n] of the
/// rows x that will be rotated weights the planes by the energy in them, E||x (T - T^)||^2; null
/// means all alike. det T^ = det T (r >= 1), so that a chain stays in one component: a rotation is
/// approximated by a rotation. An odd r, or one that ends inside a plane, wastes the last column.
/// Costs a symmetric eigenproblem, about 10 n^3.
SubspaceRotation low_rank_rotation(const MatrixRM& t, int64_t r,
                                   const MatrixRM* second_moment = nullptr);

}  // namespace tq
