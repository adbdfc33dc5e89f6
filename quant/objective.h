// objective - how much rounding in given bases hurts a model, and the gradient. The losses:
//
//   layer_loss       for every linear, ||y' - y||^2 / ||y||^2 over some tokens, where y is the
//                    output of the original weight and y' that of the rounded weight (and branch)
//                    on the rounded input; the mean over the seven linears
//   block_loss       the same for what attention and FFN add to the stream; the mean of the two
//   prediction_loss  of the next-token predictions of the whole model: KL(original || rounded), or
//                    the cross entropy of the next tokens of the text
//
// The first two take the inputs of the full-precision model, so layers are independent problems.
// docs/method.md, section 5, compares them. Outputs are compared in the original basis, because a
// target that turns with the basis has a gradient too, which cancels most of the output's.
// Not here: the descent (learn.h). Read next: rounded_layer.h.
#pragma once

#include <array>
#include <functional>
#include <span>
#include <vector>

#include "quant/rounded_layer.h"

namespace tq {

struct LayerProblem {
  const FloatLayer* layer = nullptr;  // norm gains folded, w_down transformed, not rotated
  std::array<FloatMatrix, 4> inputs;  // by Site, [tokens, n]; the last transformed like w_down
  LayerBases bases;
  std::array<BranchLeaf, kNLinears> branches;  // null: none; the layer's weights are residuals then
  std::array<const FloatMatrix*, kNLinears> originals = {};  // with branches: what y comes from
};

/// The loss; adds its gradient to the leaves.
double layer_loss(const LayerProblem& problem, const LayerContext& context,
                  const QuantizeOptions& options);

/// problem.inputs: of neighbouring tokens, to which attention is confined. No branches.
double block_loss(const LayerProblem& problem, const LayerContext& context,
                  const QuantizeOptions& options);

struct PredictionProblem {
  std::span<const int32_t> tokens;  // one sequence
  const Matrix* tok_embed = nullptr;
  const FloatMatrix* head = nullptr;  // [vocab, dim], the final norm's gain folded
  int64_t n_layers = 0;
  /// A layer as in LayerProblem; valid until another is asked for.
  std::function<const FloatLayer&(int64_t index)> layer;
  std::vector<LayerBases> bases;  // of every layer
};

/// Cross entropy where options.loss asks for it (the last token is only predicted), else KL.
double prediction_loss(const PredictionProblem& problem, const LayerContext& context,
                       const QuantizeOptions& options);

}  // namespace tq
