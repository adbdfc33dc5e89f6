// objective - how much rounding in a given basis hurts the outputs of one layer, and the gradient.
//
// The layer-output loss: for every linear, ||y' - y||^2 / ||y||^2 over some tokens, where y is the
// output of the original weight and y' that of the rounded weight (and branch) on the rounded
// input, turned back out of the learned basis; the mean over the seven linears. Inputs are those of
// the full-precision model, so layers are independent problems (docs/method.md, section 5).
//
// Bases are orthogonal matrices; the residual stream is x B. A sublayer reads in one basis and
// writes in the next: attention reads `in` and writes `mid`, the FFN reads `mid` and writes `out`.
// With one global Q all three are the same matrix and their gradients add up.
// Not here: the descent (learn.h). Read next: objective.cpp, layer_loss().
#pragma once

#include <array>
#include <vector>

#include "model/forward.h"
#include "quant/decompose.h"
#include "quant/options.h"

namespace tq {

/// An orthogonal matrix as the tape sees it, and where its gradient is summed.
struct BasisLeaf {
  const FloatMatrix* matrix = nullptr;
  float* gradient = nullptr;  // like matrix
};

/// Low-rank factors that move along GL(r): A [r, in], B [out, r] with the original basis on their
/// outer sides.
struct BranchLeaf {
  const LowRank* factors = nullptr;
  float *gradient_a = nullptr, *gradient_b = nullptr;
};

struct LayerProblem {
  const FloatLayer* layer = nullptr;  // norm gains folded, w_down transformed, not rotated
  std::array<FloatMatrix, 4> inputs;  // by Site, [tokens, n]; the last transformed like w_down
  BasisLeaf in, mid, out;             // [dim, dim]
  BasisLeaf heads;                    // [head_dim, head_dim]
  std::array<BranchLeaf, kNLinears> branches;  // null: none; the layer's weights are residuals then
  std::array<const FloatMatrix*, kNLinears> originals = {};  // with branches: what y comes from
};

/// The loss; adds its gradient to the leaves.
double layer_loss(const LayerProblem& problem, const QuantizeOptions& options);

}  // namespace tq
