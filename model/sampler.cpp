// sampler - greedy and filtered sampling. See sampler.h.
#include "model/sampler.h"

#include <algorithm>
#include <cmath>

#include "model/error.h"

namespace tq {
namespace {

// Ties by id, so that the order, and with it the draw, does not depend on the sort.
bool before(const Candidate& a, const Candidate& b) {
  const bool a_broken = !std::isfinite(a.logit), b_broken = !std::isfinite(b.logit);
  if (a_broken || b_broken) return a_broken != b_broken ? a_broken : a.id < b.id;
  return a.logit > b.logit || (!(a.logit < b.logit) && a.id < b.id);
}

}  // namespace

Sampler::Sampler(const SamplerOptions& options) : options_(options), state_(options.seed) {}

// SplitMix64 (Steele, Lea, Flood 2014): any seed is good, also 0.
double Sampler::uniform() {
  uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

void top_candidates(std::span<const float> logits, int64_t count, std::vector<Candidate>& out) {
  const size_t keep =
      count > 0 ? std::min(static_cast<size_t>(count), logits.size()) : logits.size();
  out.clear();
  for (size_t id = 0; id < logits.size(); ++id) {  // a heap, the last to be kept in front
    const Candidate candidate{logits[id], static_cast<int32_t>(id)};
    if (out.size() == keep) {
      if (!before(candidate, out.front())) continue;
      std::pop_heap(out.begin(), out.end(), before);
      out.pop_back();
    }
    out.push_back(candidate);
    std::push_heap(out.begin(), out.end(), before);
  }
  std::sort_heap(out.begin(), out.end(), before);
}

void Sampler::begin(std::span<const int32_t> context) {
  seen_.clear();
  if (penalizes()) seen_.insert(context.begin(), context.end());
}

int64_t Sampler::n_candidates() const {
  const int64_t kept = options_.temperature <= 0 ? 1 : options_.top_k;
  if (!penalizes() || kept == 0) return kept;
  // A penalty above 1 lets at most the tokens that occurred fall; one below 1 lets any rise.
  return options_.repetition_penalty > 1 ? kept + static_cast<int64_t>(seen_.size()) : 0;
}

void Sampler::penalize(std::span<const Candidate> candidates, std::vector<Candidate>& out) const {
  const auto penalty = static_cast<float>(options_.repetition_penalty);
  out.assign(candidates.begin(), candidates.end());
  for (Candidate& candidate : out) {
    if (!seen_.count(candidate.id)) continue;
    candidate.logit = candidate.logit < 0 ? candidate.logit * penalty : candidate.logit / penalty;
  }
  std::sort(out.begin(), out.end(), before);
  const auto kept = static_cast<size_t>(options_.temperature <= 0 ? 1 : options_.top_k);
  if (kept > 0 && out.size() > kept) out.resize(kept);
}

int32_t Sampler::sample(std::span<const Candidate> candidates) {
  TQ_CHECK(!candidates.empty());
  TQ_CHECK(std::isfinite(candidates[0].logit), "a logit is not a number");
  if (!penalizes()) return draw(candidates);
  std::vector<Candidate> penalized;
  penalize(candidates, penalized);
  const int32_t id = draw(penalized);
  seen_.insert(id);
  return id;
}

int32_t Sampler::draw(std::span<const Candidate> candidates) {
  if (options_.temperature <= 0) return candidates[0].id;

  size_t keep = candidates.size();
  std::vector<double> weights(keep);
  double total = 0;
  for (size_t i = 0; i < keep; ++i) {
    weights[i] = std::exp((candidates[i].logit - candidates[0].logit) / options_.temperature);
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
    if (point < 0) return candidates[i].id;
  }
  return candidates[keep - 1].id;
}

}  // namespace tq
