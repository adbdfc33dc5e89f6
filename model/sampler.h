// sampler - from logits to the next token id, reproducible from a seed on every machine.
//
// Order of the filters as in transformers: temperature, top-k, top-p, min-p. Own random numbers,
// because std:: distributions differ between standard libraries. Top-k comes first here, so that a
// device need not send what will not be drawn (Backend::top); the order of the two does not matter.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace tq {

struct SamplerOptions {
  double temperature = 0;  // 0 = greedy: the largest logit, lowest id on ties
  int64_t top_k = 0;       // keep the k largest; 0 = all
  double top_p = 1.0;      // keep the smallest set whose probability reaches p; 1 = all
  double min_p = 0;        // drop tokens below min_p times the largest probability; 0 = none
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
  /// How many of the largest logits sample() looks at; 0 = all.
  int64_t n_candidates() const { return options_.temperature <= 0 ? 1 : options_.top_k; }
  /// Next id. `candidates`: the n_candidates() largest, as top_candidates() orders them. Throws
  /// kInternal if one is not finite.
  int32_t sample(std::span<const Candidate> candidates);

 private:
  double uniform();  // [0, 1), 53 bits
  SamplerOptions options_;
  uint64_t state_;
};

}  // namespace tq
