// quantize_layer - one decoder layer from f32 weights to stored linears.
//
// The heart of every method: fold the layer into its basis, then for each linear split off the
// low-rank branch and round what remains. Read next: pipeline.h, which feeds it layer after layer.
#pragma once

#include "model/weights.h"
#include "quant/calibrate.h"
#include "quant/distortion.h"
#include "quant/learned_basis.h"
#include "quant/options.h"
#include "quant/rotation.h"

namespace tq {

/// The bases that layers are folded into. Inactive transforms for Basis::kNone.
class ModelBasis {
 public:
  /// Hadamard rotations; with a basis that is learned, only the one before w_down.
  ModelBasis(const QuantizeOptions& options, const Config& config);
  ModelBasis(const ModelBasis&) = delete;
  /// Takes what was learned; options.basis_rank decides the steps between sublayer bases.
  void deploy(LearnedBasis learned, const QuantizeOptions& options);

  /// Of the residual stream behind the embedding, and before the final norm.
  Transform input() const;
  Transform output() const;
  const Transform& down() const { return down_.transform; }  // before w_down, at run time
  const DeployedBasis* learned() const { return deployed_ ? &*deployed_ : nullptr; }
  /// The branch learned for a linear, in the original basis; null without.
  const LowRank* branch(int64_t layer, int linear) const;

  /// Sizes whose Hadamard matrix we cannot build, as a sentence; empty when all could.
  std::string fallback_note(const Config& config) const;

 private:
  Rotation residual_, down_;
  std::optional<DeployedBasis> deployed_;
  std::vector<std::array<LowRank, kNLinears>> branches_;
  OwnedMatrix first_, last_;  // learned: the dense bases as stored
};

struct QuantizedLayer {
  OwnedLayer layer;
  std::vector<LinearReport> reports;  // one a linear, in kLayerLinears order
};

/// Layer `index` of the model in f32, in the given basis.
FloatLayer fold_layer(const Model& model, int64_t index, const QuantizeOptions& options,
                      const ModelBasis& basis);

/// Rounds a folded layer. stats: inputs of its linears; required by GPTQ, otherwise used for the
/// report if given. `stop` is called between linears and throws to abandon the layer.
QuantizedLayer quantize_layer(const FloatLayer& folded, int64_t index,
                              const QuantizeOptions& options, const Config& config,
                              const ModelBasis& basis, LayerStats* stats,
                              const std::function<void()>& stop);

}  // namespace tq
