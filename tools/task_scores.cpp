// task_scores - see task_scores.h.
#include "tools/task_scores.h"

#include <algorithm>
#include <cmath>

#include "cpu/softmax.h"
#include "model/error.h"

namespace tq {
namespace {

// Standard error of the mean from the sample deviation, as the harness has it.
Estimate estimate(const std::vector<double>& values) {
  const double n = static_cast<double>(values.size());
  double sum = 0, squares = 0;
  for (double value : values) sum += value;
  for (double value : values) squares += (value - sum / n) * (value - sum / n);
  return {sum / n, values.size() < 2 ? 0 : std::sqrt(squares / (n - 1) / n)};
}

size_t index_of_largest(const std::vector<double>& values) {
  return static_cast<size_t>(std::max_element(values.begin(), values.end()) - values.begin());
}

}  // namespace

EncodedCandidate encode_candidate(const Tokenizer& tokenizer, const AnswerCandidate& candidate,
                                  const std::string& where) {
  EncodedCandidate encoded;
  encoded.ids = tokenizer.encode(candidate.context + candidate.continuation, true, true);
  encoded.n_context = tokenizer.encode(candidate.context, true, true).size();
  if (encoded.n_context == 0 || encoded.ids.size() <= encoded.n_context) {
    throw Error(ErrorKind::kBadData, "nothing to score", where,
                std::to_string(encoded.n_context) + " tokens of context, " +
                    std::to_string(encoded.ids.size()) + " with the answer");
  }
  return encoded;
}

CandidateScorer::Score CandidateScorer::score(const EncodedCandidate& candidate) {
  const std::span<const int32_t> ids(candidate.ids);
  // Logits are wanted from the last token of the context on, so that one is always run.
  const size_t first = candidate.n_context - 1;
  const size_t limit = std::min(first, timeline_.size());
  const size_t shared = static_cast<size_t>(
      std::mismatch(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(limit),
                    timeline_.begin())
          .first -
      ids.begin());
  session_.truncate(static_cast<int64_t>(shared));
  if (shared < first) session_.feed(ids.subspan(shared, first - shared));
  Score score;
  session_.feed_all(ids.subspan(first, ids.size() - 1 - first), [&](int64_t row0, int64_t rows,
                                                                    std::span<const float> block) {
    const size_t stride = block.size() / static_cast<size_t>(rows);
    for (int64_t row = 0; row < rows; ++row) {
      const auto logits =
          block.subspan(static_cast<size_t>(row) * stride, static_cast<size_t>(valid_vocab_));
      const int32_t target = ids[first + static_cast<size_t>(row0 + row) + 1];
      score.log_likelihood += logits[static_cast<size_t>(target)] - log_sum_exp(kernels_, logits);
      score.greedy = score.greedy && index_of_max(kernels_, logits) == target;
    }
  });
  timeline_.assign(ids.begin(), ids.end() - 1);
  tokens_run_ += static_cast<int64_t>(timeline_.size() - shared);
  return score;
}

void TaskTally::add(const Question& question, std::span<const CandidateScorer::Score> scores) {
  TQ_CHECK(scores.size() == question.candidates.size());
  const size_t gold = static_cast<size_t>(question.gold);
  std::vector<double> plain, a_byte;
  for (size_t i = 0; i < scores.size(); ++i) {
    plain.push_back(scores[i].log_likelihood);
    a_byte.push_back(scores[i].log_likelihood /
                     static_cast<double>(question.candidates[i].answer_bytes));
  }
  acc_.push_back(index_of_largest(plain) == gold);
  acc_norm_.push_back(index_of_largest(a_byte) == gold);
  greedy_.push_back(scores[gold].greedy);
  gold_.push_back(scores[gold].log_likelihood);
}

Estimate TaskTally::acc() const {
  return estimate(acc_);
}
Estimate TaskTally::acc_norm() const {
  return estimate(acc_norm_);
}
Estimate TaskTally::greedy() const {
  return estimate(greedy_);
}
Estimate TaskTally::gold_perplexity() const {
  const Estimate log = estimate(gold_);
  // First order: the error of exp(-m) is exp(-m) times the error of m.
  return {std::exp(-log.mean), std::exp(-log.mean) * log.error};
}

}  // namespace tq
