// calibrate - the calibration stream. See calibrate.h.
#include "quant/calibrate.h"

#include <xxhash.h>

#include <algorithm>

#include "model/error.h"
#include "quant/rotation.h"

namespace tq {
namespace {

constexpr char kBuiltinText[] =
#include "quant/calibration_text.inc"
    ;

Config one_layer(Config config) {
  config.n_layers = 1;
  return config;
}

}  // namespace

std::string_view builtin_calibration_text() {
  return {kBuiltinText, sizeof kBuiltinText - 1};
}

int64_t Calibration::n_tokens() const {
  int64_t count = 0;
  for (const auto& sample : samples) count += static_cast<int64_t>(sample.size());
  return count;
}

uint64_t Calibration::hash() const {
  uint64_t hash = 0;
  for (const auto& sample : samples) {
    hash = XXH3_64bits_withSeed(sample.data(), sample.size() * sizeof(int32_t), hash);
  }
  return hash;
}

Calibration cut_samples(const std::vector<int32_t>& ids, int64_t n_samples, int64_t length,
                        int64_t vocab_size, const std::string& where) {
  TQ_CHECK(n_samples > 0 && length > 0);
  const int64_t n_windows = static_cast<int64_t>(ids.size()) / length;
  if (n_windows == 0) {
    throw Error(ErrorKind::kBadData, "calibration text is too short", where,
                std::to_string(ids.size()) + " tokens, one sample needs " + std::to_string(length),
                "use a longer text or lower --calib-length");
  }
  for (int32_t id : ids) {
    if (id < 0 || id >= vocab_size) {
      throw Error(ErrorKind::kBadData, "token id out of range", where,
                  std::to_string(id) + " is not in 0.." + std::to_string(vocab_size - 1));
    }
  }
  Calibration calibration;
  n_samples = std::min(n_samples, n_windows);
  for (int64_t i = 0; i < n_samples; ++i) {
    const auto begin = ids.begin() + i * n_windows / n_samples * length;
    calibration.samples.emplace_back(begin, begin + length);
  }
  return calibration;
}

FloatMatrix embed_tokens(const Matrix& table, const std::vector<int32_t>& tokens,
                         const Transform& residual, int threads) {
  FloatMatrix rows{std::ssize(tokens), table.cols, {}};
  rows.data.resize(tokens.size() * static_cast<size_t>(table.cols));
  for (int64_t i = 0; i < rows.rows; ++i) {
    matrix_row_f32(table, tokens[static_cast<size_t>(i)], rows.row(i));
  }
  transform_rows(rows, residual, 1, threads);
  return rows;
}

CalibrationStream::CalibrationStream(const Model& model, const Calibration& calibration,
                                     const Transform& residual, Backend& backend, int threads)
    : backend_(backend),
      config_(one_layer(model.config)),
      threads_(threads),
      length_(static_cast<int64_t>(calibration.samples.front().size())),
      acts_(backend, config_, length_),
      scratch_(backend.alloc(length_ * config_.hidden_dim)) {
  rope_.inv_freq = rope_inv_freq(config_.rope, config_.head_dim);
  rope_.attention_factor = static_cast<float>(config_.rope.attention_factor);
  host_.resize(
      static_cast<size_t>(length_ * std::max({config_.dim, config_.q_dim(), config_.hidden_dim})));
  std::vector<int32_t> tokens;
  for (const auto& sample : calibration.samples) {
    tokens.insert(tokens.end(), sample.begin(), sample.end());
  }
  hidden_ = embed_tokens(model.tok_embed, tokens, residual, threads).data;
}

void CalibrationStream::run_layer(const Layer& layer, const Sink& sink,
                                  const std::function<void()>& stop) {
  const PreparedLayer prepared = prepare_layer(backend_, config_, layer);
  const Transform& down = layer.w_down.input;
  const auto down_transform = down.active() ? backend_.prepare_transform(down) : nullptr;
  const LayerTap tap = [&](Site site, const DeviceBuffer& x, int64_t rows, int64_t cols) {
    const DeviceBuffer* input = &x;
    if (site == Site::kFfnMid && down_transform) {
      backend_.copy_rows(x, 0, rows, cols, *scratch_);
      backend_.transform(*scratch_, rows, *down_transform, false);
      input = scratch_.get();
    }
    backend_.download(*input, 0, {host_.data(), static_cast<size_t>(rows * cols)});
    sink(site, host_.data(), rows, cols);
  };
  const auto cache = backend_.make_kv_cache(config_, length_, 32);
  const size_t sample_floats = static_cast<size_t>(length_ * config_.dim);
  for (size_t begin = 0; begin < hidden_.size(); begin += sample_floats) {
    stop();
    const std::span<float> sample(hidden_.data() + begin, sample_floats);
    backend_.upload(*acts_.x, sample);
    forward_layer(backend_, config_, prepared, rope_, *cache, 0, 0, length_, acts_,
                  sink ? tap : LayerTap{});
    backend_.download(*acts_.x, 0, sample);
  }
}

}  // namespace tq
