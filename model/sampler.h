// sampler - from logits to the next token id, reproducible from a seed on every machine.
//
// Order of the filters as in transformers: temperature, top-k, top-p, min-p. Own random numbers,
// because std:: distributions differ between standard libraries.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace tq {

struct SamplerOptions {
  double temperature = 0;  // 0 = greedy: the largest logit, lowest id on ties
  int64_t top_k = 0;       // keep the k largest; 0 = all
  double top_p = 1.0;      // keep the smallest set whose probability reaches p; 1 = all
  double min_p = 0;        // drop tokens below min_p times the largest probability; 0 = none
  uint64_t seed = 0;
};

class Sampler {
 public:
  explicit Sampler(const SamplerOptions& options);
  /// Next id. Logits of -inf are never chosen. Throws kInternal if a logit is NaN.
  int32_t sample(std::span<const float> logits);

 private:
  double uniform();  // [0, 1), 53 bits
  SamplerOptions options_;
  uint64_t state_;
  std::vector<std::pair<float, int32_t>> candidates_;
};

/// Id of the largest value, the lowest one on ties.
int32_t argmax(std::span<const float> logits);

}  // namespace tq
