// cmd_eval - `tq eval`: perplexity by the protocol of the quantization papers, and KL divergence
// to a reference model.
//
// Protocol: the text is tokenised once (with whatever the tokenizer's post-processor adds at its
// start), cut into windows of ctx tokens without overlap, the tail dropped; every window starts
// cold and scores its last ctx - 1 tokens. Numbers of other protocols are not comparable: the
// output names this one, docs/results.md says where it comes from.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <vector>

#include "model/error.h"
#include "model/sampler.h"
#include "tools/commands.h"
#include "tools/runtime.h"
#include "tools/sha256.h"

namespace tq {
namespace {

constexpr const char* kProtocol =
    "text tokenised once, non-overlapping windows, tail dropped, ctx-1 scored tokens a window, "
    "no BOS between windows";

struct EvalOptions {
  std::string model, text, reference;
  int64_t ctx = 2048, windows = 0;
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

// KL(p || q) in nats of two softmaxes, ids with p = 0 (masked padding) left out.
double kl_divergence(std::span<const float> p_logits, std::span<const float> q_logits) {
  const double p_norm = log_sum_exp(p_logits), q_norm = log_sum_exp(q_logits);
  double total = 0;
  for (size_t i = 0; i < p_logits.size(); ++i) {
    const double log_p = p_logits[i] - p_norm;
    if (!(log_p > -100)) continue;  // contributes below 1e-43; also -inf
    total += std::exp(log_p) * (log_p - (q_logits[i] - q_norm));
  }
  return total;
}

// Runs one window; fills `scores` and, when `reference` is given, compares row by row. The
// reference runs the same window first and keeps its logits (ctx x vocab floats).
class Evaluator {
 public:
  Evaluator(const Runtime& runtime, const Runtime* reference, const EvalOptions& options)
      : vocab_(runtime.model.config.vocab_size),
        session_(runtime.prepared, runtime.session_options(options.ctx, options.device.kv_bits)) {
    if (!reference) return;
    reference_ = std::make_unique<Session>(
        reference->prepared, reference->session_options(options.ctx, options.device.kv_bits));
    reference_logits_.resize(static_cast<size_t>((options.ctx - 1) * vocab_));
  }

  void window(std::span<const int32_t> tokens, Scores& scores) {
    const int64_t scored = static_cast<int64_t>(tokens.size()) - 1;
    if (reference_) {
      reference_->truncate(0);
      reference_->feed_all(tokens.first(static_cast<size_t>(scored)),
                           [&](int64_t first, int64_t, std::span<const float> logits) {
                             std::copy(logits.begin(), logits.end(),
                                       reference_logits_.begin() + first * vocab_);
                           });
    }
    const size_t base = scores.nll.size();
    scores.nll.resize(base + static_cast<size_t>(scored));
    if (reference_) scores.kl.resize(scores.nll.size());
    session_.truncate(0);
    session_.feed_all(
        tokens.first(static_cast<size_t>(scored)),
        [&](int64_t first, int64_t rows, std::span<const float> logits) {
          int64_t agree = 0;
#pragma omp parallel for schedule(static) reduction(+ : agree)
          for (int64_t row = 0; row < rows; ++row) {
            const std::span<const float> ours =
                logits.subspan(static_cast<size_t>(row * vocab_), static_cast<size_t>(vocab_));
            const size_t target = static_cast<size_t>(tokens[static_cast<size_t>(first + row + 1)]);
            const size_t index = base + static_cast<size_t>(first + row);
            scores.nll[index] = log_sum_exp(ours) - ours[target];
            if (!reference_) continue;
            const std::span<const float> theirs(reference_logits_.data() + (first + row) * vocab_,
                                                static_cast<size_t>(vocab_));
            scores.kl[index] = kl_divergence(theirs, ours);
            agree += argmax(theirs) == argmax(ours);
          }
          scores.top1_agree += agree;
        });
  }

 private:
  int64_t vocab_;
  Session session_;
  std::unique_ptr<Session> reference_;
  std::vector<float> reference_logits_;  // [ctx - 1, vocab]
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
    write_stdout(json.dump() + "\n");
    return;
  }
  char line[320];
  std::snprintf(line, sizeof line,
                "perplexity %.4f +- %.4f  (nll %.6f, %lld tokens, %lld windows of %lld)\n",
                json["ppl"].get<double>(), json["ppl"].get<double>() * json["stderr"].get<double>(),
                json["nll"].get<double>(), json["tokens"].get<long long>(),
                json["windows"].get<long long>(), json["ctx"].get<long long>());
  write_stdout(line);
  if (!json.contains("kl_mean")) return;
  std::snprintf(line, sizeof line,
                "KL to the reference: mean %.6f, median %.6f, p99 %.6f nats; top-1 agreement "
                "%.3f %%\n",
                json["kl_mean"].get<double>(), json["kl_median"].get<double>(),
                json["kl_p99"].get<double>(), 100 * json["top1_agreement"].get<double>());
  write_stdout(line);
}

void eval(const EvalOptions& options) {
  const std::string text = read_input_text(options.text);
  Runtime runtime(options.model, options.device);
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
  const auto start = std::chrono::steady_clock::now();
  for (int64_t w = 0; w < windows; ++w) {
    check_interrupted();
    evaluator.window(std::span(ids).subspan(static_cast<size_t>(w * options.ctx),
                                            static_cast<size_t>(options.ctx)),
                     scores);
    if (!options.quiet) {
      std::fprintf(stderr, "\rtq: window %lld/%lld, perplexity so far %.4f",
                   static_cast<long long>(w + 1), static_cast<long long>(windows),
                   std::exp(sum(scores.nll) / static_cast<double>(scores.nll.size())));
    }
  }
  if (!options.quiet) std::fprintf(stderr, "\n");
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
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

}  // namespace

void add_eval_command(CLI::App& app) {
  auto options = std::make_shared<EvalOptions>();
  CLI::App* command = app.add_subcommand("eval", "perplexity of a text, and KL to another model");
  command->add_option("model", options->model, ".tq file or Hugging Face folder")->required();
  command->add_option("--text", options->text, "text file; - reads stdin")->required();
  command->add_option("--ctx", options->ctx, "tokens a window")
      ->check(number_in(2, 1 << 24))
      ->capture_default_str();
  command->add_option("--windows", options->windows, "score only the first N windows; 0 = all")
      ->check(number_in(0, 1 << 24));
  command->add_option("--kl", options->reference,
                      "reference model: also report KL(reference || model) and top-1 agreement");
  command->add_flag("--json", options->json, "one JSON object on stdout");
  command->add_flag("-q,--quiet", options->quiet, "no progress on stderr");
  add_device_options(*command, options->device, true);
  command->callback([options] { eval(*options); });
}

}  // namespace tq
