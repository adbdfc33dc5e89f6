// tasks - one reader for each shape of record, one template for each kind of question.
//
// See tasks.h. Sources: lm_eval/tasks/{arc,boolq,commonsense_qa,hellaswag,lambada,openbookqa,piqa,
// super_glue/copa,winogrande} of lm-evaluation-harness; the files are those of llm-foundry, whose
// queries carry words of prompts of its own, which are cut off here.
#include "tools/tasks.h"

#include <algorithm>
#include <initializer_list>

#include "model/error.h"
#include "model/json.h"

namespace tq {
namespace {

constexpr const char* kWhiteSpace = " \t\n\v\f\r";

Error bad(const std::string& where, const std::string& why, const std::string& hint = "") {
  return Error(ErrorKind::kBadData, "bad question", where, why, hint);
}

bool is_blank(std::string_view text) {
  return text.find_first_not_of(kWhiteSpace) == std::string_view::npos;
}

std::string strip(std::string_view text) {
  const size_t begin = text.find_first_not_of(kWhiteSpace);
  if (begin == std::string_view::npos) return "";
  return std::string(text.substr(begin, text.find_last_not_of(kWhiteSpace) + 1 - begin));
}

std::string replace_all(std::string text, std::string_view from, std::string_view to) {
  for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size()) {
    text.replace(at, from.size(), to);
  }
  return text;
}

void expect_fields(const Json& record, std::initializer_list<std::string_view> known,
                   const std::string& where) {
  for (const auto& item : record.items()) {
    if (std::find(known.begin(), known.end(), item.key()) == known.end()) {
      throw bad(where, "unknown field \"" + item.key() + "\"");
    }
  }
}

std::string text_field(const Json& record, const char* key, const std::string& where) {
  std::string text = require_string(record, key, where);
  if (is_blank(text)) throw bad(where, "\"" + std::string(key) + "\" is empty");
  return text;
}

std::vector<std::string> text_list(const Json& record, const char* key, const std::string& where) {
  const Json& list = require(record, key, where);
  const std::string name = "\"" + std::string(key) + "\"";
  if (!list.is_array() || list.size() < 2) throw bad(where, name + " is not a list of two or more");
  std::vector<std::string> texts;
  for (const Json& item : list) {
    if (!item.is_string()) throw bad(where, name + " holds something that is no string");
    texts.push_back(item.get<std::string>());
    if (is_blank(texts.back())) throw bad(where, name + " holds an empty text");
  }
  return texts;
}

int64_t answer_index(const Json& record, const char* key, size_t n, const std::string& where) {
  return require_int(record, key, 0, static_cast<int64_t>(n) - 1, where);
}

// Joins with one space, and lets the white space at the end of the context open the continuation:
// tokenizers attach a space to the word behind it.
AnswerCandidate candidate(const std::string& context, const std::string& answer) {
  const size_t end = context.find_last_not_of(kWhiteSpace) + 1;
  return {context.substr(0, end), context.substr(end) + " " + answer,
          static_cast<int64_t>(answer.size())};
}

// What a reader finds in one record.
struct Record {
  const char* form;
  bool has_acc_norm, predicts_word;
  Question question;
};

Record one_context(const char* form, bool has_acc_norm, const std::string& context,
                   const std::vector<std::string>& answers, int64_t gold) {
  Record record = {form, has_acc_norm, false, {}};
  for (const std::string& answer : answers) {
    record.question.candidates.push_back(candidate(context, answer));
  }
  record.question.gold = gold;
  return record;
}

// {query, choices, gold}: the words of the query tell which template its makers used.
Record read_choices(const Json& json, const std::string& where) {
  expect_fields(json, {"query", "choices", "gold"}, where);
  const std::string query = text_field(json, "query", where);
  const std::vector<std::string> choices = text_list(json, "choices", where);
  const int64_t gold = answer_index(json, "gold", choices.size(), where);
  const std::string_view passage = "Passage: ";
  if (query.starts_with(passage) && query.find("\nQuestion: ") != std::string::npos) {
    return one_context("boolq", false, query.substr(passage.size()) + "\nAnswer:", choices, gold);
  }
  if (query.starts_with("Question: ") && query.ends_with("\nAnswer:")) {
    return one_context("commonsense_qa", false, replace_all(query, "\nChoices:\n", "\n"), choices,
                       gold);
  }
  if (query.starts_with("Question: ")) {
    return one_context("arc", true, strip(query) + "\nAnswer:", choices, gold);
  }
  for (const std::string connector : {" because", " therefore"}) {
    if (choices.size() != 2 || !query.ends_with("," + connector)) continue;
    const size_t comma = query.size() - connector.size() - 1;
    return one_context("copa", false, query.substr(0, comma) + connector, choices, gold);
  }
  return one_context("openbookqa", true, query, choices, gold);
}

// {context_options, continuation, gold}: the same words are scored behind each option.
Record read_contexts(const Json& json, const std::string& where) {
  expect_fields(json, {"context_options", "continuation", "gold"}, where);
  const std::vector<std::string> contexts = text_list(json, "context_options", where);
  const std::string continuation = text_field(json, "continuation", where);
  Record record = {"winogrande", false, false, {}};
  for (const std::string& context : contexts) {
    record.question.candidates.push_back(candidate(context, continuation));
  }
  record.question.gold = answer_index(json, "gold", contexts.size(), where);
  return record;
}

// HellaSwag's WikiHow half is full of [header], [step], [substeps] and the like.
std::string without_brackets(const std::string& raw) {
  const std::string text = replace_all(strip(raw), " [title]", ". ");
  std::string kept;
  for (size_t i = 0; i < text.size(); ++i) {
    const size_t close = text[i] == '[' ? text.find_first_of("]\n", i) : std::string::npos;
    if (close != std::string::npos && text[close] == ']') {
      i = close;
    } else {
      kept += text[i];
    }
  }
  return replace_all(kept, "  ", " ");
}

// Python's str.capitalize() for ASCII letters; others are left alone.
std::string capitalize(std::string text) {
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (i == 0 && c >= 'a' && c <= 'z') text[i] = static_cast<char>(c - 'a' + 'A');
    if (i > 0 && c >= 'A' && c <= 'Z') text[i] = static_cast<char>(c - 'A' + 'a');
  }
  return text;
}

Record read_hellaswag(const Json& json, const std::string& where) {
  expect_fields(json,
                {"activity_label", "ctx_a", "ctx_b", "endings", "label", "ind", "ctx", "split",
                 "split_type", "source_id"},
                where);
  const std::string context = text_field(json, "activity_label", where) + ": " +
                              text_field(json, "ctx_a", where) + " " +
                              capitalize(require_string(json, "ctx_b", where));
  std::vector<std::string> endings = text_list(json, "endings", where);
  for (std::string& ending : endings) {
    ending = without_brackets(ending);
    if (is_blank(ending)) throw bad(where, "\"endings\" holds nothing but brackets");
  }
  return one_context("hellaswag", true, without_brackets(context), endings,
                     answer_index(json, "label", endings.size(), where));
}

Record read_last_word(const Json& json, const std::string& where) {
  expect_fields(json, {"context", "continuation"}, where);
  Record record = {"lambada", false, true, {}};
  record.question.candidates.push_back(
      candidate(text_field(json, "context", where), text_field(json, "continuation", where)));
  return record;
}

Record read_record(const Json& json, const std::string& where) {
  if (!json.is_object()) throw bad(where, "not a JSON object");
  if (json.contains("query")) return read_choices(json, where);
  if (json.contains("context_options")) return read_contexts(json, where);
  if (json.contains("endings")) return read_hellaswag(json, where);
  if (json.contains("context") && json.contains("answer")) {
    throw bad(where, "\"answer\" beside \"context\": the task asks for generated text",
              "tq scores given answers only");
  }
  if (json.contains("context")) return read_last_word(json, where);
  throw bad(where, "none of the fields query, context_options, endings, context",
            "docs/results.md lists the known records");
}

}  // namespace

Task parse_task(std::string_view text, const std::string& where) {
  Task task;
  int64_t line = 1;
  for (size_t begin = 0; begin < text.size(); ++line) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view json = text.substr(begin, end - begin);
    begin = end + 1;
    if (is_blank(json)) continue;
    const std::string at = where + ", line " + std::to_string(line);
    Record record = read_record(parse_json(json, at), at);
    if (task.questions.empty()) {
      task.form = record.form;
      task.has_acc_norm = record.has_acc_norm;
      task.predicts_word = record.predicts_word;
    } else if (task.form != record.form) {
      throw bad(at, "a question of the form " + std::string(record.form) +
                        " in a file that began with " + task.form);
    }
    record.question.line = line;
    task.questions.push_back(std::move(record.question));
  }
  if (task.questions.empty()) throw bad(where, "no questions in it");
  return task;
}

}  // namespace tq
