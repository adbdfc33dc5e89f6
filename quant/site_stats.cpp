// site_stats - rounded inputs, their moments, and the correction of weights. See site_stats.h.
#include "quant/site_stats.h"

#include <algorithm>
#include <cmath>

#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "quant/magnitude.h"

namespace tq {
namespace {

// Clip factors tried. A rotated input has no outlier that a smaller one could serve.
constexpr float kClips[] = {1.0f, 0.975f, 0.95f, 0.925f, 0.9f, 0.875f, 0.85f};

}  // namespace

void round_tokens(const float* x, int64_t rows, int64_t cols, const ActQuant& act, float* out,
                  int threads) {
  if (act.bits >= 16) {
    std::copy_n(x, rows * cols, out);
    return;
  }
  const Kernels& kernels = kernels_for(best_isa());
  const int64_t group = std::min(act.group, cols);
  parallel_ranges(threads, rows, [&](int64_t begin, int64_t end, int) {
    std::vector<int8_t> codes(static_cast<size_t>(cols));
    for (int64_t row = begin; row < end; ++row) {
      const float unit = token_unit(kernels, x + row * cols, cols, act, codes.data());
      for (int64_t col = 0; col < cols; col += group) {
        const int64_t count = std::min(group, cols - col), at = row * cols + col;
        float scale = 0;
        kernels.round({x + at, count, act.bits, act.clip, act.codes, codes.data(), &scale, unit});
        for (int64_t i = 0; i < count; ++i) {
          out[at + i] = scale * static_cast<float>(codes[static_cast<size_t>(i)]);
        }
      }
    }
  });
}

float search_clip(const float* x, int64_t rows, int64_t cols, const ActQuant& act, int threads) {
  std::vector<float> rounded(static_cast<size_t>(rows * cols));
  float best = 1.0f;
  double best_error = INFINITY;
  for (float clip : kClips) {
    ActQuant tried = act;
    tried.clip = clip;
    round_tokens(x, rows, cols, tried, rounded.data(), threads);
    double error = 0;
    for (size_t i = 0; i < rounded.size(); ++i) {
      const double d = double{x[i]} - double{rounded[i]};
      error += d * d;
    }
    if (error < best_error) {
      best_error = error;
      best = clip;
    }
  }
  return best;
}

SiteStats::SiteStats(int64_t n, int64_t group, const QuantizeOptions& options)
    : corrects_(options.rounding == RoundingKind::kGptqCorrected && options.bits_a < 16),
      fits_(options.rounds_branch()),
      searches_clip_(options.act_codes == ActCodes::kAll && options.bits_a < 8),
      gram_(n) {
  act_.bits = options.bits_a;
  act_.group = group;
  act_.codes = options.act_codes;
  act_.two_level = options.two_level;
  if (corrects_) drift_ = {n, n, std::vector<float>(static_cast<size_t>(n * n))};
  if (fits_) rounded_ = {0, n, {}};
}

void SiteStats::add(const float* x, int64_t rows, int threads) {
  const int64_t n = gram_.size();
  if (gram_.n_rows() == 0) exponent_ = input_exponent({x, static_cast<size_t>(rows * n)});
  if (exponent_ != 0) {
    scaled_.resize(static_cast<size_t>(rows * n));
    for (size_t i = 0; i < scaled_.size(); ++i) scaled_[i] = std::ldexp(x[i], -exponent_);
    x = scaled_.data();
  }
  if (searches_clip_ && gram_.n_rows() == 0) act_.clip = search_clip(x, rows, n, act_, threads);
  if (!corrects_ && !fits_) {
    gram_.add(x, rows, threads);
    return;
  }
  rounded_rows_.resize(static_cast<size_t>(rows * n));
  round_tokens(x, rows, n, act_, rounded_rows_.data(), threads);
  gram_.add(rounded_rows_.data(), rows, threads);
  if (corrects_) {
    errors_.resize(rounded_rows_.size());
    for (size_t i = 0; i < errors_.size(); ++i) errors_[i] = x[i] - rounded_rows_[i];
    add_product_tn(errors_.data(), rounded_rows_.data(), rows, drift_, threads);
  }
  if (fits_) {
    rounded_.data.insert(rounded_.data.end(), rounded_rows_.begin(), rounded_rows_.end());
    rounded_.rows += rows;
  }
}

LayerStats::LayerStats(const Config& config, const QuantizeOptions& options) {
  const int64_t sizes[4] = {config.dim, config.q_dim(), config.dim, config.hidden_dim};
  for (int i = 0; i < 4; ++i) {
    const int64_t group = input_group(options, config, static_cast<Site>(i));
    sites[i] = std::make_unique<SiteStats>(sizes[i], group, options);
  }
}

FloatMatrix solve_right(const FloatMatrix& m, const GptqFactor& factor, int threads) {
  const FloatMatrix u{factor.n, factor.n, factor.u};
  if (factor.order.empty()) return product_nn(product_nt(m, u, threads), u, threads);
  FloatMatrix walked = m;
  for (int64_t i = 0; i < m.rows; ++i) {
    for (int64_t at = 0; at < m.cols; ++at) walked.row(i)[at] = m.row(i)[factor.column(at)];
  }
  walked = product_nn(product_nt(walked, u, threads), u, threads);
  FloatMatrix solved = walked;
  for (int64_t i = 0; i < m.rows; ++i) {
    for (int64_t at = 0; at < m.cols; ++at) solved.row(i)[factor.column(at)] = walked.row(i)[at];
  }
  return solved;
}

FloatMatrix correct_weights(const FloatMatrix& w, const SiteStats& stats, const GptqFactor& factor,
                            int threads) {
  FloatMatrix corrected = solve_right(product_nn(w, stats.drift(), threads), factor, threads);
  add(corrected, w);
  return corrected;
}

}  // namespace tq
