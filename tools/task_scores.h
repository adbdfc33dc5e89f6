// task_scores - log-likelihoods of continuations under a model, and the figures made of them.
//
// Definitions as in lm-evaluation-harness: acc takes the candidate with the largest log-likelihood,
// acc_norm the one with the largest log-likelihood a byte of answer; ties go to the first. Not
// here: files and prompts (tasks.h), options and output (cmd_eval.cpp).
#pragma once

#include <span>

#include "cpu/kernels.h"
#include "model/forward.h"
#include "tokenizer/tokenizer.h"
#include "tools/tasks.h"

namespace tq {

/// A candidate as tokens: ids[n_context..] are scored.
struct EncodedCandidate {
  std::vector<int32_t> ids;
  size_t n_context = 0;
};
/// Context and continuation are encoded together, with the special tokens that the tokenizer's
/// post-processor adds, and split where the context alone would end. Throws kBadData if nothing
/// would be scored or nothing precedes it.
EncodedCandidate encode_candidate(const Tokenizer& tokenizer, const AnswerCandidate& candidate,
                                  const std::string& where);

/// Scores candidates one after the other on one timeline; what a candidate has in common with the
/// one before it is not computed again, which changes no bit of a score.
class CandidateScorer {
 public:
  struct Score {
    double log_likelihood = 0;  // nats
    bool greedy = true;         // every scored token is the most likely one
  };
  /// valid_vocab: ids from here on pad the vocabulary.
  CandidateScorer(Session& session, const Kernels& kernels, int64_t valid_vocab)
      : session_(session), kernels_(kernels), valid_vocab_(valid_vocab) {}
  Score score(const EncodedCandidate& candidate);
  int64_t tokens_run() const { return tokens_run_; }

 private:
  Session& session_;
  const Kernels& kernels_;
  int64_t valid_vocab_;
  std::vector<int32_t> timeline_;  // tokens in the session
  int64_t tokens_run_ = 0;
};

/// A mean and its standard error.
struct Estimate {
  double mean = 0, error = 0;
};

/// Collects the scores of questions.
class TaskTally {
 public:
  /// scores: of the question's candidates, in order.
  void add(const Question& question, std::span<const CandidateScorer::Score> scores);
  Estimate acc() const;              // of the most likely candidate
  Estimate acc_norm() const;         // of the most likely one a byte
  Estimate greedy() const;           // the right candidate is what greedy decoding gives
  Estimate gold_perplexity() const;  // exp(-mean log-likelihood) of the right candidates
 private:
  std::vector<double> acc_, acc_norm_, greedy_, gold_;
};

}  // namespace tq
