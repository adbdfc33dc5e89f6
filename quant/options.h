// options - what `tq quantize` can do: three independent parts, and methods as presets of them.
//
//   basis          none | hadamard | learned | a learned one per sublayer   (rotation.h, learn.h)
//   decomposition  none | branch by SVD | branch fitted to the rounding's error  (decompose.h,
//                  branch.h)
//   rounding       store | nearest | GPTQ | GPTQ of corrected weights       (rounding.h, gptq.h)
// and, after all layers, a refinement of the scales (refine.h).
// A method of the literature is one choice of the three, so that what a comparison changes is
// exactly one of them. Read next: pipeline.h.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/forward.h"
#include "model/json.h"
#include "quant/owned.h"

namespace tq {

/// kLayerwise: one basis for every sublayer, joined by low-rank rotations of the residual stream.
enum class Basis { kNone, kHadamard, kLearned, kLayerwise };
/// kGptqCorrected: before GPTQ the weights are corrected, by least squares, for what the rounding
/// of the inputs does to the outputs.
enum class RoundingKind { kStore, kNearest, kGptq, kGptqCorrected };
/// Where a low-rank branch comes from: the leading part of the weight, or the error that rounding
/// the rest leaves over.
enum class Split { kSvd, kFit };

/// What a learned basis is to keep (objective.h): outputs of linears, or of attention and FFN, or
/// the model's predictions: near the original's (kKl), or near the text (kCrossEntropy).
enum class LearningLoss { kLayer, kBlock, kKl, kCrossEntropy };

/// Steps of learning a basis, unless told otherwise.
constexpr int64_t kLearningSteps = 200;

/// In place of columns: one scale a token, and at the input of wo one a head.
constexpr int64_t kTokenGroups = 0;

struct QuantizeOptions {
  std::string method;  // preset that the parts below started from
  Basis basis = Basis::kNone;
  RoundingKind rounding = RoundingKind::kNearest;
  bool act_order = false;  // GPTQ walks over columns with loud inputs first
  int64_t rank = 0;        // of the low-rank branch, 0 = none
  Split split = Split::kSvd;
  int branch_bits = 16;     // of its factors: 16, 8 or 4
  int64_t basis_rank = 32;  // kLayerwise: of the rotations between bases; dim = exact
  int bits_w =
      4;  // 3 (stored as 4), 4 or 8; 16 and 32 store the weights of the chosen basis unrounded
  int bits_a = 8;        // inputs of the linears at run time: 3, 4, 8, or 16 (not rounded)
  int64_t group = 64;    // columns per scale of the weights: 32, 64 or 128
  int64_t group_a = 64;  // columns per scale of the inputs, or kTokenGroups
  ActCodes act_codes = ActCodes::kSymmetric;  // of the inputs; for all codes clips are searched
  // A row's scales are whole multiples of one number (rounding.h), those of inputs of one of the
  // token (ActQuant): products need no other arithmetic than that of integers.
  bool two_level = false;
  // 4, 8, 16, or 32 (an f32 source stays f32). Equal for tied embeddings: the file holds one table.
  int embed_bits = 16, head_bits = 16;
  int kv_bits = 16;  // of the KV cache, unless who runs the model asks for others: 16, 8 or 4
  std::vector<std::string> keep;  // regular expressions of linears to keep at 16 bits
  uint64_t seed = 0;
  int64_t calib_samples = 64, calib_length = 512;
  int64_t steps = 0;  // of learning the basis
  LearningLoss loss = LearningLoss::kLayer;
  int64_t refine_steps = 0;  // of refining the scales against the original model's predictions
  int threads = 1;

  bool uses_gptq() const {
    return rounding == RoundingKind::kGptq || rounding == RoundingKind::kGptqCorrected;
  }
  bool learns_basis() const { return basis == Basis::kLearned || basis == Basis::kLayerwise; }
  /// Learning sees the whole model and the tokens behind its last layer.
  bool learns_from_predictions() const {
    return learns_basis() && (loss == LearningLoss::kKl || loss == LearningLoss::kCrossEntropy);
  }
  /// The branch is rounded with knowledge of the inputs, all of which are kept for that.
  bool rounds_branch() const { return rank > 0 && branch_bits < 16 && uses_gptq(); }
  bool needs_calibration() const { return uses_gptq() || learns_basis() || refine_steps > 0; }
  /// A 16-bit copy of the source: nothing is transformed or rounded.
  bool copies_weights() const {
    return rounding == RoundingKind::kStore && basis == Basis::kNone && rank == 0;
  }
};

/// Names of the methods that exist, "none, rtn, ...".
std::string method_names();
/// Defaults of a method. Throws kUsage for an unknown name.
QuantizeOptions method_preset(const std::string& method);
/// Throws kUsage when options contradict each other or the model (rank over a dimension, ...).
void check_options(const QuantizeOptions& options, const Config& config);
/// The options that decide the bytes of the file, for its header and for resuming. No paths.
Json describe_options(const QuantizeOptions& options);

/// Columns per scale of the inputs at a site.
int64_t input_group(const QuantizeOptions& options, const Config& config, Site site);

/// How one linear is stored.
struct LinearPlan {
  std::string name;  // "layers.0.wq"
  int64_t out = 0, in = 0;
  bool keep = false;
};
/// Linears of one layer. `keep` spreads over linears that share an input (q, k, v; gate, up): a
/// shared input is rounded once, or not at all. Throws kUsage for an invalid expression.
std::vector<LinearPlan> plan_layer(const QuantizeOptions& options, const Config& config,
                                   int64_t layer);

/// Bytes of one linear in the file (weight, scales and branch).
uint64_t linear_bytes(const QuantizeOptions& options, const LinearPlan& plan);

}  // namespace tq
