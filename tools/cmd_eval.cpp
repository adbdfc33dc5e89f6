// cmd_eval - `tq eval`: perplexity by the protocol of the quantization papers, KL divergence to a
// reference model, and accuracy on zero-shot questions (tasks.h, task_scores.h).
//
// Protocol of perplexities: the text is tokenised once (with whatever the tokenizer's
// post-processor adds at its start), cut into windows of ctx tokens without overlap, the tail
// dropped; every window starts cold and scores its last ctx - 1 tokens. Numbers of other protocols
// are not comparable: the output names this one, docs/results.md says where it comes from.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/softmax.h"
#include "model/error.h"
#include "tools/calibration_text.h"
#include "tools/commands.h"
#include "tools/runtime.h"
#include "tools/sha256.h"
#include "tools/task_scores.h"

namespace tq {
namespace {

constexpr const char* kProtocol =
    "text tokenised once, non-overlapping windows, tail dropped, ctx-1 scored tokens a window, "
    "no BOS between windows";

// Tokens whose logits under the reference are kept at a time (100 MB for 50,000 ids).
constexpr size_t kChunk = 512;

using Clock = std::chrono::steady_clock;

struct EvalOptions {
  std::string model, text, task, reference;
  int64_t ctx = 2048, windows = 0, limit = 0;
  DeviceOptions device;
  bool json = false, quiet = false;
};

// Scores of one token under one model.
struct Scores {
  std::vector<double> nll;  // [scored tokens], nats
  std::vector<double> kl;   // KL(reference || model), nats; empty without a reference
  int64_t top1_agree = 0;
};

double sum(const std::vector<double>& values) {
  double total = 0;
  for (double value : values) total += value;
  return total;
}

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Runs windows and scores them; with a reference, that runs the same tokens first.
class Evaluator {
 public:
  Evaluator(const Runtime& runtime, const Runtime* reference, const EvalOptions& options)
      : kernels_(kernels_for(best_isa())),
        n_threads_(options.device.threads > 0 ? options.device.threads : available_processors()),
        vocab_(static_cast<size_t>(runtime.model.config.vocab_size)),
        valid_(static_cast<size_t>(runtime.tokenizer.size())),
        session_(runtime.prepared, runtime.session_options(options.ctx, options.device.kv_bits)) {
    if (!reference) return;
    // --kv-bits is part of what is judged, so the reference keeps its own.
    reference_ =
        std::make_unique<Session>(reference->prepared, reference->session_options(options.ctx, 0));
    reference_logits_.resize(std::min(kChunk, static_cast<size_t>(options.ctx)) * vocab_);
  }

  void window(std::span<const int32_t> tokens, Scores& scores) {
    session_.truncate(0);
    if (reference_) reference_->truncate(0);
    // A chunk gives the logits that the whole window would give, bit by bit.
    const size_t scored = tokens.size() - 1;
    for (size_t begin = 0; begin < scored; begin += kChunk) {
      const size_t count = std::min(kChunk, scored - begin);
      chunk(tokens.subspan(begin, count), tokens.subspan(begin + 1, count), scores);
    }
  }

 private:
  void chunk(std::span<const int32_t> tokens, std::span<const int32_t> targets, Scores& scores) {
    if (reference_) {
      reference_->feed_all(tokens, [&](int64_t first, int64_t, std::span<const float> logits) {
        std::copy(logits.begin(), logits.end(),
                  reference_logits_.begin() + first * static_cast<int64_t>(vocab_));
      });
    }
    const size_t base = scores.nll.size();
    scores.nll.resize(base + tokens.size());
    if (reference_) scores.kl.resize(scores.nll.size());
    session_.feed_all(tokens, [&](int64_t first, int64_t rows, std::span<const float> logits) {
      std::atomic<int64_t> agree = 0;
      parallel_items(n_threads_, rows, [&](int64_t row, int) {
        const std::span ours = logits.subspan(static_cast<size_t>(row) * vocab_, valid_);
        const size_t index = static_cast<size_t>(first + row);
        scores.nll[base + index] =
            log_sum_exp(kernels_, ours) - ours[static_cast<size_t>(targets[index])];
        if (!reference_) return;
        const std::span<const float> theirs(reference_logits_.data() + index * vocab_, valid_);
        scores.kl[base + index] = kl_divergence(kernels_, theirs, ours);
        agree += index_of_max(kernels_, theirs) == index_of_max(kernels_, ours);
      });
      scores.top1_agree += agree;
    });
  }

  const Kernels& kernels_;
  int n_threads_;
  size_t vocab_, valid_;  // rows of the head; those that are tokens
  Session session_;
  std::unique_ptr<Session> reference_;
  std::vector<float> reference_logits_;  // [kChunk, vocab]
};

double quantile(std::vector<double> values, double q) {
  const size_t k = static_cast<size_t>(q * static_cast<double>(values.size() - 1) + 0.5);
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(k), values.end());
  return values[k];
}

// Standard error of the mean, from the window means: tokens of one window are correlated.
double window_stderr(const Scores& scores, int64_t per_window) {
  const int64_t windows = static_cast<int64_t>(scores.nll.size()) / per_window;
  if (windows < 2) return 0;
  const double mean = sum(scores.nll) / static_cast<double>(scores.nll.size());
  double square = 0;
  for (int64_t w = 0; w < windows; ++w) {
    double total = 0;
    for (int64_t i = 0; i < per_window; ++i) {
      total += scores.nll[static_cast<size_t>(w * per_window + i)];
    }
    const double d = total / static_cast<double>(per_window) - mean;
    square += d * d;
  }
  return std::sqrt(square / static_cast<double>(windows - 1) / static_cast<double>(windows));
}

void check_same_vocabulary(const Runtime& runtime, const Runtime& reference,
                           const EvalOptions& options) {
  if (runtime.model.config.vocab_size != reference.model.config.vocab_size ||
      runtime.tokenizer.size() != reference.tokenizer.size()) {
    throw Error(ErrorKind::kBadData, "models cannot be compared", options.reference,
                "its vocabulary differs from that of " + options.model);
  }
}

void print_result(const Json& json, bool as_json) {
  if (as_json) {
    write_json(json);
    return;
  }
  char line[320];
  std::snprintf(line, sizeof line,
                "perplexity %.4f +- %.4f  (nll %.6f, %lld tokens, %lld windows of %lld)\n",
                json["ppl"].get<double>(), json["ppl"].get<double>() * json["stderr"].get<double>(),
                json["nll"].get<double>(), json["tokens"].get<long long>(),
                json["windows"].get<long long>(), json["ctx"].get<long long>());
  if (!json.contains("kl_mean")) {
    write_result(line);
    return;
  }
  write_stdout(line);
  std::snprintf(line, sizeof line,
                "KL to the reference: mean %.6f, median %.6f, p99 %.6f nats; top-1 agreement "
                "%.3f %%\n",
                json["kl_mean"].get<double>(), json["kl_median"].get<double>(),
                json["kl_p99"].get<double>(), 100 * json["top1_agreement"].get<double>());
  write_result(line);
}

void eval_text(const EvalOptions& options) {
  const std::string text = read_input_text(options.text);
  if (!options.quiet && looks_like_json(text)) {
    note(options.text + " is JSON; it is read as text, braces and all");
  }
  Runtime runtime(options.model, options.device);
  if (!options.quiet) print_notes(runtime.model, runtime.tokenizer);
  std::unique_ptr<Runtime> reference;
  if (!options.reference.empty()) {
    reference = std::make_unique<Runtime>(options.reference, options.device);
    check_same_vocabulary(runtime, *reference, options);
  }
  runtime.checked_ctx(options.ctx);
  const std::vector<int32_t> ids = runtime.tokenizer.encode(text, true, true);
  const int64_t available = static_cast<int64_t>(ids.size()) / options.ctx;
  if (available == 0) {
    throw Error(
        ErrorKind::kBadData, "text too short", options.text,
        std::to_string(ids.size()) + " tokens, one window needs " + std::to_string(options.ctx),
        "use more text or a smaller --ctx");
  }
  const int64_t windows = options.windows > 0 ? std::min(options.windows, available) : available;
  Evaluator evaluator(runtime, reference.get(), options);
  Scores scores;
  const Clock::time_point start = Clock::now();
  const bool terminal = isatty(STDERR_FILENO) == 1;
  for (int64_t w = 0; w < windows; ++w) {
    check_interrupted();
    evaluator.window(std::span(ids).subspan(static_cast<size_t>(w * options.ctx),
                                            static_cast<size_t>(options.ctx)),
                     scores);
    // A line redrawn on a terminal; elsewhere one line for every tenth of the way.
    const bool tenth = (w + 1) * 10 / windows != w * 10 / windows;
    if (!options.quiet && (terminal || tenth)) {
      std::fprintf(stderr, "%stq: window %lld/%lld, perplexity so far %.4f%s", terminal ? "\r" : "",
                   static_cast<long long>(w + 1), static_cast<long long>(windows),
                   std::exp(sum(scores.nll) / static_cast<double>(scores.nll.size())),
                   terminal && w + 1 < windows ? "" : "\n");
    }
  }
  const double seconds = seconds_since(start);
  const double count = static_cast<double>(scores.nll.size());
  const double nll = sum(scores.nll) / count;
  Json json = {{"schema", 1},
               {"ppl", std::exp(nll)},
               {"nll", nll},
               {"stderr", window_stderr(scores, options.ctx - 1)},
               {"tokens", scores.nll.size()},
               {"windows", windows},
               {"ctx", options.ctx},
               {"protocol", kProtocol},
               {"text_sha256", sha256_hex(text)},
               {"kv_bits", runtime.session_options(options.ctx, options.device.kv_bits).kv_bits},
               {"tok_per_s", count / seconds}};
  if (reference) {
    json["kl_mean"] = sum(scores.kl) / count;
    json["kl_median"] = quantile(scores.kl, 0.5);
    json["kl_p99"] = quantile(scores.kl, 0.99);
    json["top1_agreement"] = static_cast<double>(scores.top1_agree) / count;
  }
  print_result(json, options.json);
}

std::vector<std::vector<EncodedCandidate>> encode_questions(const Runtime& runtime,
                                                            const Task& task,
                                                            const std::string& path) {
  std::vector<std::vector<EncodedCandidate>> encoded;
  for (const Question& question : task.questions) {
    const std::string where = path + ", line " + std::to_string(question.line);
    encoded.emplace_back();
    for (const AnswerCandidate& candidate : question.candidates) {
      encoded.back().push_back(encode_candidate(runtime.tokenizer, candidate, where));
      const int64_t fed = static_cast<int64_t>(encoded.back().back().ids.size()) - 1;
      if (fed > runtime.model.config.max_seq_len) {
        throw Error(ErrorKind::kBadData, "question too long", where,
                    std::to_string(fed) + " tokens, the model was trained for " +
                        std::to_string(runtime.model.config.max_seq_len) + " positions");
      }
    }
  }
  return encoded;
}

TaskTally score_questions(const Runtime& runtime, const Task& task, const EvalOptions& options,
                          int64_t& tokens_run) {
  const auto encoded = encode_questions(runtime, task, options.task);
  size_t longest = 1;
  for (const auto& question : encoded) {
    for (const EncodedCandidate& candidate : question) {
      longest = std::max(longest, candidate.ids.size() - 1);
    }
  }
  Session session(runtime.prepared,
                  runtime.session_options(static_cast<int64_t>(longest), options.device.kv_bits));
  CandidateScorer scorer(session, kernels_for(best_isa()), runtime.tokenizer.size());
  TaskTally tally;
  for (size_t i = 0; i < encoded.size(); ++i) {
    check_interrupted();
    std::vector<CandidateScorer::Score> scores;
    for (const EncodedCandidate& candidate : encoded[i]) scores.push_back(scorer.score(candidate));
    tally.add(task.questions[i], scores);
    if (options.quiet) continue;
    const Estimate so_far = task.predicts_word ? tally.greedy() : tally.acc();
    std::fprintf(stderr, "\rtq: question %zu/%zu, accuracy so far %.4f", i + 1, encoded.size(),
                 so_far.mean);
  }
  if (!options.quiet) std::fprintf(stderr, "\n");
  tokens_run = scorer.tokens_run();
  return tally;
}

void print_task(const Json& json, bool as_json) {
  if (as_json) {
    write_json(json);
    return;
  }
  std::string line = json["task"].get<std::string>() + " (" + json["form"].get<std::string>() +
                     ", " + std::to_string(json["n"].get<int64_t>()) + " questions):";
  const char* separator = " ";
  for (const char* name : {"acc", "acc_norm", "ppl"}) {
    if (!json.contains(name)) continue;
    char text[96];
    std::snprintf(text, sizeof text, "%s%s %.4f +- %.4f", separator, name, json[name].get<double>(),
                  json[std::string(name) + "_stderr"].get<double>());
    line += text;
    separator = ", ";
  }
  write_result(line + "\n");
}

void eval_task(const EvalOptions& options) {
  const std::string text = read_input_text(options.task);
  Task task = parse_task(text, options.task);
  if (options.limit > 0 && options.limit < static_cast<int64_t>(task.questions.size())) {
    task.questions.resize(static_cast<size_t>(options.limit));
  }
  const Runtime runtime(options.model, options.device);
  if (!options.quiet) print_notes(runtime.model, runtime.tokenizer);
  const Clock::time_point start = Clock::now();
  int64_t tokens_run = 0;
  const TaskTally tally = score_questions(runtime, task, options, tokens_run);
  const double seconds = seconds_since(start);
  const std::filesystem::path path(options.task);
  Json json = {{"schema", 1},
               {"task", options.task == "-" ? "stdin" : printable(path.stem().string())},
               {"form", task.form},
               {"n", task.questions.size()}};
  const auto put = [&](const std::string& name, const Estimate& estimate) {
    json[name] = estimate.mean;
    json[name + "_stderr"] = estimate.error;
  };
  put("acc", task.predicts_word ? tally.greedy() : tally.acc());
  if (task.has_acc_norm) put("acc_norm", tally.acc_norm());
  if (task.predicts_word) put("ppl", tally.gold_perplexity());
  json["text_sha256"] = sha256_hex(text);
  json["kv_bits"] = runtime.session_options(1, options.device.kv_bits).kv_bits;
  json["tok_per_s"] = static_cast<double>(tokens_run) / seconds;
  print_task(json, options.json);
}

}  // namespace

void add_eval_command(CLI::App& app) {
  auto options = std::make_shared<EvalOptions>();
  CLI::App* command =
      app.add_subcommand("eval", "perplexity of a text and KL to another model, or accuracy");
  command->add_option("model", options->model, ".tq file or Hugging Face folder")->required();
  CLI::Option* text =
      command->add_option("--text", options->text, "perplexity of this text file; - reads stdin");
  CLI::Option* task = command->add_option(
      "--task", options->task, "accuracy on the zero-shot questions of this .jsonl file");
  command->add_option("--limit", options->limit, "only the first N questions; 0 = all")
      ->check(number_in(0, 1 << 24))
      ->needs(task);
  command->add_option("--ctx", options->ctx, "tokens a window")
      ->check(number_in(2, 1 << 24))
      ->capture_default_str()
      ->needs(text);
  command->add_option("--windows", options->windows, "score only the first N windows; 0 = all")
      ->check(number_in(0, 1 << 24))
      ->needs(text);
  command
      ->add_option(
          "--kl", options->reference,
          "reference model, with its default --kv-bits: also report KL(reference || model) "
          "and top-1 agreement")
      ->needs(text);
  command->add_flag("--json", options->json, "one JSON object on stdout");
  command->add_flag("-q,--quiet", options->quiet, "no progress on stderr");
  add_device_options(*command, options->device, true);
  command->callback([options] {
    if (options->text.empty() == options->task.empty()) {
      throw Error(ErrorKind::kUsage, "usage", "tq eval", "give --text or --task, and not both");
    }
    options->task.empty() ? eval_text(*options) : eval_task(*options);
  });
}

}  // namespace tq
