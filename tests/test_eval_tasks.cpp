// `tq eval --task`: every shape of record and its prompt, scores, figures, and bad files.
#include <gtest/gtest.h>

#include <cmath>

#include "cpu/cpu_backend.h"
#include "tests/cli.h"
#include "tests/expect_error.h"
#include "tools/task_scores.h"
#include "tools/tasks.h"

namespace tq {
namespace {

const std::string kModel = std::string(TQ_FIXTURES) + "/stories260k";

// Prompts of the first question, "context|continuation" each.
std::vector<std::string> prompts(const Task& task) {
  std::vector<std::string> texts;
  for (const AnswerCandidate& c : task.questions.at(0).candidates) {
    texts.push_back(c.context + "|" + c.continuation);
  }
  return texts;
}

using Texts = std::vector<std::string>;

TEST(ParseTask, ArcAndPiqaAskForAnAnswer) {
  const Task arc = parse_task(
      R"({"query": "Question: Is it wet?", "choices": ["Yes it is", "No"], "gold": 1})", "f");
  EXPECT_EQ(arc.form, "arc");
  EXPECT_TRUE(arc.has_acc_norm);
  EXPECT_EQ(prompts(arc), (Texts{"Question: Is it wet?\nAnswer:| Yes it is",
                                 "Question: Is it wet?\nAnswer:| No"}));
  EXPECT_EQ(arc.questions[0].gold, 1);
  EXPECT_EQ(arc.questions[0].candidates[0].answer_bytes, 9);
  // PIQA's queries end with a line break of their own.
  const Task piqa =
      parse_task(R"({"query": "Question: dresser\n", "choices": ["a", "b"], "gold": 0})", "f");
  EXPECT_EQ(piqa.form, "arc");
  EXPECT_EQ(prompts(piqa)[0], "Question: dresser\nAnswer:| a");
}

TEST(ParseTask, BoolqDropsTheWordPassage) {
  const Task task = parse_task(
      R"({"query": "Passage: Rain.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 0})", "f");
  EXPECT_EQ(task.form, "boolq");
  EXPECT_FALSE(task.has_acc_norm);
  EXPECT_EQ(prompts(task)[1], "Rain.\nQuestion: is it?\nAnswer:| yes");
}

TEST(ParseTask, CommonsenseQaKeepsLettersOnly) {
  const Task task = parse_task(
      R"({"query": "Question: Q?\nChoices:\nA. x\nB. y\nAnswer:", "choices": ["A", "B"], "gold": 0})",
      "f");
  EXPECT_EQ(task.form, "commonsense_qa");
  EXPECT_EQ(prompts(task)[0], "Question: Q?\nA. x\nB. y\nAnswer:| A");
}

TEST(ParseTask, CopaJoinsWithoutAComma) {
  const Task task = parse_task(
      R"({"query": "The man ran, because", "choices": ["he was late.", "he sat."], "gold": 0})",
      "f");
  EXPECT_EQ(task.form, "copa");
  EXPECT_EQ(prompts(task)[0], "The man ran because| he was late.");
}

TEST(ParseTask, OpenbookQaTakesTheQueryAsItIs) {
  // Four choices: not COPA, whatever the last word is.
  const Task task = parse_task(
      R"({"query": "Fish die, because", "choices": ["a", "b", "c", "d"], "gold": 3})", "f");
  EXPECT_EQ(task.form, "openbookqa");
  EXPECT_EQ(prompts(task)[3], "Fish die, because| d");
}

TEST(ParseTask, WinograndeScoresTheSameWordsBehindEachOption) {
  const Task task = parse_task(
      R"({"context_options": ["so Sarah", "so Maria"], "continuation": "won.", "gold": 1})", "f");
  EXPECT_EQ(task.form, "winogrande");
  EXPECT_EQ(prompts(task), (Texts{"so Sarah| won.", "so Maria| won."}));
}

TEST(ParseTask, HellaswagCleansBracketsAndCapitalizes) {
  const Task task = parse_task(
      R"({"ind": 1, "activity_label": "Baking", "ctx_a": "How to bake [title] Mix.",)"
      R"( "ctx_b": "the COOK", "ctx": "", "split": "val", "split_type": "x", "source_id": "s",)"
      R"( "label": 0, "endings": ["[step] stirs [substeps] twice.", "odd [ bracket"]})",
      "f");
  EXPECT_EQ(task.form, "hellaswag");
  EXPECT_TRUE(task.has_acc_norm);
  EXPECT_EQ(prompts(task)[0], "Baking: How to bake. Mix. The cook|  stirs twice.");
  EXPECT_EQ(prompts(task)[1], "Baking: How to bake. Mix. The cook| odd [ bracket");
}

TEST(ParseTask, LambadaPredictsAWord) {
  const Task task = parse_task(R"({"context": "I see the ", "continuation": "sea"})", "f");
  EXPECT_EQ(task.form, "lambada");
  EXPECT_TRUE(task.predicts_word);
  // White space at the end of a context belongs to the continuation.
  EXPECT_EQ(prompts(task)[0], "I see the|  sea");
}

TEST(ParseTask, BlankLinesAreSkippedAndCounted) {
  const Task task = parse_task(
      "\n{\"context\": \"a\", \"continuation\": \"b\"}\r\n\n{\"context\": \"c\", "
      "\"continuation\": \"d\"}",
      "f");
  ASSERT_EQ(task.questions.size(), 2u);
  EXPECT_EQ(task.questions[0].line, 2);
  EXPECT_EQ(task.questions[1].line, 4);
}

struct BadFile {
  const char* text;
  std::initializer_list<std::string> words;
};

const BadFile kBadFiles[] = {
    {"", {"f.jsonl", "no questions"}},
    {"\n \n", {"no questions"}},
    {"{\"context\": \"a\", \"continuation\": \"b\"}\n{oops", {"f.jsonl, line 2"}},
    {"[1]", {"line 1", "not a JSON object"}},
    {R"({"goal": "a", "sol1": "b"})", {"line 1", "none of the fields"}},
    {R"({"context": "a", "answer": "18", "chain_of_thought": "c"})", {"line 1", "generated text"}},
    {R"({"context": "a"})", {"line 1", "\"continuation\" is not there"}},
    {R"({"context": "", "continuation": "b"})", {"\"context\" is empty"}},
    {R"({"context": 1, "continuation": "b"})", {"context", "a string"}},
    {R"({"context": "a", "continuation": "b", "extra": 1})", {"unknown field \"extra\""}},
    {R"({"query": "q", "choices": ["a", "b"], "gold": 2})", {"gold"}},
    {R"({"query": "q", "choices": ["a", "b"], "gold": -1})", {"gold"}},
    {R"({"query": "q", "choices": ["a", "b"], "gold": "1"})", {"gold"}},
    {R"({"query": "q", "choices": ["a", "b"]})", {"\"gold\" is not there"}},
    {R"({"query": "q", "choices": ["a"], "gold": 0})", {"\"choices\"", "two or more"}},
    {R"({"query": "q", "choices": ["a", 1], "gold": 0})", {"\"choices\"", "no string"}},
    {R"({"query": "q", "choices": ["a", " "], "gold": 0})", {"\"choices\"", "empty text"}},
    {R"({"context_options": ["a", "b"], "continuation": "c", "gold": 5})", {"gold"}},
    {R"({"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": ["c", "[d]"], "label": 0})",
     {"\"endings\"", "brackets"}},
    {"{\"query\": \"q\", \"choices\": [\"a\", \"b\"], \"gold\": 0}\n"
     "{\"query\": \"Question: q\", \"choices\": [\"a\", \"b\"], \"gold\": 0}",
     {"line 2", "form arc", "began with openbookqa"}},
};

TEST(ParseTask, BadFilesAreNamedByLineAndField) {
  for (const BadFile& file : kBadFiles) {
    SCOPED_TRACE(file.text);
    expect_error(ErrorKind::kBadData, file.words, [&] { parse_task(file.text, "f.jsonl"); });
  }
}

TEST(EvalTask, BadFilesAndContradictionsHaveTheirExitCodes) {
  const TempDir dir;
  const std::string good = dir / "good.jsonl";
  write_bytes(good, R"({"context": "One", "continuation": "day"})");
  for (const BadFile& file : kBadFiles) {
    SCOPED_TRACE(file.text);
    write_bytes(dir / "f.jsonl", file.text);
    const CliResult result = run_tq(dir, {"eval", kModel, "--task", dir / "f.jsonl"});
    EXPECT_EQ(result.exit_code, 3);
    EXPECT_EQ(result.out, "");
    EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
  }
  EXPECT_EQ(run_tq(dir, {"eval", kModel, "--task", dir / "absent.jsonl"}).exit_code, 5);
  const std::vector<std::vector<std::string>> usage = {
      {"eval", kModel},
      {"eval", kModel, "--task", good, "--text", good},
      {"eval", kModel, "--task", good, "--windows", "1"},
      {"eval", kModel, "--task", good, "--kl", kModel},
      {"eval", kModel, "--text", good, "--limit", "1"},
      {"eval", kModel, "--task", good, "--limit", "-1"}};
  for (const auto& args : usage) {
    const CliResult result = run_tq(dir, args);
    EXPECT_EQ(result.exit_code, 2) << args.back() << result.err;
    EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
  }
  std::string words;
  for (int i = 0; i < 600; ++i) words += "day ";
  write_bytes(good, Json{{"context", words}, {"continuation", "day"}}.dump());
  const CliResult result = run_tq(dir, {"eval", kModel, "--task", good, "-q"});
  EXPECT_EQ(result.exit_code, 3);
  EXPECT_NE(result.err.find("line 1"), std::string::npos) << result.err;
  EXPECT_NE(result.err.find("question too long"), std::string::npos) << result.err;
}

TEST(TaskTally, FiguresOfHandMadeScores) {
  Question question;
  question.candidates = {{"c", " long answer", 11}, {"c", " no", 2}};
  question.gold = 0;
  TaskTally tally;
  // -11 nats over 11 bytes beat -4 nats over 2 bytes, a byte; -4 beats -11 as they are.
  tally.add(question, std::vector<CandidateScorer::Score>{{-11, false}, {-4, true}});
  tally.add(question, std::vector<CandidateScorer::Score>{{-1, true}, {-4, false}});
  // A tie goes to the first.
  tally.add(question, std::vector<CandidateScorer::Score>{{-4, false}, {-4, false}});
  EXPECT_DOUBLE_EQ(tally.acc().mean, 2.0 / 3);
  // Sample variance of {0, 1, 1} is 1/3; over n = 3 that is 1/9.
  EXPECT_DOUBLE_EQ(tally.acc().error, 1.0 / 3);
  EXPECT_DOUBLE_EQ(tally.acc_norm().mean, 1);
  EXPECT_DOUBLE_EQ(tally.acc_norm().error, 0);
  EXPECT_DOUBLE_EQ(tally.greedy().mean, 1.0 / 3);
  EXPECT_DOUBLE_EQ(tally.gold_perplexity().mean, std::exp(16.0 / 3));
}

// Scores of a model, and what they are by definition: a softmax in double of all logits of the
// whole sequence, run alone.
class Scoring : public ::testing::Test {
 protected:
  Scoring()
      : model(load_model(kModel)),
        tokenizer(Tokenizer::from_json(model.texts.tokenizer, "tokenizer.json")),
        backend(1),
        prepared(model, backend) {}

  static SessionOptions options() {
    SessionOptions options;
    options.kv_bits = 32;  // what the command takes for a folder
    return options;
  }

  CandidateScorer::Score alone(const EncodedCandidate& candidate) {
    Session session(prepared, options());
    CandidateScorer::Score score;
    session.feed_all(candidate.ids, [&](int64_t first, int64_t rows, std::span<const float> block) {
      const size_t vocab = block.size() / static_cast<size_t>(rows);
      for (int64_t row = 0; row < rows; ++row) {
        const size_t at = static_cast<size_t>(first + row) + 1;
        if (at < candidate.n_context || at >= candidate.ids.size()) continue;
        const auto logits = block.subspan(static_cast<size_t>(row) * vocab, vocab);
        const size_t target = static_cast<size_t>(candidate.ids[at]);
        double sum = 0;
        for (float logit : logits) sum += std::exp(static_cast<double>(logit));
        score.log_likelihood += logits[target] - std::log(sum);
        for (float logit : logits) score.greedy = score.greedy && logit <= logits[target];
      }
    });
    return score;
  }

  Model model;
  Tokenizer tokenizer;
  CpuBackend backend;
  PreparedModel prepared;
};

TEST_F(Scoring, SharedContextsScoreLikeWholeSequences) {
  Session shared(prepared, options());
  CandidateScorer scorer(shared, kernels_for(best_isa()), tokenizer.size());
  const Texts contexts = {"Once upon a time, there was a little girl named",
                          "Once upon a time, there was a little boy", "Lily"};
  const Texts answers = {" Lily. She loved to play outside.", " Lily", " Li", " dog in the park",
                         " Timmy."};
  int64_t n_tokens = 0;
  for (const std::string& context : contexts) {
    for (const std::string& answer : answers) {
      const EncodedCandidate candidate = encode_candidate(tokenizer, {context, answer, 1}, "test");
      const CandidateScorer::Score score = scorer.score(candidate);
      n_tokens += static_cast<int64_t>(candidate.ids.size()) - 1;
      // The same on a timeline of its own: not a bit differs.
      Session fresh(prepared, options());
      CandidateScorer single(fresh, kernels_for(best_isa()), tokenizer.size());
      EXPECT_EQ(score.log_likelihood, single.score(candidate).log_likelihood) << context << answer;
      // A log-sum-exp is off by 2e-7 (tests/test_cpu_softmax.cpp); up to 20 tokens are added.
      EXPECT_NEAR(score.log_likelihood, alone(candidate).log_likelihood, 20 * 2e-7);
      EXPECT_EQ(score.greedy, alone(candidate).greedy) << context << answer;
    }
  }
  EXPECT_LT(scorer.tokens_run(), n_tokens / 2);  // the point of sharing
}

TEST_F(Scoring, AContinuationIsEncodedTogetherWithItsContext) {
  const std::string context = "Once upon a", answer = " time";
  const EncodedCandidate candidate = encode_candidate(tokenizer, {context, answer, 4}, "test");
  EXPECT_EQ(candidate.ids, tokenizer.encode(context + answer, true, true));
  EXPECT_EQ(candidate.n_context, tokenizer.encode(context, true, true).size());
}

TEST_F(Scoring, TheCommandReportsWhatTheScoresSay) {
  const TempDir dir;
  const std::string file = dir / "words.jsonl";
  const Texts contexts = {"Once upon a", "Lily and Ben are"};
  const Texts words = {"time", "zebras"};
  std::string lines;
  double total = 0, greedy = 0;
  for (size_t i = 0; i < contexts.size(); ++i) {
    lines += Json{{"context", contexts[i]}, {"continuation", words[i]}}.dump() + "\n";
    const auto score = alone(encode_candidate(tokenizer, {contexts[i], " " + words[i], 1}, "test"));
    total += score.log_likelihood;
    greedy += score.greedy;
  }
  write_bytes(file, lines);
  const CliResult result = run_tq(dir, {"eval", kModel, "--task", file, "--json", "-q"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const Json json = Json::parse(result.out);
  EXPECT_EQ(json["task"], "words");
  EXPECT_EQ(json["form"], "lambada");
  EXPECT_EQ(json["n"], 2);
  EXPECT_EQ(json["acc"].get<double>(), greedy / 2);
  // Two sums of a few tokens, each within 2e-6, over 2: the exponential moves by as much, relative.
  EXPECT_NEAR(std::log(json["ppl"].get<double>()), -total / 2, 4e-6);
  EXPECT_FALSE(json.contains("acc_norm"));
  const CliResult limited =
      run_tq(dir, {"eval", kModel, "--task", file, "--json", "-q", "--limit", "1"});
  EXPECT_EQ(Json::parse(limited.out)["n"], 1);
  EXPECT_EQ(Json::parse(limited.out)["acc"], 1);  // "Once upon a time" is how its stories begin
  const CliResult human = run_tq(dir, {"eval", kModel, "--task", file, "-q"});
  EXPECT_TRUE(human.out.starts_with("words (lambada, 2 questions): acc 0.5000 +- 0.5000, ppl "))
      << human.out;
}

}  // namespace
}  // namespace tq
