// quantize_layer - one decoder layer from f32 weights to stored linears.
//
// The heart of every method: fold the layer into its basis, then for each linear split off the
// low-rank branch and round what remains. Read next: pipeline.h, which feeds it layer after layer.
#pragma once

#include "model/weights.h"
#include "quant/calibrate.h"
#include "quant/distortion.h"
#include "quant/options.h"
#include "quant/rotation.h"

namespace tq {

/// Rotations shared by all layers. Inactive transforms for Basis::kNone.
struct ModelBasis {
  ModelBasis(const QuantizeOptions& options, const Config& config);
  Rotation residual;  // of the residual stream
  Rotation down;      // before w_down, at run time

  /// Sizes whose Hadamard matrix we cannot build, as a sentence; empty when all could.
  std::string fallback_note(const Config& config) const;
};

struct QuantizedLayer {
  OwnedLayer layer;
  std::vector<LinearReport> reports;  // one a linear, in kLayerLinears order
};

/// Layer `index` of the model in f32, in the given basis.
FloatLayer fold_layer(const Model& model, int64_t index, const QuantizeOptions& options,
                      const ModelBasis& basis);

/// Rounds a folded layer. grams: inputs of its linears; required by GPTQ, otherwise used for the
/// report if given. `stop` is called between linears and throws to abandon the layer.
QuantizedLayer quantize_layer(const FloatLayer& folded, int64_t index,
                              const QuantizeOptions& options, const Config& config,
                              LayerGrams* grams, const std::function<void()>& stop);

}  // namespace tq
