// tasks - zero-shot questions of a JSON-lines file, as contexts and continuations to score.
//
// The kind of question is recognised by the fields of the records, never by the file's name, and
// its prompt follows the template of the same task in EleutherAI's lm-evaluation-harness (table in
// docs/results.md). Not here: tokens and models. Read next: task_scores.h.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tq {

/// One candidate: the model is asked for log p(continuation | context). No context is empty, none
/// ends in white space (that belongs to the continuation), and every continuation starts with some.
struct AnswerCandidate {
  std::string context, continuation;
  int64_t answer_bytes = 0;  // of the continuation without the space that joins it, for acc_norm
};

struct Question {
  int64_t line = 0;  // in the file, from 1
  std::vector<AnswerCandidate> candidates;
  int64_t gold = 0;  // index of the right one
};

struct Task {
  std::string form;  // name of the template, for example "arc"
  bool has_acc_norm = false;
  bool predicts_word = false;  // one candidate a question: greedy accuracy and perplexity
  std::vector<Question> questions;
};

/// Parses a file. Throws Error(kBadData) naming line and field: not JSON, no records, unknown or
/// missing fields, empty texts, an answer out of range, records of two kinds, generative tasks.
Task parse_task(std::string_view text, const std::string& where);

}  // namespace tq
