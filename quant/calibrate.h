// calibrate - hidden states of calibration text, moved through the model one layer at a time.
//
// One layer is in memory at a time; what stays is the residual stream of all tokens. The layers run
// unrounded: every layer sees the inputs of the full-precision model in the chosen basis (one
// stream; correcting each layer against errors of the ones before over-fits small samples).
// Not here: tokenisation (tools/cmd_quantize.cpp). Read next: pipeline.h.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "model/forward.h"
#include "quant/site_stats.h"

namespace tq {

/// Windows of equal length, cut from a tokenised text.
struct Calibration {
  std::vector<std::vector<int32_t>> samples;
  int64_t n_tokens() const;
  uint64_t hash() const;  // of all ids
};

/// Up to `n_samples` windows of `length` tokens that do not overlap, spread evenly over the text.
/// Throws kBadData when the text is shorter than one window or an id is outside the vocabulary;
/// `where` names the text.
Calibration cut_samples(const std::vector<int32_t>& ids, int64_t n_samples, int64_t length,
                        int64_t vocab_size, const std::string& where);

/// The text used without --calib: passages of the English Wikipedia, CC BY-SA 3.0, 330 kB.
std::string_view builtin_calibration_text();

/// Rows of the embedding in the basis of the stream, [n_tokens, dim].
FloatMatrix embed_tokens(const Matrix& table, const std::vector<int32_t>& tokens,
                         const Transform& residual, int threads);

class CalibrationStream {
 public:
  /// Embeds all samples. `residual` is the basis of the stream. References must outlive this.
  CalibrationStream(const Model& model, const Calibration& calibration, const Transform& residual,
                    Backend& backend, int threads);

  /// What is done with the inputs x [rows, cols] of a site, after the linears' own transform; the
  /// rows are those of one sample.
  using Sink = std::function<void(Site site, const float* x, int64_t rows, int64_t cols)>;
  /// Moves the stream through `layer`. sink: null to only move on. `stop` is asked between samples
  /// and throws to abandon the layer.
  void run_layer(const Layer& layer, const Sink& sink, const std::function<void()>& stop);

  /// The residual stream of all samples, [n_tokens, dim].
  const std::vector<float>& hidden() const { return hidden_; }

 private:
  Backend& backend_;
  Config config_;  // of a model with one layer: one layer's cache
  int threads_;
  int64_t length_;
  RopeTable rope_;
  std::vector<float> hidden_;  // [n_samples * length, dim]
  std::vector<float> host_;    // [length, widest site]
  Activations acts_;
  BufferPtr scratch_;  // [length, hidden_dim], for the transform before w_down
};

}  // namespace tq
