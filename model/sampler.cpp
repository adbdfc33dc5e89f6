// sampler - greedy and filtered sampling. See sampler.h.
#include "model/sampler.h"

#include <algorithm>
#include <cmath>

#include "model/error.h"

namespace tq {

Sampler::Sampler(const SamplerOptions& options) : options_(options), state_(options.seed) {}

// SplitMix64 (Steele, Lea, Flood 2014): any seed is good, also 0.
double Sampler::uniform() {
  uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

int32_t argmax(std::span<const float> logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

int32_t Sampler::sample(std::span<const float> logits) {
  TQ_CHECK(!logits.empty());
  for (float logit : logits) TQ_CHECK(!std::isnan(logit), "a logit is not a number");
  if (options_.temperature <= 0) return argmax(logits);

  candidates_.clear();
  for (size_t id = 0; id < logits.size(); ++id) {
    if (std::isinf(logits[id]) && logits[id] < 0) continue;
    candidates_.emplace_back(logits[id], static_cast<int32_t>(id));
  }
  TQ_CHECK(!candidates_.empty(), "every logit is -inf");
  // Ties by id, so that the order, and with it the draw, does not depend on the sort.
  const auto before = [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  };
  size_t keep = candidates_.size();
  if (options_.top_k > 0) keep = std::min(keep, static_cast<size_t>(options_.top_k));
  std::partial_sort(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(keep),
                    candidates_.end(), before);
  candidates_.resize(keep);

  std::vector<double> weights(keep);
  double total = 0;
  for (size_t i = 0; i < keep; ++i) {
    weights[i] = std::exp((candidates_[i].first - candidates_[0].first) / options_.temperature);
    total += weights[i];
  }
  if (options_.top_p < 1.0) {
    double mass = 0;
    size_t i = 0;
    while (i < keep && mass < options_.top_p * total) mass += weights[i++];
    keep = std::max<size_t>(i, 1);
    total = mass;
  }
  if (options_.min_p > 0) {
    // Weights are relative to the largest, which is 1.
    size_t i = 1;
    total = weights[0];
    while (i < keep && weights[i] >= options_.min_p) total += weights[i++];
    keep = i;
  }
  double point = uniform() * total;
  for (size_t i = 0; i + 1 < keep; ++i) {
    point -= weights[i];
    if (point < 0) return candidates_[i].second;
  }
  return candidates_[keep - 1].second;
}

}  // namespace tq
