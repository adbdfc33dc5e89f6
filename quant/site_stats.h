// site_stats - what calibration remembers of the inputs of a layer's linears.
//
// A site is a place where linears read the same input X [tokens, n]. The linears see X' = X rounded
// to few bits, and three things follow from the pair:
//   gram     H = X'^T X', which GPTQ's walk and every least-squares fit need
//   drift    D = (X - X')^T X', from which weights are corrected for the rounding of their inputs
//   rounded  X' itself, where a branch is fitted to it
// Without correction X' = X and only `gram` is kept. Not here: where the inputs come from
// (calibrate.h). Read next: correct_weights() below, branch.h.
#pragma once

#include <memory>

#include "model/forward.h"
#include "quant/gptq.h"
#include "quant/options.h"
#include "quant/product.h"

namespace tq {

/// The site that a linear reads, by LinearIndex.
inline constexpr Site kSiteOf[kNLinears] = {Site::kAttnIn,  Site::kAttnIn, Site::kAttnIn,
                                            Site::kAttnOut, Site::kFfnIn,  Site::kFfnIn,
                                            Site::kFfnMid};

/// x [rows, cols] as a linear with this rounding sees it: scale * code.
void round_tokens(const float* x, int64_t rows, int64_t cols, const ActQuant& act, float* out,
                  int threads);

/// The clip factor, of a short list, with the smallest squared error of rounding x.
float search_clip(const float* x, int64_t rows, int64_t cols, const ActQuant& act, int threads);

class SiteStats {
 public:
  /// n: width of the site; group: of the inputs there (input_group).
  SiteStats(int64_t n, int64_t group, const QuantizeOptions& options);
  /// Adds inputs x [rows, n]. The first call decides the clip factor, and the power of two that all
  /// x lose where they are far from ordinary (input_exponent()): so do all of the below then.
  void add(const float* x, int64_t rows, int threads);

  const Gram& gram() const { return gram_; }
  const FloatMatrix& drift() const { return drift_; }      // [n, n], empty without correction
  const FloatMatrix& rounded() const { return rounded_; }  // [tokens, n], empty without a fit
  const ActQuant& act() const { return act_; }

 private:
  bool corrects_, fits_, searches_clip_;
  ActQuant act_;
  Gram gram_;
  FloatMatrix drift_, rounded_;
  std::vector<float> rounded_rows_, errors_, scaled_;
  int exponent_ = 0;
};

/// The four sites of a layer.
struct LayerStats {
  LayerStats(const Config& config, const QuantizeOptions& options);
  SiteStats& at(Site site) { return *sites[static_cast<size_t>(site)]; }
  std::unique_ptr<SiteStats> sites[4];
};

/// W' that minimises ||X W^T - X' W'^T||^2 + damping ||W - W'||^2 over the calibration tokens:
///   W' = W + W D (H + damping)^-1.
/// factor: of the site's gram. Source: the normal equations; docs/method.md, section 4.
FloatMatrix correct_weights(const FloatMatrix& w, const SiteStats& stats, const GptqFactor& factor,
                            int threads);

/// m (H + damping)^-1 = (m U^T) U with the factor's U. m [rows, n].
FloatMatrix solve_right(const FloatMatrix& m, const GptqFactor& factor, int threads);

}  // namespace tq
