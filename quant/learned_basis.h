// learned_basis - learned orthogonal matrices, and how a layer is folded into them.
//
// The residual stream is x B. One global B folds like a Hadamard rotation (rotation.h). With a
// basis for every sublayer, B_0 .. B_2L, the stream must change from B_k to B_k+1 where a
// sublayer's output is added: x <- x B_k^T B_k+1, a rank-r rotation I + U (R - I) U^T of the stream
// at run time (subspace_rotation.h). Truncated to rank r it no longer reaches B_k+1, so the bases
// that are deployed are defined by the chain of the truncated rotations: the unrounded model stays
// exact at any rank, and each step aims at the learned basis again. Not here: how the bases are
// learned (learn.h). Source: ReSpinQuant, arXiv 2604.11080; the exact chain is ours
// (docs/method.md, section 6). Read next: learned_basis.cpp.
#pragma once

#include <array>
#include <vector>

#include "quant/decompose.h"
#include "quant/eigen.h"
#include "quant/owned.h"

namespace tq {

struct LearnedBasis {
  std::vector<MatrixRM> residual;  // [dim, dim]: one, or 2 L + 1 in the order of the stream
  std::vector<MatrixRM> heads;     // [head_dim, head_dim], one a layer
  // Branches whose G was learned, in the original basis: [layer][linear], or empty.
  std::vector<std::array<LowRank, kNLinears>> branches;
};

/// x <- x + (x A^T) B^T, where a sublayer's output is added.
struct BasisStep {
  FloatMatrix a, b;  // [r, dim], [dim, r]
};

/// Bases as deployed.
struct DeployedBasis {
  DeployedBasis() = default;
  /// rank: of the steps between sublayer bases; dim or more is exact.
  DeployedBasis(const LearnedBasis& learned, int64_t rank);

  bool layerwise() const { return residual.size() > 1; }
  /// Basis in which sublayer `index` (2 l: attention, 2 l + 1: FFN) reads; index 2 L: the output's.
  const FloatMatrix& at(int64_t index) const {
    return residual[layerwise() ? static_cast<size_t>(index) : 0];
  }

  std::vector<FloatMatrix> residual;  // [dim, dim]
  std::vector<FloatMatrix> heads;     // [head_dim, head_dim]
  std::vector<BasisStep> steps;       // 2 L if layerwise, else none
};

FloatMatrix to_float(const MatrixRM& m);
MatrixRM to_double(const FloatMatrix& m);

/// Each block of r.cols columns of w, or of r.rows rows, times a rotation: w <- w diag(r, r, ..),
/// or diag(r, r, ..)^T w.
void rotate_columns_blockwise(FloatMatrix& w, const FloatMatrix& r, int threads);
void rotate_rows_blockwise(FloatMatrix& w, const FloatMatrix& r, int threads);

/// Folds a layer whose norm gains are folded already, and whose w_down is transformed, into its
/// bases.
void fold_into_basis(FloatLayer& layer, int64_t index, const DeployedBasis& basis, int threads);
/// The same for the factors of a branch of linear `linear`.
void fold_branch(LowRank& branch, LinearIndex linear, int64_t index, const DeployedBasis& basis,
                 int threads);

}  // namespace tq
