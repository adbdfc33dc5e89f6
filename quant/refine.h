// refine - the scales of a quantized model, refined end to end against the original's predictions.
//
// Everything before this step works layer by layer. Here the whole quantized model is on the tape,
// with its codes fixed and the scales of all groups (weights and branches) as parameters, and
// Adam lowers KL(original || quantized) of the next-token predictions over the calibration text.
// One scale for 64 weights leaves little room to over-fit, and costs no byte of the file.
//
// Memory: codes, a few f32 for each scale, the stream of one sequence before every layer, and one
// layer's activations (checkpoint() in cpu/autodiff.h). Not here: how the codes were found.
// Read next: refine.cpp, Student::layer().
#pragma once

#include <functional>
#include <vector>

#include "quant/calibrate.h"
#include "quant/quantize_layer.h"

namespace tq {

struct RefineInputs {
  const Model& source;
  const Calibration& calibration;
  /// Final residual stream of the original model over the calibration text, [n_tokens, dim], in the
  /// basis of the quantized model's last layer.
  const std::vector<float>& reference;
  const Transform& basis;         // of the stream at the embedding
  const Transform& output_basis;  // and before the final norm
};

struct RefineHooks {
  std::function<void(int64_t step, int64_t n_steps, double kl)> progress;
  std::function<void()> stop;  // throws to abandon
};

struct RefineResult {
  std::vector<double> losses;    // mean KL of each step's sequences, nats a token
  double before = 0, after = 0;  // KL of a few other sequences
  bool kept() const { return after < before; }
};

/// Refines the scales in `layers`. Where that does not lower the KL of sequences that the steps saw
/// last or not at all, the scales stay as they were.
RefineResult refine_scales(std::vector<OwnedLayer>& layers, const RefineInputs& inputs,
                           const QuantizeOptions& options, const RefineHooks& hooks);

}  // namespace tq
