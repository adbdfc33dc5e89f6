// generate - see generate.h.
#include "tools/generate.h"

#include <algorithm>
#include <chrono>
#include <random>

#include "model/error.h"

namespace tq {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Where output must wait: the first position in `text` at which a stop text begins, whole (found)
// or as far as the text goes.
struct StopMatch {
  size_t position;
  bool found;
};
StopMatch find_stop(const std::string& text, const std::vector<std::string>& stops) {
  StopMatch match{text.size(), false};
  for (const std::string& stop : stops) {
    const size_t whole = text.find(stop);
    if (whole != std::string::npos && (!match.found || whole < match.position)) {
      match = {whole, true};
    }
  }
  if (match.found) return match;
  for (const std::string& stop : stops) {
    for (size_t n = std::min(stop.size() - 1, text.size()); n > 0; --n) {
      if (text.compare(text.size() - n, n, stop, 0, n) == 0) {
        match.position = std::min(match.position, text.size() - n);
        break;
      }
    }
  }
  return match;
}

}  // namespace

void add_sampling_options(CLI::App& command, SamplingFlags& flags) {
  command.add_option("--temp", flags.temperature, "temperature; 0 = greedy")
      ->check(number_in(0, 100))
      ->default_str("the model's");
  command.add_option("--top-k", flags.top_k, "keep the k likeliest tokens; 0 = all")
      ->check(number_in(0, 1 << 20))
      ->default_str("the model's");
  command.add_option("--top-p", flags.top_p, "keep the likeliest tokens up to this probability")
      ->check(number_in(0, 1))
      ->default_str("the model's");
  command.add_option("--min-p", flags.min_p, "drop tokens below this share of the likeliest")
      ->check(number_in(0, 1))
      ->default_str("0");
  command.add_option("--seed", flags.seed, "seed of the sampler; the same seed, the same text")
      ->check(number_in(0, 9007199254740992.0))
      ->default_str("random, shown by -v");
}

SamplerOptions resolve_sampling(const SamplingFlags& flags, const Runtime& runtime) {
  const SamplingDefaults defaults = sampling_defaults(runtime.model.texts, runtime.model.source);
  SamplerOptions options;
  options.temperature = flags.temperature >= 0 ? flags.temperature : defaults.temperature;
  options.top_k = flags.top_k >= 0 ? flags.top_k : defaults.top_k;
  options.top_p = flags.top_p >= 0 ? flags.top_p : defaults.top_p;
  options.min_p = flags.min_p >= 0 ? flags.min_p : defaults.min_p;
  options.seed =
      flags.seed >= 0 ? static_cast<uint64_t>(flags.seed) : uint64_t{std::random_device{}()};
  return options;
}

std::string describe_sampling(const SamplerOptions& options) {
  if (options.temperature <= 0) return "greedy";
  char text[160];
  std::snprintf(text, sizeof text, "temp %g, top-k %lld, top-p %g, min-p %g, seed %llu",
                options.temperature, static_cast<long long>(options.top_k), options.top_p,
                options.min_p, static_cast<unsigned long long>(options.seed));
  return text;
}

const char* finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStopToken:
      return "stop_token";
    case FinishReason::kStopText:
      return "stop_text";
    case FinishReason::kMaxTokens:
      return "max_tokens";
    case FinishReason::kContextFull:
      return "context_full";
    case FinishReason::kInterrupted:
      return "interrupted";
  }
  return "?";
}

GenerateResult generate(Session& session, const Tokenizer& tokenizer,
                        const std::vector<int32_t>& prompt, Sampler& sampler,
                        const GenerateOptions& options,
                        const std::function<void(const std::string&)>& emit) {
  GenerateResult result;
  result.n_prompt = static_cast<int64_t>(prompt.size());
  StreamDecoder decoder(tokenizer, !options.show_special);
  std::string held;  // decoded, but perhaps the beginning of a stop text
  const auto release = [&](bool all) {
    const StopMatch match = find_stop(held, options.stop_texts);
    const size_t count = all && !match.found ? held.size() : match.position;
    if (count > 0) emit(held.substr(0, count));
    result.text += held.substr(0, count);
    held.erase(0, count);
    return match.found;
  };

  auto start = std::chrono::steady_clock::now();
  std::span<const Candidate> candidates;
  // What a signal stops in the middle is reported by the loop below.
  const auto feed = [&](std::span<const int32_t> tokens) {
    try {
      candidates = session.feed_top(tokens, sampler.n_candidates());
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::kInterrupted) throw;
    }
  };
  feed(prompt);
  result.prefill_seconds = seconds_since(start);
  start = std::chrono::steady_clock::now();
  while (true) {
    if (interrupted()) {
      result.reason = FinishReason::kInterrupted;
      break;
    }
    if (static_cast<int64_t>(result.ids.size()) >= options.max_tokens) {
      result.reason = FinishReason::kMaxTokens;
      break;
    }
    const int32_t id = sampler.sample(candidates);
    result.ids.push_back(id);
    if (std::find(options.stop_ids.begin(), options.stop_ids.end(), id) != options.stop_ids.end()) {
      result.reason = FinishReason::kStopToken;
      break;
    }
    held += decoder.next(id);
    if (release(false)) {
      result.reason = FinishReason::kStopText;
      held.clear();
      break;
    }
    if (session.position() >= session.ctx()) {
      result.reason = FinishReason::kContextFull;
      break;
    }
    if (static_cast<int64_t>(result.ids.size()) < options.max_tokens) feed(std::span(&id, 1));
  }
  result.decode_seconds = seconds_since(start);
  if (result.reason != FinishReason::kStopText) {
    held += decoder.finish();
    release(true);
  }
  return result;
}

}  // namespace tq
