// generate - the token loop shared by `run` and `chat`: feed, sample, stop, stream.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "model/sampler.h"
#include "tokenizer/chat.h"
#include "tools/runtime.h"

namespace tq {

/// Sampling options as given by the user; unset ones take the model's defaults.
struct SamplingFlags {
  SamplingWishes wishes;
  int64_t seed = -1;  // -1 = a fresh one
};
void add_sampling_options(CLI::App& command, SamplingFlags& flags);
/// Flags over the defaults of generation_config.json; what is not followed is noted on stderr.
SamplerOptions resolve_sampling(const SamplingFlags& flags, const Runtime& runtime, bool quiet);
/// Checks the texts of a model that only generating reads. Throws where `tq run` could not be made
/// to work, and returns sentences about what it will need options for.
std::vector<std::string> check_runnable(const Model& model, const Tokenizer& tokenizer);
/// One line for -v: the values in force, the seed included.
std::string describe_sampling(const SamplerOptions& options);

struct GenerateOptions {
  int64_t max_tokens = 0;
  std::vector<int32_t> stop_ids;
  std::vector<std::string> stop_texts;  // generation ends before the first of them
  bool show_special = false;
};

enum class FinishReason { kStopToken, kStopText, kMaxTokens, kContextFull, kInterrupted };
const char* finish_reason_name(FinishReason reason);

struct GenerateResult {
  std::vector<int32_t> ids;  // what was generated, the stop token included
  std::string text;
  FinishReason reason = FinishReason::kMaxTokens;
  double prefill_seconds = 0, decode_seconds = 0;
  int64_t n_prompt = 0;
};

/// Appends `prompt` to the session and generates; `emit` receives text that will not change any
/// more (complete UTF-8, no part of a stop text).
GenerateResult generate(Session& session, const Tokenizer& tokenizer,
                        const std::vector<int32_t>& prompt, Sampler& sampler,
                        const GenerateOptions& options,
                        const std::function<void(const std::string&)>& emit);

}  // namespace tq
