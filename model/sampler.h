// sampler - from logits to the next token id, reproducible from a seed on every machine.
//
// Order as in transformers: repetition penalty, temperature, top-k, top-p, min-p. Own random
// numbers, because std:: distributions differ between standard libraries. Top-k comes first here,
// so that a device need not send what will not be drawn (Backend::top); the order of the two does
// not matter.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_set>
#include <vector>

namespace tq {

struct SamplerOptions {
  double temperature = 0;  // 0 = greedy: the largest logit, lowest id on ties
  int64_t top_k = 0;       // keep the k largest; 0 = all
  double top_p = 1.0;      // keep the smallest set whose probability reaches p; 1 = all
  double min_p = 0;        // drop tokens below min_p times the largest probability; 0 = none
  // Of tokens that occurred: positive logits are divided by it, others multiplied; 1 = none.
  double repetition_penalty = 1.0;
  uint64_t seed = 0;
};

/// A token that may come next.
struct Candidate {
  float logit;
  int32_t id;
};
/// The `count` (0: all) largest logits, largest first, the lower id first on ties; before all what
/// is not finite (NaN, +inf, -inf) by id, so that nobody ranks what is broken without seeing it.
void top_candidates(std::span<const float> logits, int64_t count, std::vector<Candidate>& out);

class Sampler {
 public:
  explicit Sampler(const SamplerOptions& options);
  /// Forgets what occurred so far: the text is `context` now, and what sample() yields behind it.
  void begin(std::span<const int32_t> context);
  /// How many of the largest logits sample() looks at; 0 = all.
  int64_t n_candidates() const;
  /// Next id. `candidates`: the n_candidates() largest, as top_candidates() orders them. Throws
  /// kInternal if one is not finite.
  int32_t sample(std::span<const Candidate> candidates);

 private:
  double uniform();  // [0, 1), 53 bits
  bool penalizes() const { return options_.repetition_penalty != 1.0; }
  /// The largest with the penalty applied, in order.
  void penalize(std::span<const Candidate> candidates, std::vector<Candidate>& out) const;
  int32_t draw(std::span<const Candidate> candidates);
  SamplerOptions options_;
  uint64_t state_;
  std::unordered_set<int32_t> seen_;
};

}  // namespace tq
