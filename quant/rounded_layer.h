// rounded_layer - one transformer layer on a tape, rounded in given bases, or as it was.
//
// Whatever enters or leaves is in the original basis: a site's input is turned into its basis and
// rounded there, a linear's output turned back. The runtime folds those turns into the neighbouring
// weights (learned_basis.h); here they stay visible, so that every loss compares the same things.
// Not here: the losses (objective.h), the layer as it is stored (refine.h).
#pragma once

#include "cpu/autodiff.h"
#include "cpu/autodiff_rounding.h"
#include "cpu/hadamard.h"
#include "model/forward.h"
#include "quant/decompose.h"
#include "quant/options.h"

namespace tq {

/// The rounding of inputs as the tape does it.
GroupRounding rounding_of(const ActQuant& act);

/// An orthogonal matrix as the tape sees it, and where its gradient is summed.
struct BasisLeaf {
  const FloatMatrix* matrix = nullptr;
  float* gradient = nullptr;  // like matrix
};

/// The bases of a layer: attention reads `in` and writes `mid`, the FFN reads `mid` and writes
/// `out`, [dim, dim]. With one global Q all three are the same and their gradients add up.
struct LayerBases {
  BasisLeaf in, mid, out;
  BasisLeaf heads;  // [head_dim, head_dim], between wv and wo
};

/// Low-rank factors that move along GL(r): A [r, in], B [out, r] with the original basis on their
/// outer sides.
struct BranchLeaf {
  const LowRank* factors = nullptr;
  float *gradient_a = nullptr, *gradient_b = nullptr;
};

/// What all layers share; outlives the tapes.
struct LayerContext {
  LayerContext(const Config& config, const Transform& down);
  const Config& config;
  RopeTable rope;
  FastTransform down;  // before w_down, whose weight is transformed already
};

class RoundedLayer {
 public:
  /// layer: norm gains folded, w_down transformed, not rotated; outlives the tape. bases: null for
  /// the original layer, nothing turned or rounded.
  RoundedLayer(Tape& tape, const FloatLayer& layer, const LayerBases* bases,
               const LayerContext& context, const QuantizeOptions& options);

  /// Input of a site, in its basis and rounded.
  Var input(Site site, const Var& x) const;
  /// w x for a linear that reads input(x); with the branch's output, if there is one. Without the
  /// power of two that was taken out of w (FloatLayer::exponents).
  Var output(LinearIndex index, const Var& rounded, const BranchLeaf& branch = {}) const;
  /// What a sublayer adds to the stream, from the normalised stream of whole sequences
  /// [1, n_sequences * rows, dim]. The FFN's last input is transformed by context.down.
  Var attention(const Var& x, int64_t n_sequences) const;
  Var ffn(const Var& x) const;

 private:
  /// y times the power of two that was taken out of the linear.
  Var powered(LinearIndex index, const Var& y) const;
  Var constant(const FloatMatrix& m) const;
  Var leaf(const BasisLeaf& basis) const;
  Var head_norm(const Var& x, const std::vector<float>& gain) const;

  Tape& tape_;
  const FloatLayer& layer_;
  const LayerContext& context_;
  bool rounds_;  // false: the original layer
  bool rounds_input_;
  GroupRounding weight_rounding_, branch_rounding_, input_rounding_[4], narrow_rounding_;
  Var in_, mid_, out_, heads_;  // of an original layer: empty
};

}  // namespace tq
