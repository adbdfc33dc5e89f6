// learn - the bases of a model, by descent on the layer-output loss.
//
//   kLearned    one orthogonal Q for the residual stream (SpinQuant's R1, TwinQuant's Q) and one
//               rotation of the heads a layer (R2)
//   kLayerwise  one basis for every sublayer, 2 L + 1 in all (ReSpinQuant), started from a learned
//   Q split svd   Q, R2, and for every linear a G in GL(r) between the factors of its branch
//               (TwinQuant): A <- G A, B <- B G^-1
//
// A step visits a few layers with fresh tokens each (or, for the losses of predictions, the whole
// model with one sequence), sums the gradients, and moves every basis along its manifold. Not here:
// the losses (objective.h), what becomes of the result (learned_basis.h). Read next: learn.cpp,
// Learner::run().
#pragma once

#include <functional>

#include "quant/archive.h"
#include "quant/learned_basis.h"
#include "quant/quantize_layer.h"

namespace tq {

/// Inputs of all linears of the full-precision model for a few thousand tokens, in its own basis
/// (norm gains folded into the weights, the transform before w_down applied).
class InputBank {
 public:
  /// Tokens kept: 0.8 GB for the 30 layers of SmolLM2.
  static constexpr int64_t kTokens = 2048;

  InputBank(const Model& model, const Calibration& calibration, const Transform& down,
            Backend& backend, int threads, const std::function<void(int64_t layer)>& progress);
  /// Rows `tokens` of a site, [tokens.size(), n], without the power of two that makes the site's
  /// inputs ordinary where they are not (input_exponent(); linears read them, so losses relative to
  /// their outputs are the same).
  FloatMatrix gather(int64_t layer, Site site, const std::vector<int64_t>& tokens) const;
  int64_t n_tokens() const { return n_tokens_; }
  int64_t sample_length() const { return length_; }  // tokens of one sample are neighbours

 private:
  std::vector<std::array<FloatMatrix, 4>> inputs_;  // [layer][site]
  int64_t n_tokens_ = 0, length_ = 0;
};

struct LearnHooks {
  /// After each step: loss of its layers, averaged over recent steps.
  std::function<void(int64_t step, int64_t n_steps, double loss)> progress;
  std::function<void()> stop;  // throws to abandon
  /// The weights of a layer have been copied out of the source (its mapped pages may go). Optional.
  std::function<void(int64_t layer)> loaded = nullptr;
  /// Before the first step: transfers a state that `keep` was given, if there is one, and says so.
  /// The descent goes on from there to the same bits. Optional, as is `keep`.
  std::function<bool(const Transfer&)> restore = nullptr;
  /// After each step, and once more (`leaving`) when `stop` has thrown: the state after the last
  /// whole step, which a transfer into an archive keeps.
  std::function<void(const Transfer&, bool leaving)> keep = nullptr;
};

struct LearnResult {
  LearnedBasis basis;
  std::vector<double> losses;      // one a step
  double orthogonality_error = 0;  // largest |B^T B - I| of all bases
};

struct LearnInputs {
  const Model& model;
  const Calibration& calibration;
  const InputBank* bank;  // null: not needed, for the losses of predictions
  const Transform& down;  // before w_down
};

/// Learns what options.basis asks for from options.seed; same bits for any number of threads.
LearnResult learn_basis(const LearnInputs& inputs, const QuantizeOptions& options,
                        const LearnHooks& hooks);

}  // namespace tq
