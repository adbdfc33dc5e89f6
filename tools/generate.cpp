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
  command.add_option("--temp", flags.wishes.temperature, "temperature; 0 = greedy")
      ->check(number_in(0, 100))
      ->default_str("the model's");
  command.add_option("--top-k", flags.wishes.top_k, "keep the k likeliest tokens; 0 = all")
      ->check(number_in(0, 1 << 20))
      ->default_str("the model's");
  command
      .add_option("--top-p", flags.wishes.top_p, "keep the likeliest tokens up to this probability")
      ->check(number_in(0, 1))
      ->default_str("the model's");
  command
      .add_option("--min-p", flags.wishes.min_p, "drop tokens below this share of the likeliest")
      ->check(number_in(0, 1))
      ->default_str("0");
  command
      .add_option("--repeat-penalty", flags.wishes.repetition_penalty,
                  "divides positive logits of tokens that occurred, multiplies others; 1 = none")
      ->check(number_in(0.01, 100))
      ->default_str("the model's");
  command.add_option("--seed", flags.seed, "seed of the sampler; the same seed, the same text")
      ->check(number_in(0, 9007199254740992.0))
      ->default_str("random, shown by -v");
}

SamplerOptions resolve_sampling(const SamplingFlags& flags, const Runtime& runtime, bool quiet) {
  const Sampling sampling = sampling_of(runtime.model.texts, flags.wishes, runtime.model.source);
  if (!quiet) {
    for (const std::string& note : sampling.notes) std::fprintf(stderr, "tq: %s\n", note.c_str());
  }
  SamplerOptions options;
  options.temperature = sampling.temperature;
  options.top_k = sampling.top_k;
  options.top_p = sampling.top_p;
  options.min_p = sampling.min_p;
  options.repetition_penalty = sampling.repetition_penalty;
  options.seed =
      flags.seed >= 0 ? static_cast<uint64_t>(flags.seed) : uint64_t{std::random_device{}()};
  return options;
}

std::vector<std::string> check_runnable(const Model& model, const Tokenizer& tokenizer) {
  std::vector<std::string> notes;
  stop_tokens(model.texts, model.config, tokenizer, model.source);
  if (detect_chat_kind(model.texts, model.source) == ChatKind::kUnknown) {
    notes.push_back("the chat template is not known: tq run will need --template or --raw");
  }
  // Greedy decoding must work. By default, what it lacks can be given.
  SamplingWishes greedy;
  greedy.temperature = 0;
  greedy.repetition_penalty = 1;
  sampling_of(model.texts, greedy, model.source);
  try {
    sampling_of(model.texts, {}, model.source);
  } catch (const Error& error) {
    notes.push_back(std::string("tq run will need options: ") + error.what());
  }
  return notes;
}

std::string describe_sampling(const SamplerOptions& options) {
  char penalty[64] = "";
  if (options.repetition_penalty != 1) {
    std::snprintf(penalty, sizeof penalty, ", repetition penalty %g", options.repetition_penalty);
  }
  if (options.temperature <= 0) return std::string("greedy") + penalty;
  char text[224];
  std::snprintf(text, sizeof text, "temp %g, top-k %lld, top-p %g, min-p %g%s, seed %llu",
                options.temperature, static_cast<long long>(options.top_k), options.top_p,
                options.min_p, penalty, static_cast<unsigned long long>(options.seed));
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
